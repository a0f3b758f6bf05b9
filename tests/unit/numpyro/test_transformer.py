"""The transformer in JAX reads the weights of torch and is the same function."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import ppl_diffusion.numpyro as ppn
from ppl_diffusion.denoisers import Transformer
from ppl_diffusion.models.cards import WEIGHTS

NAMES = ("yeast-promoter", "yeast-promoter-uniform", "human-promoter", "digits", "yelp")


@pytest.mark.parametrize("name", NAMES)
def test_shipped_networks_agree(name):
    """Float32 in both: probabilities within 1e-5, log-probabilities within 1e-4."""
    theirs = Transformer.from_pretrained(WEIGHTS / name)
    ours = ppn.Transformer.from_pretrained(WEIGHTS / name)
    source = torch.Generator().manual_seed(0)
    length = min(theirs.config.max_length, 24)
    tokens = torch.randint(0, theirs.config.num_states, (2, 3, length), generator=source)
    with torch.no_grad():
        expected = theirs(tokens, 0.37).numpy()
    found = np.asarray(jax.jit(lambda net, z: net(z, 0.37))(ours, jnp.asarray(tokens.numpy())))
    assert found.shape == expected.shape
    assert found.dtype == np.float32
    np.testing.assert_allclose(np.exp(found), np.exp(expected), rtol=0, atol=1e-5)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert (ours.vocab_size, ours.kind, ours.time_free) == (
        theirs.vocab_size,
        theirs.kind,
        theirs.time_free,
    )


def test_some_positions_are_those_of_all():
    ours = ppn.Transformer.from_pretrained(WEIGHTS / "yelp")
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 20, (2, 16)))
    positions = jnp.asarray([[3, 0, 15], [7, 7, 1]])
    found = ours.at(tokens, 0.5, positions)
    expected = jnp.take_along_axis(ours(tokens, 0.5), positions[..., None], 1)
    assert found.shape == (2, 3, ours.vocab_size)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_labels_reach_it():
    theirs = Transformer.from_pretrained(WEIGHTS / "digits")
    ours = ppn.Transformer.from_pretrained(WEIGHTS / "digits")
    tokens = torch.full((3, 16), 64)
    labels = torch.tensor([0, 4, 10])
    with torch.no_grad():
        expected = theirs(tokens, 1.0, labels).numpy()
    found = ours(jnp.asarray(tokens.numpy()), 1.0, jnp.asarray(labels.numpy()))
    np.testing.assert_allclose(np.exp(found), np.exp(expected), rtol=0, atol=1e-5)
    np.testing.assert_allclose(found[2], ours(jnp.asarray(tokens.numpy()), 1.0)[2], atol=1e-6)


def test_bad_input_is_refused(tmp_path):
    ours = ppn.Transformer.from_pretrained(WEIGHTS / "yeast-promoter")
    with pytest.raises(ValueError, match="at most 80"):
        ours(jnp.zeros((1, 81), int), 0.5)
    with pytest.raises(ValueError, match="without classes"):
        ours(jnp.zeros((1, 80), int), 0.5, 1)
    with pytest.raises(FileNotFoundError):
        ppn.Transformer.from_pretrained(tmp_path)


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    for name, weights in (("other", WEIGHTS / "digits"), ("damaged", None)):
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(WEIGHTS / "yeast-promoter" / "config.json", folder)
        if weights is None:
            (folder / "model.safetensors").write_bytes(b"none")
        else:
            shutil.copy(weights / "model.safetensors", folder)
        match = "not a readable" if weights is None else "do not fit the configuration"
        with pytest.raises(ValueError, match=match):
            ppn.Transformer.from_pretrained(folder)
