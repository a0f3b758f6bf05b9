"""Training of codecs, classifiers and labelled priors of images, on a few made-up images."""

import dataclasses
import json

import pytest
import torch

from ppl_diffusion.imaging import CodecConfig, ImageClassifier, ImageCodec
from ppl_diffusion.models import load, load_classifier, load_codec
from ppl_diffusion.models.evaluate import evaluate, write_card
from ppl_diffusion.models.image_data import Images, load_images, shifted
from ppl_diffusion.models.image_evaluate import evaluate_images
from ppl_diffusion.models.image_recipes import ImageRecipe
from ppl_diffusion.models.image_sequences import code_symbols, encoded
from ppl_diffusion.models.image_tasks import CodecTask
from ppl_diffusion.models.image_training import train_images
from ppl_diffusion.models.recipes import Recipe
from ppl_diffusion.models.sequences import check_sequences
from ppl_diffusion.models.training import TrainingDiverged, train

CODEC = ImageRecipe(
    "codec",
    "bars",
    {"num_bits": 2, "features": 4},
    steps=120,
    batch_size=16,
    learning_rate=2e-2,
    shift=0,
    validate_every=40,
)
CLASSIFIER = dataclasses.replace(CODEC, task="classifier", shape={"features": 4})
PRIOR = Recipe(
    family="masked",
    dataset="bars",
    shape={"dim": 16, "depth": 1, "heads": 2, "dropout": 0.0, "num_classes": 2},
    steps=100,
    batch_size=32,
    learning_rate=2e-2,
    ema_decay=0.9,
    warmup=5,
    shares=(1.0, 1.0),
    validate_every=25,
    options={"label_dropout": 0.5},
    markov_order=1,
)


@pytest.fixture(scope="module")
def bars():
    """Return images of 8 x 8 pixels, bright on the left (class 0) or on top (class 1)."""
    labels = torch.arange(60) % 2
    images = -torch.ones(60, 1, 8, 8)
    images[labels == 0, :, :, :4] = 1.0
    images[labels == 1, :, :4] = 1.0
    images += 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return Images(
        *images.clamp(-1, 1).split([40, 10, 10]),
        labels.split([40, 10, 10]),
        num_classes=2,
        noun="bars",
        source="Made up.",
        licence="Data: made up.",
        bundled=True,
    )


@pytest.fixture(scope="module")
def codec_run(bars, tmp_path_factory):
    out = tmp_path_factory.mktemp("codec")
    return train_images("bars-codec", out=out, recipe=CODEC, images=bars, quiet=True)


def test_a_codec_learns(bars, codec_run):
    torch.manual_seed(0)
    untrained = CodecTask(CODEC).build(bars).eval()
    before, after = (
        evaluate_images(network, bars, CODEC) for network in (untrained, codec_run.network)
    )
    assert after.score > before.score + 3.0
    assert after.codes == 4
    assert isinstance(codec_run.network, ImageCodec)
    assert codec_run.score == pytest.approx(
        float(CodecTask(CODEC).scores(codec_run.network, bars.valid, bars.labels[1]).mean())
    )


def test_a_codec_is_read_from_its_folder(bars, codec_run):
    again = load_codec(codec_run.folder / "network")
    assert torch.equal(again.encode(bars.test), codec_run.network.encode(bars.test))
    record = json.loads((codec_run.folder / "run.json").read_text())
    assert record["valid"] == {"PSNR in dB": codec_run.score}
    with pytest.raises(ValueError, match="There is no codec 'x'"):
        load_codec("x")


def test_a_resumed_run_is_the_unbroken_one(bars, codec_run, tmp_path, monkeypatch):
    def stop(text, flush):
        if "step 80" in text:
            raise KeyboardInterrupt

    monkeypatch.setattr("builtins.print", stop)
    options = {"out": tmp_path, "recipe": CODEC, "images": bars}
    with pytest.raises(KeyboardInterrupt):
        train_images("bars-codec", **options)
    run = train_images("bars-codec", resume=True, quiet=True, **options)
    for found, expected in zip(
        run.network.state_dict().values(), codec_run.network.state_dict().values(), strict=True
    ):
        assert torch.equal(found, expected)
    with pytest.raises(ValueError, match="began with another recipe, seed or number of steps"):
        train_images("bars-codec", resume=True, seed=1, **options)
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        train_images("bars-codec", resume=True, **{**options, "out": tmp_path / "none"})
    with pytest.raises(ValueError, match="0 steps is not a run"):
        train_images("bars-codec", steps=0, **options)
    (tmp_path / "last.ckpt").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="is damaged or no checkpoint"):
        train_images("bars-codec", resume=True, **options)


def test_a_run_that_diverges_leaves_nothing(bars, tmp_path):
    recipe = dataclasses.replace(CODEC, learning_rate=float("inf"))
    with pytest.raises(TrainingDiverged, match="the score of bars-codec was never finite in 5"):
        train_images("bars-codec", out=tmp_path, recipe=recipe, images=bars, steps=5, quiet=True)
    assert not (tmp_path / "network").exists()


