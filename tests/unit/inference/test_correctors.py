"""How compositions are made, what a corrector refuses, and what its result says."""

import math

import pyro
import pytest
import torch

from ppl_diffusion import CapabilityError
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.inference import (
    CFG,
    SMC,
    Composition,
    Power,
    Product,
    Tilt,
    order_inconsistency,
)
from ppl_diffusion.inference.lockstep import SITE_RULES, LeftToRight, SiteRule
from ppl_diffusion.kernels import ConfidenceKernel, InterpolatingKernel, OrderedKernel
from ppl_diffusion.potentials import Potential
from ppl_diffusion.potentials.factor import factor
from ppl_diffusion.testing import toy_chain, toy_markov_chain, toy_potential, z_score
from ppl_diffusion.testing.dense import all_states

GOAL = toy_potential()


def pair(name="absorbing", **options):
    first = toy_chain(name, **options)
    return first, toy_chain(first.kernel.process, seed=5, **options)


# --- compositions ---------------------------------------------------------------------------------


def test_compositions_multiply_exponents():
    a, b = pair()
    mixed = Power(Product(a, Power(b, 0.5)), 2.0)
    assert mixed.experts == ((a, 2.0), (b, 1.0))
    assert CFG(a, b, 3.0).experts == ((a, 3.0), (b, -2.0))
    assert Power(a, 2.0).law == "p^2"
    assert CFG(a, b, 2.0).law == "p1^2 * p2^-1"
    assert repr(Tilt(Product(a, b), GOAL)) == "Tilt(p1 * p2 * exp(toy))"


def test_what_cannot_be_multiplied_is_refused_by_name():
    a, b = pair()
    with pytest.raises(ValueError, match="Product: there is nothing to multiply"):
        Product()
    for weight in (2.0, -1.0):
        bases = (Power(a, 2.0), Tilt(b, GOAL))
        with pytest.raises(ValueError, match=f"CFG: weight={weight:g} divides .* 'toy' of a Tilt"):
            CFG(*(bases if weight > 1 else bases[::-1]), weight)
    assert CFG(Tilt(a, GOAL), b, 2.0).potential is not None
    with pytest.raises(ValueError, match="Power: beta=-1 divides by the potential 'toy'"):
        Power(Tilt(a, GOAL), -1.0)


def test_no_step_declares_more_reveals_than_there_are_sites():
    sharp = Power(toy_chain(length=3), 2.0)
    posterior = SMC(sharp, method="corrector", num_particles=4, group_size=99).run(seed=0)
    assert "3 sites per step" in posterior.target
    assert posterior.settings["group_size"] == 3


@pytest.mark.parametrize(
    "x0",
    [
        torch.tensor([[0, 3]]),
        torch.tensor([[-1, 0]]),
        torch.tensor([0, 1]),
        torch.tensor([[0, 1, 2]]),
        torch.tensor([[0.0, 1.0]]),
    ],
    ids=["mask", "negative", "vector", "length", "floats"],
)
def test_order_inconsistency_takes_sequences_of_the_chain(x0):
    with pytest.raises(ValueError, match=r"must hold tokens 0..2, integers of shape \(n, 2\)"):
        order_inconsistency(toy_chain(), x0)
    with pytest.raises(ValueError, match="num_orders must be >= 2"):
        order_inconsistency(toy_chain(), torch.tensor([[0, 1]]), num_orders=1)


def test_a_chain_that_corrects_itself_is_not_sent_to_lockstep():
    kernel = toy_chain("uniform").kernel
    correcting = InterpolatingKernel(kernel.process, kernel.denoiser, num_steps=3, kappa=0.8)
    with pytest.raises(CapabilityError, match="build the chain with kappa=1"):
        SMC(Power(ReverseChain(correcting, 2), 2.0), method="corrector", num_particles=4).run(
            seed=0
        )


