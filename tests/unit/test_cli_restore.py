"""The command restore, on a tiny untrained prior: what it writes, and how it refuses."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from ppl_diffusion.cli import run
from ppl_diffusion.imaging.codec import CodecConfig, ImageCodec
from ppl_diffusion.imaging.measurement import Measurement
from ppl_diffusion.inference import methods
from ppl_diffusion.jobs.options import options
from ppl_diffusion.models import MaskedDiffusion
from ppl_diffusion.smc import ParticlePosterior

NUMBERS = ["--particles", "6", "--runs", "2", "--steps", "2", "--method", "smc", "--quiet"]
FILES = {
    "restored.png",
    "mean.png",
    "uncertainty.png",
    "pixels.npz",
    "measurement.npz",
    "posterior.nc",
    "summary.json",
    "figure.png",
    "particles/particles.json",
    "particles/particles.safetensors",
    *(f"samples/{n}.png" for n in range(1, 9)),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ImageCodec(CodecConfig(8, 12, channels=3, num_bits=2, features=4)).save(folder / "codec")
        size = {"dim": 16, "depth": 1, "heads": 2}
        MaskedDiffusion.build(list("abcd"), 6, name="tiny", **size).save(folder / "prior")
    pixels = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "truth.png")
    return folder


def words(places, image="truth.png"):
    models = ["--prior", str(places / "prior"), "--codec", str(places / "codec")]
    return ["restore", str(places / image), *models]


@pytest.fixture(scope="module")
def restored(places, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "one"
    asked = ["--operator", "rinp", "--noise", "0.2", "--out", str(out)]
    assert run([*words(places), *NUMBERS, *asked]) == 0
    return out


def files(folder):
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def read_summary(folder):
    return json.loads((folder / "summary.json").read_text())


def refusal(arguments, capsys):
    assert run([str(a) for a in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("ppl-diffusion: ")
    assert err.count("\n") == 1
    return err


def test_it_writes_the_promised_files(restored):
    assert files(restored) == FILES
    mean = np.asarray(Image.open(restored / "mean.png"))
    assert mean.shape == (256, 384, 3)
    with np.load(restored / "pixels.npz") as pixels:
        assert pixels["mean"].shape == (3, 8, 12)
        assert (pixels["low"] <= pixels["high"]).all()
        shown = (pixels["mean"].transpose(1, 2, 0).clip(-1, 1) + 1) * 127.5
    assert np.abs(mean[::32, ::32] - shown).max() <= 0.51


def test_the_summary_agrees_with_the_files(restored):
    summary = read_summary(restored)
    posterior = ParticlePosterior.load(restored / "particles")
    assert summary["log_evidence"] == posterior.log_evidence.tolist()
    assert summary["denoiser_rows"] == posterior.num_evaluations
    assert summary["exact"] is posterior.exact is True
    assert summary["target"] == posterior.target
    assert summary["warnings"] == list(map(str, posterior.warnings))
    assert summary["operator"] == "rinp"
    assert summary["settings"]["search"]["num_particles"] == 6
    measurement = Measurement.load(restored / "measurement.npz")
    assert measurement.sigma == summary["noise"] == 0.2
    assert summary["num_measured"] == len(measurement.y) == 3 * round(0.3 * 96)
    with np.load(restored / "pixels.npz") as pixels:
        residual = float(measurement.residual(torch.from_numpy(pixels["mean"])))
    assert summary["metrics"]["mean"]["residual"] == pytest.approx(residual, rel=1e-5)


def test_the_same_seed_gives_the_same_files(places, restored, tmp_path):
    out = tmp_path / "again"
    asked = ["--operator", "rinp", "--noise", "0.2", "--out", str(out)]
    torch.manual_seed(9)  # of no consequence
    assert run([*words(places), *NUMBERS, *asked]) == 0
    for name in files(restored) - {"summary.json"}:
        assert (out / name).read_bytes() == (restored / name).read_bytes(), name
    first, second = map(read_summary, (restored, out))
    assert {**first, "seconds": 0} == {**second, "seconds": 0}


def test_another_seed_gives_another_measurement(places, restored, tmp_path):
    out = tmp_path / "other"
    asked = ["--operator", "rinp", "--noise", "0.2", "--seed", "1", "--out", str(out)]
    assert run([*words(places), *NUMBERS, *asked]) == 0
    first, second = (Measurement.load(f / "measurement.npz") for f in (restored, out))
    assert first.operator != second.operator


def test_a_measurement_of_a_former_run_is_restored(places, restored, tmp_path, capsys):
    out = tmp_path / "again"
    start = ["restore", str(restored / "measurement.npz"), *words(places)[2:], *NUMBERS[:-1]]
    assert run([*start, "--measured", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "residual" in said
    assert "PSNR" not in said
    assert files(out) == FILES
    assert read_summary(out)["log_evidence"] == read_summary(restored)["log_evidence"]
    assert "codec" not in read_summary(out)["metrics"]
    assert "--noise, or --measured" in refusal([*start, "--measured", "--noise", "0.1"], capsys)


def test_tables_say_how_good_and_how_sure(places, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    assert run([*words(places), *NUMBERS[:-1], "--out", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    for text in ("PSNR (dB)", "the truth through the codec", "crps", "decoder rows", "wrote"):
        assert text in out


def test_a_folder_is_never_overwritten_unasked(places, restored, capsys):
    before = read_summary(restored)
    again = [*words(places), *NUMBERS, "--out", restored]
    assert "already holds a run: choose another --out" in refusal(again, capsys)
    assert read_summary(restored) == before


def test_every_option_of_every_method_is_a_flag_but_those_of_designs(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERMINAL_WIDTH", "200")
    assert run(["restore", "--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"{name}:" in said for name in methods())
    flags = {option.flag for option in options().values()}
    assert all(flag in said for flag in flags - {"--power"})
    assert "--power" not in said


def test_the_help_groups_options_by_their_methods(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERMINAL_WIDTH", "200")
    assert run(["restore", "--help"]) == 0
    said = capsys.readouterr().out
    shared, split, steering = (
        said.index(f"Options of {who} ") for who in ("several methods", "split-gibbs", "steering")
    )
    assert shared < said.index("--twist ") < said.index("Options of aps-smc ")
    assert split < said.index("--prior-steps") < steering
    assert all(word in said for word in ("--data", "digits:N", "mnist:N", "faces:N"))


@pytest.mark.parametrize("number", ["-1", "99999", "three", ""])
def test_a_number_that_no_test_image_has_is_refused(number, capsys):
    said = refusal(["restore", f"digits:{number}", *NUMBERS], capsys)
    assert "has test images 0 to 296, not " in said
    assert "give one of digits:0 to digits:296" in said


def test_a_data_folder_can_be_given(places, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("PPL_DIFFUSION_DATA", raising=False)
    asked = ["restore", "mnist:0", *words(places)[2:], *NUMBERS]
    assert "pass --data" in refusal(asked, capsys)
    assert f"{str(tmp_path)!r} does not hold" in refusal([*asked, "--data", tmp_path], capsys)
    monkeypatch.setenv("PPL_DIFFUSION_DATA", str(tmp_path))
    assert "does not hold images/mnist.npz" in refusal(asked, capsys)


def test_a_method_that_cannot_say_why(places, tmp_path, capsys):
    asked = [*words(places), *NUMBERS[:-1], "--out", tmp_path / "run"]
    assert "--children is no option of smc" in refusal([*asked, "--children", "3"], capsys)
    assert "no method called 'map'" in refusal([*asked, "--method", "map"], capsys)


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        (["IMAGE", "--operator", "blur"], "There is no operator 'blur'"),
        (["IMAGE", "--noise", "-1"], "The noise must be above 0"),
        (["IMAGE", "--particles", "1"], "at least 2"),
        (["IMAGE", "--codec-error"], "has no error.safetensors"),
        (["IMAGE", "--prior", "nothing"], "There is no prior 'nothing'"),
        (["IMAGE", "--codec", "digits-codec"], "reads 16 of 64"),
        (["nowhere.png"], "There is no image 'nowhere.png'"),
        (["."], "The path '.' is a folder"),
        (["IMAGE", "--noise", "1e-30"], "The noise of pixels from -1 to 1 must lie between"),
        (["digits:3"], "Images of digits are 16 x 16 pixels"),
        (["IMAGE", "--measured"], "holds no measurement"),
        ([], "Missing argument"),
    ],
)
def test_bad_input_gets_one_sentence(asked, sentence, places, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    image = words(places)[1]
    models = words(places)[2:]
    said = [image if word == "IMAGE" else word for word in asked]
    assert sentence in refusal(["restore", *models, *NUMBERS, *said], capsys)
    assert not list(tmp_path.iterdir())


def test_an_image_of_another_size_is_resized_if_asked(places, tmp_path, capsys):
    Image.new("L", (30, 20), 120).save(tmp_path / "large.png")
    asked = ["restore", tmp_path / "large.png", *words(places)[2:], *NUMBERS]
    asked += ["--out", tmp_path / "run"]
    assert "20 x 30 pixels, and 8 x 12 are needed" in refusal(asked, capsys)
    assert run([*map(str, asked), "--resize"]) == 0
    assert read_summary(tmp_path / "run")["notes"] == []


def test_what_an_image_loses_is_noted(places, tmp_path, capsys):
    Image.new("L", (30, 30), 120).save(tmp_path / "square.png")
    asked = ["restore", str(tmp_path / "square.png"), *words(places)[2:], *NUMBERS[:-1], "--resize"]
    assert run([*asked, "--out", str(tmp_path / "run")]) == 0
    (note,) = read_summary(tmp_path / "run")["notes"]
    assert "30 x 30 pixels was brought to 8 x 12" in note
    assert f"Note: {note}" in capsys.readouterr().out


def test_without_pillow_it_says_what_is_missing(places, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    asked = [*words(places), *NUMBERS, "--out", tmp_path / "run"]
    assert "ppl-diffusion[imaging]" in refusal(asked, capsys)


def test_restorations_are_not_compared_as_designs(restored, tmp_path, capsys):
    shutil.copytree(restored, tmp_path / "other")
    assert run(["compare", str(restored), str(tmp_path / "other")]) != 0
    said = " ".join(capsys.readouterr().err.replace("\u2502", " ").split())
    assert "holds a restoration, and designs are compared" in said
