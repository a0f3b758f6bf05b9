"""Networks of images by the command line: trained, listed, sampled from."""

import pytest

from ppl_diffusion.cli import run
from ppl_diffusion.models import codecs, list_classifiers, load_codec
from ppl_diffusion.models.training import TrainingDiverged


def test_a_codec_is_trained_by_its_name(tmp_path, capsys):
    out = tmp_path / "run"
    assert run(["train", "digits-codec", "--steps", "2", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "PSNR in dB" in text
    assert f"wrote {out}" in text
    assert load_codec(out / "network").length == 16
    again = ["train", "digits-codec", "--steps", "3", "--out", str(out), "--resume"]
    assert run(again) == 2
    assert "another recipe, seed or number of steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        (["digits-codec", "--objective", "nelbo"], "has no --objective: leave it out"),
        (["digits-classifier", "--init", "x"], "has no --init: leave it out"),
        (["mnist-codec", "--data", "HOME"], "does not hold images/mnist.npz"),
        (["nonsuch"], "choose one of yeast-promoter"),
        (["nonsuch"], "digits-codec"),
    ],
)
def test_bad_questions_are_refused_in_a_sentence(asked, sentence, tmp_path, capsys):
    asked = [str(tmp_path) if word == "HOME" else word for word in asked]
    assert run(["train", *asked, "--out", str(tmp_path / "run")]) == 2
    assert sentence in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("raised", "code", "sentence"),
    [
        (TrainingDiverged("Never finite."), 1, "Never finite."),
        (KeyboardInterrupt(), 130, "Stopped: nothing was written"),
    ],
)
def test_training_that_ends_early_says_why(raised, code, sentence, tmp_path, monkeypatch, capsys):
    def stub(*args, **options):
        raise raised

    monkeypatch.setattr("ppl_diffusion.models.image_training.train_images", stub)
    assert run(["train", "digits-codec", "--out", str(tmp_path / "run")]) == code
    assert sentence in " ".join(capsys.readouterr().err.split())


def test_models_lists_codecs_and_classifiers(capsys):
    assert run(["models"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in (*codecs(), *list_classifiers()))
    assert "PSNR in dB 2" in out


def test_samples_of_images_are_lines_of_tokens(capsys):
    assert run(["sample", "digits", "--num", "3", "--steps", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [len(line) for line in lines] == [16] * 3