def test_equal_chains_are_merged_and_cancelled_ones_dropped():
    a, b = pair()
    again = ReverseChain(a.kernel, a.length)
    assert Product(a, again).exponents == (2.0,)
    assert CFG(a, b, 1.0).chains == (a,)
    assert CFG(a, b, 0.0).chains == (b,)
    assert Product(a, b, Power(b, -1.0)).experts == ((a, 1.0),)
    with pytest.raises(ValueError, match="the exponents cancel"):
        Product(a, Power(again, -1.0))
    with pytest.raises(ValueError, match="the exponents cancel"):
        Power(a, 0.0)


def test_potentials_add_and_scale_with_the_power():
    a, b = pair()
    x0 = all_states(3, 2)
    once = Tilt(a, GOAL)
    torch.testing.assert_close(Power(once, 2.0).potential(x0), 2 * GOAL(x0))
    torch.testing.assert_close(Tilt(once, GOAL).potential(x0), 2 * GOAL(x0))
    both = Product(once, Tilt(b, lambda x: x.sum(-1))).potential
    torch.testing.assert_close(both(x0), GOAL(x0) + x0.sum(-1))


@pytest.mark.parametrize("exponent", [math.inf, math.nan])
def test_exponents_are_finite(exponent):
    with pytest.raises(ValueError, match="exponents must be finite"):
        Power(toy_chain(), exponent)


def test_chains_share_a_space():
    a, _ = pair()
    others = [toy_chain(length=3), toy_chain("uniform"), toy_chain(prompt=torch.tensor([0, -1]))]
    for other in others:
        with pytest.raises(ValueError, match="must share vocabulary and noise, length, prompt"):
            Product(a, other)
    with pytest.raises(TypeError, match="made of ReverseChains and compositions, got int"):
        Power(3, 2.0)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["low_confidence", "sampled-confidence"])
def test_ranking_by_sampled_tokens_is_refused(rule):
    with pytest.raises(CapabilityError, match="ranks positions by the tokens just sampled"):
        SMC(Power(toy_chain(), 2.0), method="corrector", sites=rule)


def test_options_are_checked():
    composition = Power(toy_chain(), 2.0)
    with pytest.raises(ValueError, match="unknown sites='best'; choose one of random"):
        SMC(composition, method="corrector", sites="best")
    with pytest.raises(ValueError, match="form is 'euler'; choose 'auto'"):
        SMC(composition, method="corrector", form="euler")
    with pytest.raises(ValueError, match="clamp=True needs a twist by completions"):
        SMC(composition, method="corrector", clamp=True, twist=None)
    with pytest.raises(ValueError, match="compose changes a chain"):
        SMC(composition, method="corrector", compose=lambda chain: chain).run()
    with pytest.raises(CapabilityError, match="TwistedSampler: it moves one chain, and the target"):
        SMC(composition, method="twisted").run()
    with pytest.raises(TypeError, match=r"takes no arguments .* composition"):
        SMC(composition, method="corrector").run(3)
    for options in ({"sites": "entropy"}, {"group_size": 2}, {"clamp": True}):
        with pytest.raises(ValueError, match="belong to lockstep reveals"):
            SMC(composition, method="corrector", form="path", **options).run()


def test_chains_without_a_plain_step_are_refused():
    chain = toy_chain()
    process, denoiser = chain.kernel.process, chain.kernel.denoiser
    confident = ReverseChain(ConfidenceKernel(process, denoiser, num_steps=3), 2)
    with pytest.raises(CapabilityError, match="lockstep reveals need a masked chain at kappa=1"):
        SMC(Power(confident, 2.0), method="corrector").run()
    ordered = ReverseChain(OrderedKernel(process, denoiser, length=2), 2)
    with pytest.raises(CapabilityError, match="the path-power target needs InterpolatingKernel"):
        SMC(Power(ordered, 2.0), method="corrector", form="path").run()
    uniform = toy_chain("uniform", kappa=0.5)
    with pytest.raises(CapabilityError, match="at kappa=1"):
        SMC(Power(uniform, 2.0), method="corrector").run()
    with pytest.raises(CapabilityError, match="lockstep reveals need a masked chain"):
        SMC(Power(toy_chain("uniform"), 2.0), method="corrector", form="lockstep").run()


