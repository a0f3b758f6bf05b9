"""`sample` with priors that draw a latent beside their tokens."""

import pytest

from ppl_diffusion.cli import run
from ppl_diffusion.models.latent import LatentDiffusion


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    small = {"dim": 16, "depth": 1, "heads": 2, "num_slots": 2, "num_codes": 3, "latent_dim": 4}
    prior = LatentDiffusion.build("ab_", 5, name="small", **small)
    path = tmp_path_factory.mktemp("priors") / "small"
    prior.save(path)
    return str(path)


def sample(capsys, *arguments):
    """Return the exit code, what was printed, and the complaint."""
    code = run(["sample", *arguments])
    return (code, *capsys.readouterr())


@pytest.mark.parametrize(
    "path",
    [
        (),
        ("--path", "seq", "--latent-steps", "2", "--token-steps", "3"),
        ("--latent-steps", "1", "--token-steps", "1"),
        ("--path", "joint", "--steps", "16"),
        ("--path", "ordered", "--steps", "2"),
        ("--path", "masked", "--steps", "2"),
        ("--steps", "4"),
    ],
    ids=" ".join,
)
def test_sequences_are_drawn_along_a_path(folder, path, capsys):
    code, first, complaint = sample(capsys, folder, "--num", "4", "--seed", "3", *path)
    assert code == 0, complaint
    assert first == sample(capsys, folder, "--num", "4", "--seed", "3", *path)[1]
    lines = first.splitlines()
    assert lines[::2] == [f">sample_{i}" for i in range(1, 5)]
    # Padding inside a sequence is a letter of it; behind the end it is left out.
    assert all(set(text) <= set("ab_") and not text.endswith("_") for text in lines[1::2])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--path", "seq", "--latent-steps", "2"), "takes --steps, or both --latent-steps and"),
        (("--path", "spiral", "--steps", "3"), "There is no path 'spiral': choose one of masked"),
        (("--path", "joint", "--token-steps", "3"), "the path 'joint' takes --steps; give"),
        (("--sampler", "psi"), "draws a latent beside its tokens, which the sampler 'psi' does"),
        (("--filter", "nucleus:0.9"), "filters know tokens alone"),
        (("--latent-steps", "0", "--token-steps", "2"), "atent-steps must be at least 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_is_one_sentence(folder, arguments, sentence, capsys):
    code, printed, complaint = sample(capsys, folder, *arguments)
    assert (code, printed) == (2, "")
    assert sentence in complaint
    assert complaint.count("\n") == 1


def test_a_prior_without_a_latent_has_no_path(capsys):
    code, _, complaint = sample(capsys, "yeast-promoter", "--path", "seq")
    assert code == 2
    assert "yeast-promoter draws no latent beside its tokens" in complaint
