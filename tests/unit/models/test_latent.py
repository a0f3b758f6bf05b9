"""A model with a latent keeps the laws of model programs; its paths, sites and refusals."""

import math

import pytest
import torch

from ppl_diffusion.denoisers import Transformer
from ppl_diffusion.errors import IntractableLogProb
from ppl_diffusion.kernels.path import Path
from ppl_diffusion.models import LatentDiffusion, MaskedDiffusion
from ppl_diffusion.processes.gaussian import Gaussian
from ppl_diffusion.processes.schedules import Cosine
from ppl_diffusion.testing import ModelContract

SHAPE = {"dim": 8, "depth": 1, "heads": 2, "encoder_depth": 1}
DRAWS, STANDARD_ERRORS = 4000, 5.0


class LatentContract(ModelContract):
    def least(self, model, rows):
        """Average the likelihood over latents drawn from the model, less five standard errors."""
        finished = model.latent_chain().sample((DRAWS,))
        latent = finished[:, -1]
        chain = model.token_chain(latent=latent)
        values = rows[:, None].expand(-1, DRAWS, -1)
        weights = chain.marginal().log_prob_estimate(values, num_particles=1).exp()
        error = weights.std(1) / math.sqrt(DRAWS)
        return -(weights.mean(1) + STANDARD_ERRORS * error).log()


class TestCodes(LatentContract):
    def make_model(self):
        path = Path.sequential(2, 2)
        return LatentDiffusion.build("abc", 2, num_slots=2, num_codes=3, path=path, **SHAPE)


class TestVectors(LatentContract):
    def make_model(self):
        options = {"latent_schedule": Cosine(), "t_min": 0.2, "path": Path.sequential(2, 2)}
        return LatentDiffusion.build("abc", 2, num_slots=1, latent_dim=2, **options, **SHAPE)


@pytest.fixture(name="codes")
def _codes():
    return LatentDiffusion.build("abc", 4, num_slots=2, num_codes=3, **SHAPE)


def test_steps_are_split_between_latent_and_tokens(codes):
    assert codes.split_steps(1) == Path.masked(1)
    assert codes.split_steps(3) == Path.sequential(1, 2)
    assert codes.split_steps(16) == codes.path == Path.sequential(2, 14)  # there are two slots
    vectors = LatentDiffusion.build("abc", 4, num_slots=2, latent_dim=3, **SHAPE)
    assert vectors.path == Path.sequential(8, 8)
    assert codes.chain(8).kernel.path == codes.chain("seq", num_steps=8).kernel.path
    named = codes.chain(latent_steps=2, token_steps=3)
    assert named.kernel.path == Path.sequential(2, 3)


def test_paths_that_draw_both_at_once_are_warned_of(codes):
    with pytest.warns(UserWarning, match="draw tokens and latent at once.*path='seq'"):
        chain = codes.chain("joint", num_steps=2)
    assert chain.event_shape == (3, 6)
    codes.chain("ordered", num_steps=2)
    codes.chain("joint", num_steps=16)


def test_what_is_no_path_is_refused(codes):
    with pytest.raises(ValueError, match="There is no path 'odd': choose one of masked, joint"):
        codes.chain("odd", num_steps=2)
    with pytest.raises(ValueError, match="a path has its own steps"):
        codes.chain(Path.masked(2), num_steps=2)
    with pytest.raises(ValueError, match="the path 'seq' takes num_steps, or latent_steps and"):
        codes.chain(latent_steps=2)
    with pytest.raises(ValueError, match="codes are hidden, by a Schedule"):
        LatentDiffusion.build("abc", 4, num_slots=2, num_codes=3, t_min=0.1, **SHAPE)
    network = MaskedDiffusion.build("abc", 4, dim=8, depth=1, heads=2).denoiser
    assert isinstance(network, Transformer)
    with pytest.raises(TypeError, match="predicts no latent"):
        LatentDiffusion(network, vocabulary="abc", length=4)


def test_sequences_have_latents_and_latents_have_sequences(codes):
    x0 = codes.encode(["abca", "cccc"])
    latent = codes.encode_latent(x0)
    assert latent.shape == (2, 2)
    assert 0 <= int(latent.min()) <= int(latent.max()) < 3
    assert codes.latent_chain(2).sample().shape == (3, 2)
    chain = codes.token_chain(2, latent=latent)
    assert chain.x0(chain.sample()).shape == (2, 4)


def test_a_gaussian_process_comes_back(tmp_path):
    model = TestVectors().make_model()
    model.save(tmp_path)
    again = LatentDiffusion.restore(tmp_path, **model.settings())
    assert again.latent_process == Gaussian(Cosine(), 0.2)
    assert again.path == Path.sequential(2, 2)


@pytest.mark.parametrize(
    ("latent", "sentence"),
    [
        (torch.zeros(3, dtype=torch.int64), r"of shape \(\*batch, 2\), got torch.int64 of shape"),
        (torch.zeros(2), "got torch.float32"),
        (torch.tensor([0, 3]), "with others; latent_chain draws them"),
        (torch.tensor([-1, 0]), "with others"),
    ],
)
def test_what_is_no_finished_latent_is_refused(latent, sentence):
    prior = LatentDiffusion.build("ab", 4, num_slots=2, num_codes=3, dim=8, depth=1, heads=2)
    assert prior.token_chain(2, latent=[0, 2]).batch_shape == ()
    with pytest.raises(ValueError, match=sentence):
        prior.token_chain(2, latent=latent)


@pytest.mark.parametrize("rows", [torch.zeros(4).long(), torch.full((1, 4), 2), torch.zeros(1, 4)])
def test_what_is_no_clean_sequence_is_refused(rows):
    prior = LatentDiffusion.build("ab", 4, num_slots=2, num_codes=3, dim=8, depth=1, heads=2)
    for ask in (prior.encode_latent, prior.bound):
        with pytest.raises(ValueError, match=r"int64 ids 0 to 1 of shape \(n, 4\), got"):
            ask(rows)


def test_a_list_of_levels_is_a_path_and_too_many_codes_are_not_listed():
    prior = LatentDiffusion.build("ab", 4, num_slots=4, num_codes=30, dim=8, depth=1, heads=2)
    levels = [(1, 1), (1, 0), (0, 0)]
    assert prior.chain(levels).kernel.path == prior.find_path("seq", latent_steps=1, token_steps=1)
    with pytest.raises(IntractableLogProb, match="4 slots of 30 codes are too many to list"):
        prior.code_law(2)
