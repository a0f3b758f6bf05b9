"""steer changes the proposal and never the model."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Importance

from ppl_diffusion.errors import CapabilityError, PotentialError
from ppl_diffusion.handlers import Steering, log_weight, steer
from ppl_diffusion.potentials import Potential
from ppl_diffusion.testing.oracles import ExactChain, z_score
from ppl_diffusion.testing.toys import counted, toy_chain, toy_potential

GOAL = toy_potential(3, 2, scale=1.5)
WRONG = 0.5 * toy_potential(3, 2, seed=9, scale=2.0)
GUIDES = {
    "useless": Potential(lambda x0: torch.zeros(x0.shape[:-1])),
    "half": 0.5 * GOAL,
    "exact": GOAL,
    "adversarial": Potential(lambda x0: -GOAL(x0)),
}


def program(chain, guide_hint=None, plates=()):
    """The model keeps its own factor, whatever steers its site."""
    infer = {} if guide_hint is None else {"steer": guide_hint}
    path = pyro.sample("path", chain.expand(plates), infer=infer)
    pyro.factor("goal", GOAL(chain.x0(path)))
    return path


def importance_weights(marginal):
    return torch.stack([torch.as_tensor(w) for w in marginal.log_weights]).exp()


@pytest.mark.parametrize("process", ["absorbing", "uniform"])
@pytest.mark.parametrize("guide", GUIDES)
@pytest.mark.parametrize("num_particles", [1, 4])
def test_wrong_guidance_costs_variance_never_correctness(process, guide, num_particles):
    # 4 s.e. of 3000 independent weights: false alarm about 6e-5 each, 16 cases.
    chain = toy_chain(process)
    steered = steer(program, potential=GUIDES[guide], num_particles=num_particles)
    with pyro.plate("independent", 3000):
        trace = poutine.trace(steered).get_trace(chain)
    site = trace.nodes["path"]["fn"]
    weights = (site.draw.log_weight + GOAL(chain.x0(trace.nodes["path"]["value"]))).exp()
    assert abs(z_score(weights, ExactChain.of(chain).evidence(GOAL))) < 4


def test_the_weight_is_what_makes_it_right():
    # Power: the same draws without their weights miss the evidence by far.
    chain = toy_chain()
    with pyro.plate("independent", 3000):
        trace = poutine.trace(steer(program, potential=GOAL, num_particles=8)).get_trace(chain)
    unweighted = GOAL(chain.x0(trace.nodes["path"]["value"])).exp()
    assert abs(z_score(unweighted, ExactChain.of(chain).evidence(GOAL))) > 10


def test_plain_importance_sampling_agrees():
    chain, exact = toy_chain(), ExactChain.of(toy_chain())
    plain = Importance(program, num_samples=400).run(chain)
    steered = Importance(steer(program, potential=0.7 * GOAL, twist="argmax"), num_samples=400).run(
        chain
    )
    for marginal in (plain, steered):  # 4 s.e. each
        assert abs(z_score(importance_weights(marginal), exact.evidence(GOAL))) < 4
    assert importance_weights(steered).std() < 0.5 * importance_weights(plain).std()


def test_a_steered_guide_of_its_own_gives_the_same_answer():
    chain = toy_chain()

    def guide(chain):
        with steer(potential=GOAL, num_particles=4, twist="argmax"):
            pyro.sample("path", chain)

    marginal = Importance(program, guide, num_samples=300).run(chain)
    assert abs(z_score(importance_weights(marginal), ExactChain.of(chain).evidence(GOAL))) < 4


def test_scoring_a_draw_calls_no_network_again():
    chain, counter = counted(toy_chain(num_steps=3))
    trace = poutine.trace(steer(program, potential=GOAL, num_particles=4)).get_trace(chain)
    before = counter.calls
    replayed = poutine.trace(poutine.replay(program, trace=trace)).get_trace(chain)
    replayed.log_prob_sum()
    assert counter.calls == before


def test_log_weight_of_a_trace():
    chain = toy_chain()
    torch.manual_seed(3)
    steered = steer(program, potential=GOAL, num_particles=4, twist="argmax")
    weights = torch.stack(
        [log_weight(poutine.trace(steered).get_trace(chain)) for _ in range(300)]
    ).exp()
    assert abs(z_score(weights, ExactChain.of(chain).evidence(GOAL))) < 4


def test_log_weight_refuses_a_replayed_trace():
    chain = toy_chain()
    steered = steer(program, potential=GOAL, num_particles=4)
    trace = poutine.trace(steered).get_trace(chain)
    replayed = poutine.trace(poutine.replay(steered, trace=trace)).get_trace(chain)
    with pytest.raises(ValueError, match="'path' did not draw its own value"):
        log_weight(replayed)


def test_hint_takes_precedence_and_no_hint_is_left_alone():
    chain = toy_chain()
    hint = Steering(potential=WRONG, num_particles=2)
    trace = poutine.trace(steer(program, potential=GOAL)).get_trace(chain, hint)
    assert trace.nodes["path"]["fn"].steering is hint
    trace = poutine.trace(steer(program)).get_trace(chain, hint)
    assert trace.nodes["path"]["fn"].steering is hint
    with pytest.raises(ValueError, match="no reverse-chain site was met"):
        poutine.trace(steer(program)).get_trace(chain)


def test_observed_paths_are_scored_by_the_model():
    chain = toy_chain()
    path = chain.sample()

    def observed(chain):
        pyro.sample("path", chain, obs=path)
        pyro.sample("other", chain)

    trace = poutine.trace(steer(observed, potential=GOAL, num_particles=2)).get_trace(chain)
    assert trace.nodes["path"]["fn"] is chain


def test_density_of_other_paths_is_refused():
    chain = toy_chain()
    trace = poutine.trace(steer(program, potential=GOAL, num_particles=2)).get_trace(chain)
    site = trace.nodes["path"]["fn"]
    other = site.draw.path.clone()
    other[-1] = (other[-1] + 1) % 3
    with pytest.raises(CapabilityError, match="its own draw only"):
        site.log_prob(other)


def test_a_dead_run_has_weight_zero_and_is_warned_about():
    chain = toy_chain()
    nothing = Potential(lambda x0: torch.full(x0.shape[:-1], -torch.inf), name="nothing")
    with pytest.warns(UserWarning, match="excludes sequences"):
        trace = poutine.trace(steer(program, potential=nothing)).get_trace(chain)
    assert log_weight(trace) == -torch.inf
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        poutine.trace(steer(program, potential=nothing, excludes=True)).get_trace(chain)


def test_meant_exclusions_estimate_the_probability_of_what_is_allowed():
    chain = toy_chain()
    allowed = Potential(lambda x0: torch.where(x0[..., 0] == x0[..., 1], 0.0, -torch.inf))

    def constrained(chain):
        path = pyro.sample("path", chain)
        pyro.factor("allowed", allowed(chain.x0(path)))

    steered = steer(constrained, potential=allowed, num_particles=8, excludes=True)
    with pyro.plate("independent", 2000):
        trace = poutine.trace(steered).get_trace(chain)
    weights = trace.nodes["path"]["fn"].draw.log_weight.exp()
    assert abs(z_score(weights, ExactChain.of(chain).evidence(allowed))) < 4


def test_program_plates_are_independent_runs():
    chain = toy_chain()

    def plated(chain):
        with pyro.plate("sequences", 3):
            path = pyro.sample("path", chain)
            pyro.sample(
                "y", dist.Normal((chain.x0(path) == 0).sum(-1).double(), 1.0), obs=torch.ones(3)
            )

    trace = poutine.trace(steer(plated, potential=GOAL, num_particles=4)).get_trace(chain)
    assert trace.nodes["path"]["value"].shape == (3, 4, 2)
    assert trace.nodes["path"]["fn"].draw.log_weight.shape == (3,)


def test_the_handler_stack_is_clean_after_an_error():
    def broken(x0):
        raise RuntimeError("reward is down")

    chain = toy_chain()
    with pytest.raises(PotentialError, match="reward is down"):
        poutine.trace(steer(program, potential=broken)).get_trace(chain)
    trace = poutine.trace(program).get_trace(chain)
    assert trace.nodes["path"]["fn"] is not None
    assert not hasattr(trace.nodes["path"]["fn"], "steering")
