"""Path moves and waste-free resampling: refusals, shapes, costs."""

import pytest
import torch

from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.inference import SMC
from ppl_diffusion.inference.tempering import default_moves, next_power
from ppl_diffusion.kernels import InterpolatingKernel
from ppl_diffusion.potentials import Potential
from ppl_diffusion.smc.rejuvenation import OrderRefresh, PathModel, SuffixRefresh, WasteFree
from ppl_diffusion.smc.weights import Weights
from ppl_diffusion.testing import ResamplerContract, toy_chain, toy_potential


class TestWasteFreeContract(ResamplerContract):
    def make_resampler(self):
        return WasteFree(1)


def test_waste_free_copies_are_neighbours_and_unbiased():
    """Mean copies within five standard errors, 6e-7 per particle."""
    log_w = torch.tensor([0.1, 0.2, 0.3, 0.0, 0.15, 0.25], dtype=torch.float64).log()
    uniforms = torch.rand(20_000, 2, dtype=torch.float64)
    ancestors = WasteFree(3)(uniforms, log_w.expand(20_000, 6))
    chains = ancestors.reshape(-1, 2, 3)
    assert bool((chains == chains[..., :1]).all())
    copies = torch.nn.functional.one_hot(ancestors, 6).sum(1).double()
    error = copies.std(0) / 20_000**0.5
    assert bool(((copies.mean(0) - 6 * log_w.exp()).abs() <= 5 * error).all())


def test_waste_free_needs_whole_chains():
    with pytest.raises(ValueError, match="no whole number of chains of 3 states"):
        SMC(toy_chain(), toy_potential(), method="tempering", num_particles=8, waste_free=3)


def test_suffix_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="num_steps must be >= 1, got 0"):
        SuffixRefresh(0)
    with pytest.raises(ValueError, match="4 steps are more than the chain's 3"):
        SuffixRefresh(4).check(toy_chain(num_steps=3))


@pytest.mark.parametrize(
    "options", [{"process": "uniform"}, {"process": "absorbing", "kappa": 0.5}]
)
def test_order_refuses_chains_that_revise(options):
    chain = toy_chain(**options)
    assert default_moves(chain) == (SuffixRefresh(2),)
    with pytest.raises(CapabilityError, match="use SuffixRefresh"):
        OrderRefresh().check(chain)


def test_order_refuses_subclasses_that_may_look_at_the_network():
    class Other(InterpolatingKernel):
        pass

    plain = toy_chain().kernel
    chain = ReverseChain(Other(plain.process, plain.denoiser, num_steps=3), 2)
    assert not OrderRefresh.fits(chain)
    assert OrderRefresh.fits(toy_chain())


def test_a_suffix_leaves_the_prefix_alone():
    chain, generator = toy_chain(length=4, num_steps=5), torch.Generator().manual_seed(0)
    model = PathModel(chain, toy_potential(length=4))
    state = model.state(chain.sample((2, 30), generator=generator))
    moved, accepted = SuffixRefresh(2)(model, state, generator=generator)
    assert torch.equal(moved.path[..., :4, :], state.path[..., :4, :])
    assert bool(accepted.any())
    assert not bool(accepted.all())
    assert model.num_evaluations <= 2 * 60


def test_an_order_leaves_the_sequence_alone():
    chain, generator = toy_chain(length=4, num_steps=5), torch.Generator().manual_seed(0)
    model = PathModel(chain, toy_potential(length=4))
    state = model.state(chain.sample((2, 30), generator=generator))
    moved, _ = OrderRefresh()(model, state, generator=generator)
    assert torch.equal(moved.x0, state.x0)
    assert not torch.equal(moved.path, state.path)


# ------------------------------------------------------------------------------------------------
# powers


def test_the_realised_ess_is_the_requested_one():
    """Bisection has the right sign and does not stall."""
    log_g = 5.0 * torch.randn(1000, dtype=torch.float64)
    power = 0.0
    for _ in range(3):
        following = next_power(log_g, power, 0.5)
        ess = float(Weights((following - power) * log_g).ess)
        assert power < following < 1
        assert abs(ess - 500) < 1e-3
        power = following


def test_small_tilts_take_one_step():
    assert next_power(torch.randn(100, dtype=torch.float64) * 0.1, 0.0, 0.5) == 1.0


def test_a_hard_constraint_does_not_stall_the_ladder():
    log_g = torch.where(torch.arange(1000) < 100, 5.0 * torch.randn(1000), -torch.inf).double()
    power = next_power(log_g, 0.0, 0.5)
    assert power > 1e-3
    assert abs(float(Weights(power * log_g).ess) - 50) < 1e-3


def test_no_possible_particle_is_said():
    with pytest.raises(ValueError, match="none of 5 pilot particles"):
        next_power(torch.full((5,), -torch.inf), 0.0, 0.5)


@pytest.mark.parametrize("powers", [[0.0], [0.0, 0.5], [0.1, 1.0], [0.0, 0.5, 0.5, 1.0]])
def test_ladders_must_rise_from_zero_to_one(powers):
    with pytest.raises(ValueError, match="must increase from exactly 0 to exactly 1"):
        SMC(toy_chain(), toy_potential(), method="tempering", powers=powers)


def test_a_hard_constraint_survives_tempering():
    potential = Potential(lambda x0: torch.where(x0[..., 0] == 0, -torch.inf, 2.0 * x0[..., 1]))
    options = {"num_particles": 32, "num_runs": 3, "powers": [0.0, 0.2, 0.6, 1.0]}
    post = SMC(toy_chain(), potential, method="tempering", **options).run(seed=0)
    assert bool((post.weights[post.x0[..., 0] == 0] == 0).all())
    assert bool(torch.isfinite(post.log_evidence).all())


def test_a_tempered_posterior_says_what_it_did():
    options = {"num_particles": 16, "num_runs": 2, "powers": [0.0, 0.5, 1.0], "waste_free": 4}
    first, again = (
        SMC(toy_chain(), toy_potential(), method="tempering", **options).run(seed=3)
        for _ in range(2)
    )
    assert torch.equal(first.x0, again.x0)
    assert first.exact
    assert first.times.tolist() == [1.0, 0.5, 0.0]
    assert first.settings["powers"] == [0.0, 0.5, 1.0]
    assert first.settings["moves"] == ["order", "suffix"]
    assert bool(first.evidence_variance.isnan().all())
    assert torch.equal(first.path[..., -1, :], first.x0)
    assert torch.equal(first.log_potential, toy_potential()(first.x0))
    assert first.num_evaluations > 0
    first.to_arviz()