def test_a_classifier_learns(bars, tmp_path):
    run = train_images("bars", out=tmp_path, recipe=CLASSIFIER, images=bars, quiet=True)
    assert isinstance(run.network, ImageClassifier)
    assert evaluate_images(run.network, bars, CLASSIFIER).score == 1.0
    again = load_classifier(tmp_path / "network")
    assert torch.equal(again(bars.test), run.network(bars.test))
    maps = again.features(bars.test.reshape(2, 5, 1, 8, 8))
    assert [tuple(m.shape) for m in maps] == [(2, 5, 4, 8, 8), (2, 5, 8, 4, 4), (2, 5, 16, 2, 2)]
    with pytest.raises(ValueError, match=r"it reads \(\*n, 1, 8, 8\)"):
        again(bars.test[..., :4])


def test_shifts_move_the_content():
    image = torch.arange(12.0).reshape(1, 1, 3, 4)
    moved = shifted(image.expand(2, 1, 3, 4), torch.tensor([[1, 0], [0, -1]]), -1.0)
    assert moved[0, 0].tolist() == [[-1.0] * 4, [0.0, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0, 7.0]]
    assert moved[1, 0, 0].tolist() == [1.0, 2.0, 3.0, -1.0]
    assert shifted(image, torch.tensor([[0, -1]]), None)[0, 0, 0].tolist() == [1.0, 2.0, 3.0, 3.0]
    assert torch.equal(shifted(image, torch.zeros(1, 2, dtype=torch.int64), -1.0), image)


def test_images_become_tokens_with_labels(bars, codec_run):
    sequences = encoded(bars, codec_run.network, "bars-codec", shift=1)
    assert sequences.train.shape == (9 * 40, 4)
    assert sequences.vocabulary == "⠀⠁⠂⠃"
    assert sequences.codec == "bars-codec"
    assert torch.equal(sequences.labels[0], bars.labels[0].repeat(9))
    # The fifth of nine shifts is none.
    assert torch.equal(sequences.train[160:200], codec_run.network.encode(bars.train))
    assert torch.equal(sequences.test, codec_run.network.encode(bars.test))
    with pytest.raises(ValueError, match="256 braille patterns"):
        code_symbols(512)


@pytest.mark.parametrize("family", ["masked", "uniform"])
def test_a_prior_learns_the_tokens_of_each_label(bars, codec_run, tmp_path, family):
    sequences = encoded(bars, codec_run.network, "bars-codec")
    shape = {**PRIOR.shape, "time_conditioning": family == "uniform"}
    recipe = dataclasses.replace(PRIOR, family=family, shape=shape)
    run = train("bars", out=tmp_path, recipe=recipe, sequences=sequences, quiet=True)
    result = evaluate(load(tmp_path / "prior"), sequences, recipe, times=64)
    assert result.given_label < result.bound  # the same times and noise
    own, other = (
        run.program.labelled(labels).bound_terms(
            sequences.test, num_times=32, generator=torch.Generator().manual_seed(0)
        )
        for labels in (sequences.labels[2], 1 - sequences.labels[2])
    )
    assert own.mean() + 0.3 < other.mean()  # nats a sequence, with the same times and noise


def test_cards_of_labelled_priors(bars, codec_run, tmp_path):
    sequences = encoded(bars, codec_run.network, "bars-codec")
    run = train("bars", out=tmp_path, recipe=PRIOR, steps=5, sequences=sequences, quiet=True)
    result = evaluate(run.program, sequences, PRIOR, times=2)
    write_card(tmp_path, "digits", sequences, result)
    card = json.loads((tmp_path / "card.json").read_text())
    assert card["training"] == "ppl-diffusion train digits --out OUT"
    assert card["codec"] == "bars-codec"
    assert card["metrics"]["given_label"] == round(result.given_label, 4)
    assert "given the label" in (tmp_path / "card.md").read_text(encoding="utf-8")


def test_labels_must_fit(bars, codec_run):
    sequences = encoded(bars, codec_run.network, "bars-codec")
    for wrong in (None, tuple(label[:3] for label in sequences.labels)):
        with pytest.raises(ValueError, match="a network with classes needs labels"):
            check_sequences(dataclasses.replace(sequences, labels=wrong), PRIOR)
    other = dataclasses.replace(PRIOR, objective="curriculum", options={})
    with pytest.raises(ValueError, match="classes are learnt by the objective nelbo"):
        check_sequences(sequences, other)


def test_the_digits_are_split_once():
    images = load_images("digits")
    assert [len(part) for part in (images.train, images.valid, images.test)] == [1350, 150, 297]
    assert images.image_shape == (1, 16, 16)
    assert float(images.train.min()) == -1.0
    assert float(images.train.max()) == 1.0
    parts = torch.cat([images.train, images.valid, images.test]).flatten(1)
    assert len(parts.unique(dim=0)) == 1797
    with pytest.raises(ValueError, match="no set of images 'x': choose one of digits, mnist"):
        load_images("x")


def test_a_wider_codec_keeps_its_shape():
    config = CodecConfig(16, 8, channels=3, num_bits=8, features=4)
    assert ImageCodec(config).eval()(torch.zeros(2, 3, 16, 8)).shape == (2, 3, 16, 8)