def test_experts_agree_on_the_grid():
    a, _ = pair()
    process = a.kernel.process
    finer = toy_chain(process, num_steps=5, seed=5)
    with pytest.raises(ValueError, match="different time grids or schedules"):
        SMC(Product(a, finer), method="corrector", form="path").run()
    coarse = toy_chain(process, num_steps=1, seed=5)
    with pytest.raises(ValueError, match=r"reveal \[1, 2\] positions per step"):
        SMC(Product(a, coarse), method="corrector").run()
    assert SMC(Product(a, coarse), method="corrector", group_size=1).run(seed=0).num_steps == 2


def test_the_rate_form_needs_a_positive_order():
    with pytest.raises(ValueError, match="needs exponents with a positive sum, got -1"):
        SMC(Power(toy_chain(), -1.0), method="corrector", form="rates").run()


# --- results --------------------------------------------------------------------------------------


def test_the_result_says_what_it_is():
    a, b = pair()
    post = SMC(Tilt(CFG(a, b, 2.0), GOAL), method="corrector", num_particles=8, num_runs=2).run(
        seed=0
    )
    assert post.exact
    assert "p1^2 * p2^-1" in post.target
    assert "a uniformly random order, one site per step" in post.target
    assert "log G = toy" in post.target
    assert post.settings["exponents"] == [2.0, -1.0]
    assert (post.settings["form"], post.settings["sites"]) == ("lockstep", "random")
    assert post.path.shape == (2, 8, 3, 2)
    assert post.num_potential_calls > 0
    path = SMC(Power(a, 2.0), method="corrector", form="path").run(seed=0)
    assert "m(x_T)^2 * the product over 3 steps of p^2" in path.target
    rates = SMC(Power(a, 2.0), method="corrector", form="rates").run(seed=0)
    assert not rates.exact
    assert "only in the limit of many steps (3 here)" in rates.target


def test_group_size_keeps_the_number_of_steps():
    for num_steps, group in ((6, 1), (3, 2), (4, 2), (9, 1)):
        chain = toy_markov_chain(length=6, num_steps=num_steps)
        post = SMC(Power(chain, 2.0), method="corrector", num_particles=2).run(seed=0)
        assert post.settings["group_size"] == group
    kernel = OrderedKernel(
        chain.kernel.process, chain.kernel.denoiser, length=6, group_size=2, block=3
    )
    post = SMC(Power(ReverseChain(kernel, 6), 2.0), method="corrector", num_particles=4).run(seed=0)
    path = post.path[0]
    assert post.num_steps == 4
    assert bool((path[:, 2, :3] < 3).all())
    assert bool((path[:, 2, 3:] == 3).all())


def test_left_to_right_is_from_left_to_right():
    chain = toy_markov_chain(length=4, num_steps=4)
    post = SMC(Power(chain, 2.0), method="corrector", sites="left-to-right", num_particles=3).run(
        seed=0
    )
    for k in range(5):
        assert bool(((post.path[0, :, k] < 3) == (torch.arange(4) < k)).all())


def test_a_rule_of_ones_own():
    class FromTheRight(SiteRule):
        name = "right-to-left"
        words = "the order from right to left"

        def scores(self, tokens, log_law, noise):
            return -LeftToRight().scores(tokens, log_law, noise)

    chain = toy_markov_chain(length=4, num_steps=4)
    post = SMC(Power(chain, 2.0), method="corrector", sites=FromTheRight(), num_particles=3).run(
        seed=0
    )
    assert bool((post.path[0, :, 1, 3] < 3).all())
    assert "from right to left" in post.target


@pytest.mark.parametrize("sites", SITE_RULES)
def test_seeds_decide_everything(sites):
    chain = toy_markov_chain(length=4, num_steps=4)
    program = SMC(Power(chain, 2.0), method="corrector", sites=sites, num_particles=8)
    before = torch.get_rng_state()
    first, second = program.run(seed=1), program.run(seed=1)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first.x0, second.x0)
    assert torch.equal(first.log_evidence, second.log_evidence)


