"""The resampler contract on every scheme, and what single schemes promise on top."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from ppl_diffusion.deferred import deferred_checks
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
from ppl_diffusion.smc.resampling import _order, as_resampler
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


def test_a_scheme_that_inherits_gets_tensors():
    """Those that are shipped say of themselves alone that they take NumPy."""

    class Sorted(Multinomial):
        def _ancestors(self, uniforms, weights):
            return torch.searchsorted(weights.cumsum(-1), uniforms.sort(-1).values)

    class Named(Multinomial):
        name = "mine"

    uniforms = torch.rand(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    log_weights = torch.zeros(5, 4, dtype=torch.float64)
    chosen = Multinomial()(uniforms, log_weights)
    assert torch.equal(Sorted()(uniforms, log_weights), chosen.sort(-1).values)
    assert torch.equal(Named()(uniforms, log_weights), chosen)


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


def ssp_pair_by_pair(uniforms, weights):
    """Algorithm 2 of Gerber et al. as it is written: one open fraction meets one after another."""
    expected = [len(weights) * w for w in weights]
    copies = [math.floor(x) for x in expected]
    share = [x - c for x, c in zip(expected, copies, strict=True)]
    i = 0
    for j in range(1, len(weights)):
        up, down = min(1 - share[i], share[j]), min(share[i], 1 - share[j])
        gives = uniforms[j - 1] * (up + down) < down
        share[i] += up if gives else -down
        share[j] += -up if gives else down
        frozen = i if min(share[i], 1 - share[i]) <= min(share[j], 1 - share[j]) else j
        copies[frozen] += round(share[frozen])
        i = j if frozen == i else i
    copies[i] += len(weights) - sum(copies)
    return copies


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 300])
def test_ssp_is_the_algorithm_of_the_paper(size):
    """Same uniforms, same copies; round-off may differ where a uniform is next to a threshold."""
    generator = torch.Generator().manual_seed(size)
    log_w = 2 * torch.randn(50, size, dtype=torch.float64, generator=generator)
    log_w[torch.rand(50, size, generator=generator) < 0.2] = -torch.inf
    log_w[:, 0] = 0.0
    uniforms = torch.rand(50, size, dtype=torch.float64, generator=generator)
    chosen = SSP()(uniforms, log_w)
    for u, w, ancestors in zip(uniforms.tolist(), log_w.softmax(-1).tolist(), chosen, strict=True):
        assert torch.bincount(ancestors, minlength=size).tolist() == ssp_pair_by_pair(u, w)


def test_ssp_copies_are_negatively_associated():
    """The copies of any set of particles vary no more than if each were rounded alone.

    All 31 sets of five particles. A variance from 20000 replicates has a relative standard error
    below .01: false alarm rate below 1e-5.
    """
    weights = torch.tensor([0.3, 0.25, 0.2, 0.15, 0.1], dtype=torch.float64)
    copies = counts(SSP(), weights.tolist(), replicates=20_000)
    share = (5 * weights) % 1
    for subset in range(1, 32):
        chosen = [i for i in range(5) if subset >> i & 1]
        alone = float((share * (1 - share))[chosen].sum())
        assert float(copies[:, chosen].sum(-1).var()) < 1.05 * alone + 1e-9


def some_weights(scheme, size):
    """Weights of three runs, zeros in between and one run dead, with uniforms for them."""
    generator = torch.Generator().manual_seed(size)
    log_w = torch.randn(3, size, dtype=torch.float64, generator=generator)
    log_w[torch.rand(3, size, generator=generator) < 0.3] = -torch.inf
    log_w[1] = -torch.inf
    shape = (3, scheme.num_uniforms(size))
    return torch.rand(shape, dtype=torch.float64, generator=generator), log_w


@pytest.mark.parametrize("scheme", RESAMPLERS.values(), ids=list(RESAMPLERS))
@pytest.mark.parametrize("size", [1, 2, 7, 600])
def test_same_ancestors_with_numpy_and_torch(scheme, size):
    """NumPy is for the CPU; the rest of torch's way runs on accelerators, and here on the CPU."""
    uniforms, log_w = some_weights(scheme, size)
    assert torch.equal(scheme(uniforms, log_w), scheme._resample(uniforms, log_w))


@pytest.mark.parametrize("scheme", RESAMPLERS.values(), ids=list(RESAMPLERS))
def test_same_ancestors_with_jax(scheme):
    uniforms, log_w = some_weights(scheme, 300)
    with jax.enable_x64(True):
        far = scheme(jnp.asarray(uniforms.numpy()), jnp.asarray(log_w.numpy()))
        assert scheme(uniforms, log_w).tolist() == far.tolist()


def test_bad_weights_are_a_deferred_check_off_the_cpu():
    """On an accelerator nobody waits for the answer; here its path runs on the CPU."""
    bad = torch.tensor([0.0, torch.nan], dtype=torch.float64)
    uniforms = torch.rand(3, dtype=torch.float64)
    with deferred_checks() as checks:
        Systematic()._resample(uniforms, bad)
        with pytest.raises(ValueError, match="NaN or"):
            checks.read()


def test_long_keys_are_sorted_like_short_ones():
    keys = np.random.default_rng(0).random((4, 1000))
    keys[1, 500:] = keys[1, :500]  # ties stay as they stand
    expected = np.argsort(np.floor(keys * 2.0**32), axis=-1, kind="stable")
    assert (_order(keys) == expected).all()
    assert (_order(torch.from_numpy(keys)).numpy() == expected).all()


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("size", [1, 2, 3, 300, 5000])
def test_jax_sorts_keys_in_passes_of_what_fits(size, wide):
    """Beside the places of 5,000 keys there is room for 19 bits in 32."""
    keys = np.random.default_rng(0).random((2, size)).astype(np.float64 if wide else np.float32)
    keys[1, size // 2 :] = keys[1, : size - size // 2]
    expected = np.argsort(np.floor(keys * 2.0**32), axis=-1, kind="stable")
    with jax.enable_x64(wide):
        assert (np.asarray(_order(jnp.asarray(keys))) == expected).all()
