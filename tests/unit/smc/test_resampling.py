"""The resampler contract on every scheme, and what single schemes promise on top."""

import pytest
import torch

from ppl_diffusion.smc import (
    RESAMPLERS,
    SSP,
    Killing,
    Multinomial,
    Resampler,
    Residual,
    Stratified,
    Systematic,
)
from ppl_diffusion.smc.resampling import as_resampler
from ppl_diffusion.testing import ResamplerContract


class TestMultinomial(ResamplerContract):
    def make_resampler(self):
        return Multinomial()


class TestResidual(ResamplerContract):
    def make_resampler(self):
        return Residual()


class TestStratified(ResamplerContract):
    def make_resampler(self):
        return Stratified()


class TestSystematic(ResamplerContract):
    def make_resampler(self):
        return Systematic()


class TestSSP(ResamplerContract):
    def make_resampler(self):
        return SSP()


class TestKilling(ResamplerContract):
    def make_resampler(self):
        return Killing()


def counts(scheme, weights, replicates=4000, seed=0):
    w = torch.tensor(weights, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    shape = (replicates, scheme.num_uniforms(len(w)))
    uniforms = torch.rand(shape, dtype=torch.float64, generator=generator)
    chosen = scheme(uniforms, w.log().expand(replicates, -1))
    return torch.nn.functional.one_hot(chosen, len(w)).sum(-2).double()


@pytest.mark.parametrize("name", ["residual", "systematic", "ssp"])
def test_copies_are_at_least_the_floor(name):
    weights = [0.41, 0.23, 0.21, 0.1, 0.05]
    floor = (5 * torch.tensor(weights)).floor()
    assert bool((counts(RESAMPLERS[name], weights) >= floor).all())


@pytest.mark.parametrize("name", ["systematic", "ssp"])
def test_copies_are_floor_or_ceiling(name):
    weights = [0.41, 0.23, 0.21, 0.1, 0.05]
    expected = 5 * torch.tensor(weights, dtype=torch.float64)
    assert bool(((counts(RESAMPLERS[name], weights) - expected).abs() < 1).all())


def test_every_scheme_varies_less_than_multinomial():
    """Variances differ by tens of percent here; 4000 replicates tell them apart at > 5 s.e."""
    weights = [0.3, 0.2, 0.18, 0.12, 0.1, 0.05, 0.03, 0.02]
    spread = {name: float(counts(s, weights).var(0).sum()) for name, s in RESAMPLERS.items()}
    assert max(spread, key=spread.get) == "multinomial"
    assert max(spread["systematic"], spread["ssp"]) < min(spread["stratified"], spread["residual"])


def test_killing_keeps_a_particle_in_its_place():
    """Equal weights: nobody is killed, unlike in a sorted scheme nobody moves."""
    assert bool((counts(Killing(), [0.25] * 4) == 1).all())
    uniforms = torch.rand(7, 8, dtype=torch.float64)
    chosen = Killing()(uniforms, torch.zeros(7, 4, dtype=torch.float64))
    assert bool((chosen == torch.arange(4)).all())


def test_multinomial_is_unsorted():
    """Sorted ancestors would break conditional SMC; here all orders come up."""
    uniforms = torch.rand(200, 3, dtype=torch.float64)
    chosen = Multinomial()(uniforms, torch.zeros(200, 3, dtype=torch.float64))
    assert bool((chosen[:, 1:] < chosen[:, :-1]).any())


def test_systematic_depends_on_labels_only_through_weights():
    """Neighbours in label order are no more likely to be chosen together than strangers.

    Without the shuffle the pair (0, 1) of weights .25 would never both get a copy from one tooth
    of the comb; 20000 replicates, |z| < 5: false alarm rate below 1e-5.
    """
    copies = counts(Systematic(), [0.125] * 8 + [0.0] * 8, replicates=20_000)  # N w = 2 each
    assert bool((copies[:, :8] == 2).all())
    copies = counts(Systematic(), [0.3, 0.3, 0.3, 0.1], replicates=20_000)
    near, far = copies[:, 0] * copies[:, 1], copies[:, 0] * copies[:, 2]
    difference = near - far
    assert abs(float(difference.mean() / (difference.std() / len(difference) ** 0.5))) < 5


def test_biased_scheme_fails_the_contract():
    """The contract has power: forgetting the last bin is noticed."""

    class Forgetful(Multinomial):
        def _ancestors(self, uniforms, weights):
            return super()._ancestors(0.98 * uniforms, weights)

    contract = ResamplerContract()
    with pytest.raises(AssertionError):
        contract.test_expected_copies(Forgetful(), [0.05, 0.1, 0.15, 0.3, 0.4])


def test_names():
    assert as_resampler("ssp") is RESAMPLERS["ssp"]
    mine = Multinomial()
    assert as_resampler(mine) is mine
    assert all(isinstance(scheme, Resampler) for scheme in RESAMPLERS.values())
    with pytest.raises(ValueError, match="unknown resampler 'best'; choose one of multinomial"):
        as_resampler("best")


def test_float32_weights_are_resampled_in_float64():
    """A comb over 2**14 nearly equal float32 weights must keep every count near one."""
    generator = torch.Generator().manual_seed(0)
    log_weights = 1e-4 * torch.randn(2**14, generator=generator)
    uniforms = torch.rand(2**14 + 1, dtype=torch.float64, generator=generator)
    copies = torch.bincount(Systematic()(uniforms, log_weights), minlength=2**14)
    assert int(copies.max()) <= 2