def test_every_state_is_evaluated_once_and_experts_share_a_network():
    """M16: at most one row per particle and reveal; two compositions of one network cost one."""
    chain = toy_markov_chain(length=5, num_steps=5)
    single = SMC(Power(chain, 2.0), method="corrector", num_particles=8, ess_threshold=0.0).run(
        seed=0
    )
    assert 5 <= single.num_evaluations <= 1 + 8 * 4
    assert single.num_potential_calls == 0
    kernel = InterpolatingKernel(chain.kernel.process, chain.kernel.denoiser, num_steps=5)
    twice = Product(chain, ReverseChain(kernel, 5))
    same = SMC(twice, method="corrector", num_particles=8, ess_threshold=0.0).run(seed=0)
    assert same.num_evaluations == single.num_evaluations
    torch.testing.assert_close(same.log_evidence, single.log_evidence)


def test_an_impossible_tilt_kills_every_run():
    """M15."""
    never = Potential(lambda x0: torch.full(x0.shape[:-1], -torch.inf))
    for clamp in (False, True):
        post = SMC(toy_chain(), never, method="corrector", num_particles=4, clamp=clamp).run(seed=0)
        assert post.died_at.tolist() == [1]
        assert post.log_evidence.tolist() == [-math.inf]


def test_experts_with_nothing_in_common_kill_every_particle():
    a, b = pair()
    a.kernel.denoiser.joint = torch.tensor([[1.0, 0, 0], [0, 0, 0], [0, 0, 0]]).double()
    b.kernel.denoiser.joint = torch.tensor([[0.0, 0, 0], [0, 0, 0], [0, 0, 1]]).double()
    for method in ("lockstep", "path"):
        post = SMC(Product(a, b), method="corrector", num_particles=4, form=method).run(seed=0)
        assert post.log_evidence.tolist() == [-math.inf]
        assert bool((post.x0 < 3).all())


def test_plates_multiply():
    chain = toy_chain()
    law = chain.kernel.denoiser.joint.flatten() ** 2
    for options in ({}, {"form": "path"}):
        program = SMC(
            Tilt(Power(chain.expand((2,)), 2.0), GOAL),
            method="corrector",
            num_particles=8,
            num_runs=800,
            **options,
        )
        post = program.run(seed=0)
        assert post.x0.shape == (800, 8, 2, 2)
        if not options:
            expected = float((law * GOAL(all_states(3, 2)).exp()).sum()) ** 2
            assert abs(z_score(post.log_evidence.exp(), expected)) < 4  # false alarm 6e-5


# --- programs -------------------------------------------------------------------------------------


def test_a_program_is_a_tilt_of_its_chain():
    chain = toy_chain()

    def program(scale):
        x = pyro.deterministic("x", chain.x0(pyro.sample("path", chain)), event_dim=1)
        factor("goal", scale * GOAL, x)

    joint = chain.kernel.denoiser.joint.flatten()
    tilt = (2 * GOAL(all_states(3, 2))).exp()
    options = {"num_particles": 8, "num_runs": 800}
    post = SMC(program, method="corrector", **options).run(2.0, seed=0)
    assert abs(z_score(post.log_evidence.exp(), float((joint * tilt).sum()))) < 4
    sharp = SMC(program, method="corrector", compose=lambda c: Power(c, 2.0), **options).run(
        2.0, seed=0
    )
    assert abs(z_score(sharp.log_evidence.exp(), float((joint**2 * tilt).sum()))) < 4
    assert sharp.is_program
    assert torch.equal(sharp.samples["x"], sharp.x0)


def test_a_bare_chain_needs_something_to_be_corrected_for():
    with pytest.raises(TypeError, match="a bare chain needs a potential"):
        SMC(toy_chain(), method="corrector").run()
    post = SMC(toy_chain(), method="corrector", compose=lambda c: Power(c, 2.0)).run(seed=0)
    assert "p^2" in post.target
    tilted = SMC(toy_chain(), GOAL, method="corrector", num_particles=4).run(seed=0)
    assert "log G = toy" in tilted.target
    assert isinstance(Power(toy_chain(), 2.0), Composition)


def test_order_inconsistency_is_for_masked_chains():
    with pytest.raises(CapabilityError, match="only an absorbing process"):
        order_inconsistency(toy_chain("uniform"), all_states(3, 2))
