"""Look-aheads that arrive a step late: the same target, an unbiased evidence, another timing."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pyro
import pytest
import torch

from ppl_diffusion.denoisers.base import Wrapper
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.inference import SMC, ParticleGibbs
from ppl_diffusion.potentials import ForbiddenMotif, Reward, factor
from ppl_diffusion.smc import FeynmanKac, conditional_smc, run_smc
from ppl_diffusion.smc.engine import smc_loop
from ppl_diffusion.smc.late import LateLooks
from ppl_diffusion.smc.resampling import as_resampler
from ppl_diffusion.smc.twists import (
    LOG_BASE,
    ArgmaxFill,
    Defensive,
    PersistentFill,
    floored,
    log_mean_exp,
    mean_lookahead,
)
from ppl_diffusion.testing import all_states
from ppl_diffusion.testing.toys import toy_chain, toy_potential

TWISTS = [ArgmaxFill(late=True), PersistentFill(2, late=True), Defensive(2, late=True)]
LENGTH, STEPS = 3, 4


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def problem(process, scale=1.5):
    chain = toy_chain(process, length=LENGTH, num_steps=STEPS)
    potential = toy_potential(length=LENGTH, scale=scale)
    x0 = all_states(3, LENGTH)
    log_z = torch.logsumexp(chain.marginal().log_prob(x0) + potential(x0), 0)
    return chain, potential, float(log_z.exp())


def named(value):
    return getattr(value, "name", str(value))


@pytest.mark.parametrize("threshold", [0.5, 2.0])
@pytest.mark.parametrize("process", ["absorbing", "uniform"])
@pytest.mark.parametrize("twist", TWISTS, ids=named)
def test_the_evidence_is_unbiased(twist, process, threshold):
    """Within 4 standard errors of 3,000 runs: false alarm 6e-5 each, below 1e-3 in all."""
    chain, potential, z = problem(process)
    fk = FeynmanKac(chain, potential, twist)
    result = run_smc(fk, 4, 3000, ess_threshold=threshold, generator=generator(1))
    estimates = result.log_evidence.exp()
    assert abs(float(estimates.mean()) - z) < 4 * float(estimates.std()) / 3000**0.5
    assert result.exact
    assert result.settings["twist"] == twist.name


class Plainly:
    """The law as it is written: completions before the move, their scores after it, in turn."""

    def __init__(self, bound):
        self.bound, self.init, self.gather = bound, bound.init, bound.gather
        self.foresee = bound.foresee

    def move(self, carry, k, rng):
        before = self.bound.fills(self.bound.model.twist, carry, k, rng)
        moved, log_ratio = self.bound.move(carry, k, rng)
        return {**moved, "before": before}, log_ratio

    def log_twist(self, carry, k, rng):
        if k in (0, self.bound.num_steps):
            return None if k == 0 else self.bound.log_twist(carry, k, rng)
        log_f = log_mean_exp(self.bound.potential.lookahead(carry["before"]), 2)
        floor = self.bound.model.twist.floor
        mean = mean_lookahead(log_f, carry[LOG_BASE])
        return floored(log_f, mean, floor) if floor else log_f


@pytest.mark.parametrize("process", ["absorbing", "uniform"])
@pytest.mark.parametrize("twist", TWISTS, ids=named)
def test_a_twist_is_what_the_parents_completions_are_worth(twist, process):
    chain, potential, _ = problem(process)
    model = FeynmanKac(chain, potential, twist)

    def run(engine_of):
        bound = model.bind(on_events=True)
        loop = (bound.num_steps, 16, 3, as_resampler("systematic"), 2.0, generator(3))
        return smc_loop(engine_of(bound), *loop)

    late, plain = run(LateLooks), run(Plainly)
    assert torch.equal(late.log_evidence_steps, plain.log_evidence_steps)
    assert torch.equal(late.ancestors, plain.ancestors)
    assert torch.equal(late.carry["tokens"], plain.carry["tokens"])
    assert bool(late.resampled.any())


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("twist", TWISTS, ids=named)
def test_all_doors_lead_to_one_run(twist, every):
    chain, potential, _ = problem("uniform")
    model = FeynmanKac(chain, potential, twist, twist_every=every)
    torch.manual_seed(5)
    direct = run_smc(model, 8, 2)
    options = {"num_particles": 8, "num_runs": 2}
    methods = {"smc": {"twist_every": every}, "steering": {"every": every}}
    if every > 1:
        methods["steering"]["interval"] = (every, STEPS)
    for method, own in methods.items():
        torch.manual_seed(5)
        result = SMC(chain, potential, method=method, twist=twist, **own, **options).run()
        assert torch.equal(result.log_evidence, direct.log_evidence)
        assert torch.equal(result.x0, direct.x0)
        assert result.settings["twist"] == twist.name
        assert result.num_evaluations == direct.num_evaluations
        assert result.num_potential_calls == direct.num_potential_calls


@pytest.mark.parametrize("kind", ["max", "sum", "add"])
def test_other_kinds_of_steering_are_paid_for(kind):
    """Within 4 standard errors of 3,000 runs: false alarm 6e-5 each."""
    chain, potential, z = problem("absorbing", scale=0.7)
    options = {"kind": kind, "twist": ArgmaxFill(late=True), "num_particles": 4, "num_runs": 3000}
    estimates = SMC(chain, potential, method="steering", **options).run(seed=2).log_evidence.exp()
    assert abs(float(estimates.mean()) - z) < 4 * float(estimates.std()) / 3000**0.5


class Meeting(Wrapper):
    """A network, and a reward that for step ``k`` waits until the network saw step ``k + 1``."""

    def __init__(self, denoiser, num_steps):
        self.denoiser, self.num_steps = denoiser, num_steps
        self.calls, self.met, self.changed = 0, [], threading.Condition()
        self.adopt(denoiser, "conditions")

    def __call__(self, tokens, t, /, **given):
        with self.changed:
            self.calls += 1
            self.changed.notify_all()
        return self.denoiser(tokens, t, **given)

    def reward(self, x0):
        with self.changed:
            is_look, wanted = len(self.met) < self.num_steps - 1, len(self.met) + 2
            met = not is_look or self.changed.wait_for(lambda: self.calls >= wanted, 20.0)
            self.met.append(met)
        return (x0 == 1).sum(-1).double()


def test_the_network_is_asked_while_scores_are_computed():
    chain = toy_chain("uniform", length=6, num_steps=4)
    meeting = Meeting(chain.kernel.denoiser, 4)
    chain = ReverseChain(chain.kernel.with_denoiser(meeting), 6)
    with ThreadPoolExecutor(1) as pool:
        reward = Reward(meeting.reward, executor=pool, batch_size=10_000) * 2.0
        potential = reward + ForbiddenMotif("AAA", both_strands=False)
        method = {"method": "smc", "twist": ArgmaxFill(late=True)}
        beside = SMC(chain, potential, num_particles=32, **method).run(seed=0)
    assert len(meeting.met) == 4
    assert all(meeting.met)
    in_turn = Reward(lambda x0: (x0 == 1).sum(-1).double()) * 2.0
    potential = in_turn + ForbiddenMotif("AAA", both_strands=False)
    alone = SMC(chain, potential, num_particles=32, **method).run(seed=0)
    assert torch.equal(beside.log_evidence, alone.log_evidence)
    assert torch.equal(beside.x0, alone.x0)
    assert list(beside.settings["rewards"]) == ["reward"]
    assert list(alone.settings["rewards"]) == ["<lambda>"]


@pytest.mark.parametrize("method", ["twisted", "soft-value", "beam"])
def test_other_methods_refuse(method):
    chain, potential, _ = problem("absorbing")
    with pytest.raises(CapabilityError, match=r"late=True is for 'smc' and 'steering'"):
        SMC(chain, potential, method=method, twist=ArgmaxFill(late=True)).run(seed=0)


def test_programs_and_conditional_smc_refuse():
    chain, potential, _ = problem("absorbing")

    def program():
        x = pyro.sample("x", chain)
        factor("g", potential, chain.x0(x))

    with pytest.raises(CapabilityError, match=r"late=True is for 'smc' and 'steering'"):
        SMC(program, twist=ArgmaxFill(late=True)).run(seed=0)
    with pytest.raises(CapabilityError, match=r"use a twist without late=True"):
        ParticleGibbs(chain, potential, twist=ArgmaxFill(late=True))
    model = FeynmanKac(chain, potential, ArgmaxFill(late=True))
    with pytest.raises(CapabilityError, match=r"use a twist without late=True"):
        conditional_smc(model, chain.sample((2,)), num_particles=4)
