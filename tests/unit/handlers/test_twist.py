"""twist changes how steps are proposed and never the model.

Evidences are held to enumeration at four standard errors: false-alarm rate 6e-5 each, about 30
comparisons, once, at the fixed seeds.
"""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Importance

from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.handlers import (
    GradientProposal,
    LogitsProposal,
    clamp,
    log_weight,
    steer,
    twist,
)
from ppl_diffusion.inference import SMC, BeamSearch, Corrector, FKSteering, Tempering
from ppl_diffusion.kernels import OrderedKernel
from ppl_diffusion.testing.oracles import ExactChain, z_score
from ppl_diffusion.testing.toys import CountingDenoiser, toy_chain, toy_potential

GOAL = toy_potential(3, 2, scale=1.5)
TABLE = torch.randn(2, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
LINEAR = torch.randn(2, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def first_order(scale):
    """Tilt each site by the mean of the potential over the other, which is half of the truth."""

    def logits(carry, log_probs, k):
        grid = torch.cartesian_prod(torch.arange(3), torch.arange(3))
        table = GOAL(grid).reshape(3, 3)
        return scale * torch.stack([table.mean(1), table.mean(0)]).expand_as(log_probs)

    return logits


LOGITS = {
    "zero": lambda carry, log_probs, k: torch.zeros_like(log_probs),
    "half": first_order(0.5),
    "whole": first_order(1.0),
    "adversarial": first_order(-1.0),
    "of the step": lambda carry, log_probs, k: 0.3 * TABLE * k,
}


def program(chain, plates=()):
    path = pyro.sample("path", chain.expand(plates))
    pyro.factor("goal", GOAL(chain.x0(path)))
    return path


def weights_of(handled, chain, num=3000):
    """Importance weights of independent draws, all at once as a plate."""
    with pyro.plate("independent", num):
        trace = poutine.trace(handled).get_trace(chain)
    site = trace.nodes["path"]
    return (site["fn"].draw.log_weight + GOAL(chain.x0(site["value"]))).exp()


@pytest.mark.parametrize("process", ["absorbing", "uniform", "skewed"])
@pytest.mark.parametrize("logits", LOGITS)
def test_wrong_twists_cost_variance_never_correctness(process, logits):
    chain = toy_chain(process)
    weights = weights_of(twist(program, logits=LOGITS[logits]), chain)
    assert abs(z_score(weights, ExactChain.of(chain).evidence(GOAL))) < 4


def test_the_weight_is_what_makes_it_right():
    """The failing twin: the same draws as if they were the chain's own."""
    chain = toy_chain()
    with pyro.plate("independent", 3000):
        trace = poutine.trace(twist(program, logits=LOGITS["whole"])).get_trace(chain)
    unweighted = GOAL(chain.x0(trace.nodes["path"]["value"])).exp()
    assert abs(z_score(unweighted, ExactChain.of(chain).evidence(GOAL))) > 10


def test_good_twists_are_better_than_bad_ones():
    chain = toy_chain()
    spread = [weights_of(twist(program, logits=LOGITS[n]), chain).var() for n in LOGITS]
    zero, half, _, adversarial, _ = spread
    assert half < 0.9 * zero
    assert zero < 0.5 * adversarial


@pytest.mark.parametrize("process", ["absorbing", "uniform"])
@pytest.mark.parametrize("scale", [1.0, -1.0])
def test_gradients_are_a_proposal(process, scale):
    chain = toy_chain(process)
    gradient = GradientProposal(lambda soft: (soft * LINEAR).sum((-2, -1)), scale=scale)
    weights = weights_of(twist(program, proposal=gradient), chain)
    assert abs(z_score(weights, ExactChain.of(chain).evidence(GOAL))) < 4
    assert 0 < gradient.num_calls < 3 * 3000  # distinct states only


def test_plain_importance_sampling_agrees():
    chain = toy_chain()
    handled = twist(program, logits=LOGITS["whole"])
    marginal = Importance(handled, num_samples=150).run(chain)
    weights = torch.stack([torch.as_tensor(w) for w in marginal.log_weights]).exp()
    assert abs(z_score(weights, ExactChain.of(chain).evidence(GOAL))) < 4


def test_log_weight_of_a_trace():
    chain = toy_chain()
    handled = twist(program, logits=LOGITS["whole"])
    weights = torch.stack([log_weight(poutine.trace(handled).get_trace(chain)) for _ in range(150)])
    assert abs(z_score(weights.exp(), ExactChain.of(chain).evidence(GOAL))) < 4


@pytest.mark.parametrize("steer_inside", [False, True])
@pytest.mark.parametrize("logits", ["whole", "adversarial"])
def test_particles_of_a_steered_site_move_by_the_twist(logits, steer_inside):
    chain = toy_chain()
    how, psi = {"potential": GOAL, "num_particles": 4}, LOGITS[logits]
    both = (
        twist(steer(program, **how), logits=psi)
        if steer_inside
        else steer(twist(program, logits=psi), **how)
    )
    weights = weights_of(both, chain, 2000)
    assert abs(z_score(weights, ExactChain.of(chain).evidence(GOAL))) < 4
    if logits == "whole":
        alone = weights_of(steer(program, potential=GOAL, num_particles=4), chain, 2000)
        assert weights.var() < alone.var()


@pytest.mark.parametrize("steered", [False, True])
@pytest.mark.parametrize("clamp_inside", [False, True])
def test_clamped_tokens_stay_clamped(steered, clamp_inside):
    chain = toy_chain()
    held = {"tokens": torch.tensor([1, 0]), "mask": torch.tensor([True, False])}
    inner = steer(program, potential=GOAL, num_particles=2) if steered else program
    handled = (
        twist(clamp(inner, **held), logits=LOGITS["whole"])
        if clamp_inside
        else clamp(twist(inner, logits=LOGITS["whole"]), **held)
    )
    weights = weights_of(handled, chain, 2000)
    exact = ExactChain.of(chain)
    x0 = exact.states[exact.clean]
    z = float((exact.x0_law() * GOAL(x0).exp())[x0[:, 0] == 1].sum())
    assert abs(z_score(weights, z)) < 4


class Counted:
    """Logits that count how often they are asked."""

    def __init__(self, name):
        self.logits, self.calls = LOGITS[name], 0

    def __call__(self, carry, log_probs, k):
        self.calls += 1
        return self.logits(carry, log_probs, k)


USERS = {
    "smc": {},
    "importance-sampling": {},
    "steering": {},
    "soft-value": {"num_children": 2},
    "twisted": {"surprise": True},
}


@pytest.mark.parametrize("logits", ["whole", "adversarial"])
@pytest.mark.parametrize("user", USERS)
def test_inference_programs_move_by_the_twist_and_keep_the_target(user, logits):
    chain, counted = toy_chain(), Counted(logits)
    twisted, options = twist(program, logits=counted), USERS[user]
    method = SMC(twisted, method=user, num_particles=16, num_runs=200, **options)
    for seed in (1, 2):
        before = counted.calls
        posterior = method.run(chain, seed=seed)
        assert counted.calls - before >= chain.num_steps
    z_hat = posterior.log_evidence.exp()
    assert abs(z_score(z_hat, ExactChain.of(chain).evidence(GOAL))) < 4
    assert posterior.settings["proposal"] == "LogitsProposal"


def test_a_good_twist_helps_an_inference_program():
    chain = toy_chain()
    spread = {
        name: SMC(model, method="importance-sampling", num_particles=8, num_runs=500)
        .run(chain, seed=0)
        .log_evidence.exp()
        .var()
        for name, model in (("plain", program), ("good", twist(program, logits=LOGITS["whole"])))
    }
    assert spread["good"] < spread["plain"]


def test_methods_that_cannot_use_a_twist_refuse_it():
    chain, twisted = toy_chain(), twist(program, logits=LOGITS["half"])
    for kind in (BeamSearch, Corrector, Tempering):
        with pytest.raises(CapabilityError, match=f"{kind.__name__} moves particles its own way"):
            SMC(twisted, method=kind()).run(chain)
    with pytest.raises(CapabilityError, match="is twisted, and a proposal is given besides"):
        SMC(twisted, method=FKSteering(proposal=LogitsProposal(LOGITS["half"]))).run(chain)


def test_a_twisted_site_need_not_be_alone():
    def two(chain):
        pyro.sample("other", chain)
        program(chain)

    chain, counted = toy_chain(), Counted("half")
    model = twist(two, logits=counted, sites=["path"])
    posterior = SMC(model, method="steering", num_particles=16, num_runs=200).run(chain, seed=0)
    assert counted.calls == chain.num_steps
    evidence = ExactChain.of(chain).evidence(GOAL)
    assert abs(z_score(posterior.log_evidence.exp(), evidence)) < 4


@pytest.mark.parametrize(
    "between", [lambda model: model, lambda model: steer(model, potential=GOAL)]
)
def test_a_site_is_twisted_once(between):
    again = twist(between(twist(program, logits=LOGITS["half"])), logits=LOGITS["whole"])
    with pytest.raises(CapabilityError, match="'path' is twisted already"):
        again(toy_chain())


def test_scoring_a_given_path_is_the_models_business():
    chain = toy_chain()
    trace = poutine.trace(twist(program, logits=LOGITS["whole"])).get_trace(chain)
    path = trace.nodes["path"]["value"]
    replayed = poutine.trace(
        poutine.replay(twist(program, logits=LOGITS["whole"]), trace=trace)
    ).get_trace(chain)
    replayed.compute_log_prob()
    torch.testing.assert_close(replayed.nodes["path"]["log_prob"], chain.log_prob(path))
    other = path.clone()
    other[-1] = (other[-1] + 1) % 3
    with pytest.raises(CapabilityError, match="its own draw only"):
        trace.nodes["path"]["fn"].log_prob(other)


def test_observed_sites_and_other_sites_are_left_alone():
    chain = toy_chain()
    path = chain.sample()

    def two(chain):
        pyro.sample("seen", chain, obs=path)
        pyro.sample("free", chain)
        pyro.sample("other", chain)
        pyro.sample("z", dist.Normal(0.0, 1.0))

    handled = twist(two, logits=LOGITS["whole"], sites=["free"])
    nodes = poutine.trace(handled).get_trace(chain).nodes
    assert nodes["seen"]["fn"] is chain
    assert nodes["other"]["fn"] is chain
    assert hasattr(nodes["free"]["fn"], "twist")


def test_plates_are_independent():
    chain = toy_chain()
    with twist(logits=LOGITS["half"]):
        trace = poutine.trace(program).get_trace(chain, plates=(5,))
    assert trace.nodes["path"]["value"].shape == (5, 4, 2)
    assert trace.nodes["path"]["fn"].draw.log_weight.shape == (5,)


def test_twice_in_a_row_and_under_a_seed():
    chain = toy_chain()
    handled = twist(program, logits=LOGITS["half"])
    first, second = (poutine.trace(pyro.poutine.seed(handled, 3))(chain) for _ in range(2))
    assert torch.equal(first, second)


def test_misuse_says_why():
    chain = toy_chain()
    with pytest.raises(TypeError, match="exactly one of logits and proposal"):
        twist(program)
    with pytest.raises(TypeError, match="exactly one of logits and proposal"):
        twist(program, logits=LOGITS["half"], proposal=LogitsProposal(LOGITS["half"]))
    with pytest.raises(TypeError, match="logits must be a function, got int"):
        twist(program, logits=3)
    with pytest.raises(ValueError, match=r"no reverse-chain site named \['y'\] was met"):
        twist(program, logits=LOGITS["half"], sites=["y"])(chain)
    with pytest.raises(ValueError, match=r"logits must be finite and end in \(2, 3\)"):
        twist(program, logits=lambda carry, log_probs, k: torch.zeros(2))(chain)
    timed = CountingDenoiser(chain.kernel.denoiser)
    timed.time_free = False
    kernel = OrderedKernel(chain.kernel.process, timed, length=2, clock="sampled")
    with pytest.raises(CapabilityError, match="OrderedKernel is SAMPLE_ONLY"):
        twist(program, logits=LOGITS["half"])(ReverseChain(kernel, 2))
    # After all these errors nothing is left on the stack.
    assert type(poutine.trace(program).get_trace(chain).nodes["path"]["fn"]) is type(chain)
