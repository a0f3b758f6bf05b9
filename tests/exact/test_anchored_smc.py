"""Anchored moves with exact weights, held to enumeration on four sites of four codes.

Evidences are held at four standard errors over 400 runs: false-alarm rate 6e-5
each, below one in five hundred for the file, once, at the fixed seeds.
"""

import math
from functools import cache

import pyro
import pytest
import torch

from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.handlers import clamp, twist
from ppl_diffusion.inference import (
    SMC,
    AnchoredProposal,
    AnchoredSMC,
    Bootstrap,
    Guidance,
    QuantisedExpectation,
    Remask,
)
from ppl_diffusion.inference.anchored_guidance import Guided
from ppl_diffusion.inference.anchored_steps import PolicyStep, values_move
from ppl_diffusion.kernels import InterpolatingKernel, OrderedKernel
from ppl_diffusion.potentials import EmbeddedPotential, factor
from ppl_diffusion.smc import OrderRefresh
from ppl_diffusion.smc.path_state import PathModel
from ppl_diffusion.smc.reveals import RevealTable
from ppl_diffusion.testing import all_states
from ppl_diffusion.testing.anchored_toys import measured_toy
from ppl_diffusion.testing.oracles import (
    ExactChain,
    chi_square_p_value,
    total_variation,
    z_score,
)

LENGTH, SIZE = 4, 4
VARIANTS = ("independent", "policy", "values")
FLAT = EmbeddedPotential(lambda e: 0.0 * e.sum((-2, -1)), measured_toy().potential.codebook)


class Inconsistent:
    """The exact denoiser, but for a taste that depends on how much is masked."""

    kind, time_free, vocab_size = "cavity", True, SIZE

    def __init__(self, base):
        self.base = base

    def __call__(self, tokens, t):
        masks = (tokens == SIZE).double().sum(-1)[..., None, None]
        taste = torch.cos(torch.arange(SIZE) * (1 + masks))
        return torch.log_softmax(self.base(tokens, t) + 0.5 * taste, -1)


@cache
def toy(seed=0):
    return measured_toy(seed)


def ordered(problem, denoiser=None, **options):
    kernel = OrderedKernel(problem.process, denoiser or problem.denoiser, length=LENGTH, **options)
    return ReverseChain(kernel, LENGTH)


def on_a_grid(problem, num_steps=4):
    kernel = InterpolatingKernel(problem.process, problem.denoiser, num_steps=num_steps)
    return ReverseChain(kernel, LENGTH)


def chain_of(variant, problem):
    return on_a_grid(problem) if variant == "independent" else ordered(problem)


def evidence_of(variant, problem):
    """Evidence of the law that a variant is exact for."""
    if variant == "independent":
        return ExactChain.of(on_a_grid(problem)).evidence(problem.potential)
    return math.exp(problem.log_evidence)


def run(chain, potential, method, *, particles=200, runs=400, seed=1, **options):
    options = {"num_particles": particles, "num_runs": runs, "store_path": False} | options
    return SMC(chain, potential, method=method, **options).run(seed=seed)


def evidences(variant, problem, method=None, **options):
    method = method or AnchoredSMC(variant=variant)
    found = run(chain_of(variant, problem), problem.potential, method, **options)
    return found.log_evidence.exp()


def frequencies(problem, posterior):
    found = torch.zeros(len(problem.states), dtype=torch.float64)
    weights = posterior.pooled_log_weights.exp().flatten()
    return found.index_add_(0, problem.index(posterior.x0).flatten(), weights)


# Weights without data.


@pytest.mark.parametrize("variant", ["independent", "policy"])
def test_nothing_is_weighed_where_guide_and_data_are_flat(variant):
    method = AnchoredSMC(variant=variant, eps=1.0, tau=math.inf, twist=None)
    problem = toy()
    found = run(chain_of(variant, problem), FLAT, method, particles=8, runs=4)
    torch.testing.assert_close(found.log_weights, torch.full((4, 8), -math.log(8)).double())
    torch.testing.assert_close(found.log_evidence, torch.zeros(4).double())


@pytest.mark.parametrize("variant", VARIANTS)
def test_whatever_a_guide_does_weights_have_mean_one(variant):
    problem = toy()
    method = AnchoredSMC(variant=variant, guide=problem.potential, twist=None)
    found = run(chain_of(variant, problem), FLAT, method, particles=16, ess_threshold=0.0)
    assert float(found.log_evidence.std()) > 0.01
    assert abs(z_score(found.log_evidence.exp(), 1.0)) < 4


# Weights with data.


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_evidence(variant, seed):
    problem, size = toy(seed), 32 if seed else 200
    z = evidences(variant, problem, particles=size)
    assert abs(z_score(z, evidence_of(variant, problem))) < 4


TWISTS = [None, "defensive", "moments"]


@pytest.mark.parametrize("twist_name", TWISTS, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_look_aheads_leave_the_evidence(variant, twist_name):
    method = AnchoredSMC(variant=variant, twist=twist_name)
    z = evidences(variant, toy(), method, particles=64)
    assert abs(z_score(z, evidence_of(variant, toy()))) < 4


@pytest.mark.parametrize(
    "options",
    [
        {"expectation": QuantisedExpectation(num_iterations=0)},
        {"expectation": QuantisedExpectation(keep="last", learning_rate=1.0)},
        {"expectation": QuantisedExpectation(3, quantiser="gumbel")},
        {"expectation": QuantisedExpectation(3, warm_start=0.3)},
        {"expectation": QuantisedExpectation(5, inner="cavi")},
        {"lam": 0.9, "eps": 0.05, "delta": 0.05},
        {"tau": 0.2, "score": "neg-entropy", "temperature": 3.0},
        {"score": "anchor", "floor": 0.0, "num_children": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_bad_inner_loop_costs_variance_alone(variant, options):
    method = AnchoredSMC(variant=variant, **options)
    z = evidences(variant, toy(), method, particles=16)
    assert abs(z_score(z, evidence_of(variant, toy()))) < 4


@pytest.mark.parametrize("variant", VARIANTS)
def test_particles_have_the_posterior(variant):
    """Total variation of pooled particles; bootstrap particles are at .05 to .07."""
    problem = toy()
    law = problem.posterior
    if variant == "independent":
        law = ExactChain.of(on_a_grid(problem)).posterior(problem.potential)
    found = run(chain_of(variant, problem), problem.potential, AnchoredSMC(variant=variant))
    assert total_variation(frequencies(problem, found), law) < 0.03
    assert found.exact


def test_the_law_of_a_grid_is_another_one():
    """Negative control: the evidence of ``p_T`` is 1.332 times that of ``p``."""
    problem = toy()
    ratio = evidence_of("independent", problem) / math.exp(problem.log_evidence)
    assert ratio == pytest.approx(1.332, abs=5e-4)
    z = evidences("independent", problem)
    assert z_score(z, math.exp(problem.log_evidence)) > 8


class Forgets(AnchoredSMC):
    """Weighs tokens alone, where sites were picked by their tokens."""

    def _move(self, step, guided, generator):
        conf = guided.log_c / self.tau
        picked = values_move(step, guided.log_c, conf, self.delta, generator)
        return picked.value, picked.log_tokens


def test_picks_by_value_must_be_paid_for():
    """Negative control: without the order ratio the evidence is .593 of what it is."""
    problem, last = toy(), QuantisedExpectation(keep="last")
    method = Forgets(variant="values", delta=0.0, tau=0.5, expectation=last)
    z = evidences("values", problem, method)
    assert float(z.mean()) / math.exp(problem.log_evidence) == pytest.approx(0.593, abs=0.02)
    assert z_score(z, math.exp(problem.log_evidence)) < -20


def test_the_twist_buys_more_than_the_tokens():
    """With the inner loop of the table that says so: straight through, without the prior."""
    problem, own = toy(), {"variant": "policy", "expectation": QuantisedExpectation()}
    sizes = {}
    for name, method in {
        "bootstrap": Bootstrap(twist=None),
        "tokens": AnchoredSMC(twist=None, num_children=1, **own),
        "twist": AnchoredSMC(num_children=1, **own),
        "ends": AnchoredSMC(**own),
    }.items():
        found = run(ordered(problem), problem.potential, method, runs=100)
        sizes[name] = float((-(2 * found.log_weights).logsumexp(-1)).exp().mean()) / 200
    assert sizes["tokens"] > sizes["bootstrap"]
    assert sizes["twist"] > 3 * sizes["tokens"]
    assert sizes["ends"] > 1.1 * sizes["twist"]


def test_several_reveals_at_once_have_the_law_of_the_chain():
    """Two sites a step: ``p_unif`` of the chain for values, of a policy for the policy."""
    problem, chain = toy(), ordered(toy(), group_size=2)
    for variant, power in (("values", 0.0), ("policy", 1.0)):
        law = under_a_policy(0, 2, power)
        truth = float((law * problem.log_g.exp()).sum())
        found = run(chain, problem.potential, AnchoredSMC(variant=variant))
        assert abs(z_score(found.log_evidence.exp(), truth)) < 4


# The order of reveals.


STATES = all_states(SIZE + 1, LENGTH)
MASKS = (STATES == SIZE).sum(-1)


def law_of_policy(denoiser, count, scores):
    """Return the law of clean sequences under a policy, by following its steps, ``(256,)``."""
    law, log_d = (MASKS == LENGTH).double(), denoiser(STATES, 1.0)
    for left in range(LENGTH, 0, -count):
        here, there = left == MASKS, left - count == MASKS
        tokens = STATES[here][:, None]
        moves = PolicyStep(
            tokens, log_d[here][:, None], tokens == SIZE, scores[here][:, None], count
        )
        flow = law[here] @ moves.log_prob(STATES[there]).exp()
        law = torch.zeros_like(law).masked_scatter(there, flow)
    return law[MASKS == 0]


@cache
def scores_of(seed, denoiser, expectation):
    return Guidance(toy(seed).potential, expectation)(STATES, denoiser(STATES, 1.0)).scores


def under_a_policy(seed, count, power=1.0, denoiser=None, expectation=None):
    denoiser = denoiser or toy(seed).denoiser
    scores = scores_of(seed, denoiser, expectation or QuantisedExpectation())
    return law_of_policy(denoiser, count, power * scores)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("power", [0.0, 1.0, 3.0])
def test_no_policy_changes_the_law_one_site_at_a_time(power, seed):
    law = under_a_policy(seed, 1, power)
    assert float((law - toy(seed).log_prior.exp()).abs().max()) < 1e-12


def test_policies_change_the_law_of_two_sites_at_a_time():
    """The policy ``(max_v r)^3`` with the last table: total variation .222 to the prior."""
    law = under_a_policy(0, 2, 3.0, expectation=QuantisedExpectation(keep="last"))
    assert float(law.sum()) == pytest.approx(1.0, abs=1e-12)
    assert total_variation(law, toy().log_prior.exp()) == pytest.approx(0.222, abs=2e-3)


def test_an_inconsistent_denoiser_makes_the_law_depend_on_the_policy():
    problem = toy()
    denoiser = Inconsistent(problem.denoiser)
    laws = [under_a_policy(0, 1, power, denoiser) for power in (0.0, 1.0, 3.0)]
    assert total_variation(laws[0], laws[2]) > 0.01
    chain = ordered(problem, denoiser)
    for variant, law in (("values", laws[0]), ("policy", laws[1])):
        truth = float((law * problem.log_g.exp()).sum())
        found = run(chain, problem.potential, AnchoredSMC(variant=variant), particles=64)
        assert abs(z_score(found.log_evidence.exp(), truth)) < 4


# Guides of plain Pyro.


# Without quantisation there are no ties, which round-off decides differently in other batches.
GENTLE = measured_toy(sigma=1.5)
"""A few hundred draws estimate its evidence, which is what plain Pyro can make in seconds."""
GUIDANCE = Guidance(GENTLE.potential, QuantisedExpectation(3, quantiser="soft"))


@cache
def told():
    """What it says about every state, once."""
    return GUIDANCE(STATES, GENTLE.denoiser(STATES, 1.0))


class Remembered(Guidance):
    """Guidance that has been asked about every state before: plain Pyro asks one by one."""

    def __call__(self, tokens, log_d, given=None, **options):
        index = (tokens * (SIZE + 1) ** torch.arange(LENGTH - 1, -1, -1)).sum(-1)
        return Guided(log_d, *(x[index] for x in told()[1:]))


PROPOSAL = AnchoredProposal(Remembered(GUIDANCE.guide, GUIDANCE.expectation))


def site_by_site(chain, law):
    """Return a program that draws a chain step by step: by itself, or by what a guide makes of it.

    :param law: ``(step, carry, k) -> distribution`` of the next states.
    """

    def steps():
        carry = chain.start(())
        for k in range(chain.num_steps):
            step = chain.kernel.step(carry, k)
            value = pyro.sample(f"x_{k + 1}", law(step, carry, k))
            carry = chain.kernel.advance(carry, value, k, step=step)
        return carry["tokens"]

    return steps


def with_data(steps, potential):
    def program():
        factor("data", potential, steps())

    return program


def policies(tokens_of):
    """Return the law of a step whose sites a policy chose: with tokens of ``d`` or of ``c``."""

    def law(step, carry, k):
        moves = PROPOSAL(step, carry, k)
        return moves.with_log_probs(step.log_probs) if tokens_of == "d" else moves

    return law


@pytest.mark.parametrize("variant", ["independent", "policy", "order"])
def test_importance_sampling_by_a_guide_of_plain_pyro(variant):
    """Chain sites in model and guide; "order" weighs the policy against the model's own order."""
    problem = GENTLE
    chain = chain_of(variant, problem)
    own = policies("d") if variant == "policy" else lambda step, carry, k: step
    model = with_data(site_by_site(chain, own), problem.potential)
    guide = site_by_site(chain, PROPOSAL)
    with torch.no_grad():
        found = pyro.infer.Importance(model, guide, num_samples=200).run()
    weights = torch.stack([torch.as_tensor(w) for w in found.log_weights]).exp()
    assert abs(z_score(weights, evidence_of(variant, problem))) < 4


@pytest.mark.parametrize("variant", ["independent", "order"])
def test_a_twisted_program_has_the_same_evidence(variant):
    problem = GENTLE
    chain = chain_of(variant, problem)

    def program():
        factor("data", problem.potential, chain.x0(pyro.sample("path", chain)))

    guided = twist(program, proposal=PROPOSAL)
    with torch.no_grad():
        found = pyro.infer.Importance(guided, num_samples=200).run()
    weights = torch.stack([torch.as_tensor(w) for w in found.log_weights]).exp()
    assert abs(z_score(weights, evidence_of(variant, problem))) < 4


@pytest.mark.parametrize("variant", ["independent", "policy"])
def test_weights_are_those_of_model_and_guide(variant):
    problem = GENTLE
    chain = chain_of(variant, problem)
    own = policies("d") if variant == "policy" else lambda step, carry, k: step
    method = AnchoredSMC(
        variant=variant, twist=None, expectation=GUIDANCE.expectation, num_children=1
    )
    found = run(
        chain, problem.potential, method, particles=6, runs=1, store_path=True, ess_threshold=0.0
    )
    for particle, path in enumerate(found.path[0].long()):
        known = {f"x_{k}": state for k, state in enumerate(path)}
        parts = []
        for law in (own, AnchoredProposal(GUIDANCE)):
            steps = pyro.condition(site_by_site(chain, law), data=known)
            trace = pyro.poutine.trace(steps).get_trace()
            parts.append(trace.log_prob_sum())
        log_w = parts[0] - parts[1] + problem.potential(path[-1])
        own_w = found.log_weights[0, particle] + found.log_evidence[0] + math.log(6)
        torch.testing.assert_close(own_w, log_w, rtol=0, atol=1e-9)


# Prompts, clamps, latents, plates.


@pytest.mark.parametrize("variant", VARIANTS)
def test_prompts(variant):
    problem, prompt = toy(), torch.tensor([-1, 3, -1, -1])
    kernel = chain_of(variant, problem).kernel
    chain = ReverseChain(kernel, LENGTH, prompt=prompt)
    fits = problem.states[:, 1] == 3
    prior = torch.where(fits, problem.log_prior.exp(), 0.0)
    prior = prior / prior.sum()
    if variant == "independent":
        prior = ExactChain.of(chain).x0_law()
    truth = float((prior * problem.log_g.exp()).sum())
    found = run(chain, problem.potential, AnchoredSMC(variant=variant), particles=32)
    assert bool((found.x0[..., 1] == 3).all())
    assert abs(z_score(found.log_evidence.exp(), truth)) < 4


@pytest.mark.parametrize("variant", VARIANTS)
def test_clamps_and_latents_of_programs(variant):
    """A gain before the sequence and a held token; the guide takes the gain to be one."""
    problem = toy()
    chain, gains = chain_of(variant, problem), torch.tensor([0.5, 1.0]).double()

    def log_g(gain, x):
        return gain * problem.potential(x)

    def program():
        level = pyro.sample("level", pyro.distributions.Categorical(torch.tensor([0.4, 0.6])))
        x = chain.x0(pyro.sample("path", chain))
        pyro.factor("data", log_g(gains[level], x))

    held = clamp(
        program, tokens=torch.tensor([0, 0, 3, 0]), mask=torch.tensor([False, False, True, False])
    )
    prior = problem.log_prior.exp()
    if variant == "independent":
        prior = ExactChain.of(chain).x0_law()
    prior = torch.where(problem.states[:, 2] == 3, prior, 0.0)
    truth = sum(
        float(share * (prior * log_g(gain, problem.states).exp()).sum())
        for share, gain in zip((0.4, 0.6), gains, strict=True)
    )
    method = AnchoredSMC(variant=variant, guide=problem.potential)
    found = run(held, None, method, particles=32, runs=200)
    assert bool((found.x0[..., 2] == 3).all())
    assert abs(z_score(found.log_evidence.exp(), truth)) < 4


@pytest.mark.parametrize("variant", VARIANTS)
def test_plates(variant):
    problem = toy()
    chain = chain_of(variant, problem).expand((2,))
    found = run(chain, problem.potential, AnchoredSMC(variant=variant), particles=64, runs=200)
    assert abs(z_score(found.log_evidence.exp(), evidence_of(variant, problem) ** 2)) < 4


# Masking again.


def transitions(problem, denoiser):
    """Return the transition matrix of the move anywhere, ``(256, 256)``."""
    move = Remask(Guidance(problem.potential), where="anywhere")
    chain = ordered(problem, denoiser)
    states, count = problem.states, len(problem.states)
    path = any_path(states)
    model = PathModel(chain, lambda x: problem.potential(x))
    table = RevealTable.of(model, model.state(path[None]))
    matrix = torch.zeros(count, count, dtype=torch.float64)
    for site in range(LENGTH):
        laws = move.laws(table, torch.full((count,), site))
        for token in range(SIZE):
            other = states.clone()
            other[:, site] = token
            to, old = problem.index(other), states[:, site, None]
            ratio = (laws.log_d - laws.log_c)[:, token]
            ratio = ratio - (laws.log_d - laws.log_c).gather(-1, old)[:, 0]
            ratio = ratio + problem.log_g[to] - problem.log_g
            flow = laws.log_c[:, token].exp() * ratio.exp().clamp_max(1) / LENGTH
            matrix[torch.arange(count), to] += torch.where(to == torch.arange(count), 0.0, flow)
    return matrix + torch.diag(1 - matrix.sum(-1))


def any_path(x0):
    """Return paths that end in sequences, revealed from left to right."""
    steps = torch.arange(LENGTH + 1)[:, None]
    return torch.where(steps > torch.arange(LENGTH), x0[..., None, :], SIZE)


def test_masking_anywhere_leaves_the_posterior_of_a_consistent_denoiser():
    problem = toy()
    off = problem.posterior @ transitions(problem, problem.denoiser) - problem.posterior
    assert float(off.abs().max()) < 1e-12


def test_masking_anywhere_does_not_for_an_inconsistent_one():
    problem = toy()
    moves = transitions(problem, Inconsistent(problem.denoiser))
    assert float((problem.posterior @ moves - problem.posterior).abs().max()) > 1e-3


def all_paths():
    """Return every path of one reveal per step, ``(6144, 5, 4)``."""
    orders = torch.cartesian_prod(*[torch.arange(LENGTH)] * LENGTH)
    orders = orders[(orders.sort(-1).values == torch.arange(LENGTH)).all(-1)]
    steps = torch.arange(LENGTH + 1)[:, None]
    paths = torch.where(steps > orders[:, None, None], toy().states[None, :, None], SIZE)
    return paths.flatten(0, 1)


@pytest.mark.parametrize("where", ["last", "anywhere"])
@pytest.mark.parametrize("exact", [True, False])
def test_what_a_move_leaves_alone(where, exact):
    """Posterior paths in, one move, chi-square of the sequences out; false alarm 1e-4 each."""
    problem, paths = toy(), all_paths()
    denoiser = problem.denoiser if exact else Inconsistent(problem.denoiser)
    chain = ordered(problem, denoiser)
    law = torch.softmax(chain.log_prob(paths) + problem.potential(paths[:, -1]), 0)
    drawn = paths[torch.multinomial(law, 60_000, replacement=True)]
    model = PathModel(chain, lambda x: problem.potential(x))
    move = Remask(Guidance(problem.potential), where=where)
    after, accepted = move(model, model.state(drawn[None]))
    ends = torch.zeros(256, dtype=torch.float64)
    ends.index_add_(0, problem.index(paths[:, -1]), law)
    counts = torch.bincount(problem.index(after.x0[0]), minlength=256)
    p = chi_square_p_value(*pooled(counts, ends))
    assert 0.2 < float(accepted.double().mean()) < 0.95
    assert move.exact == (where == "last")
    assert (p > 1e-4) == (exact or where == "last")


def test_sites_that_were_revealed_together_do_not_see_each_other():
    """The last step shows two tokens at once: predictions are those of the state before it."""
    problem = toy()
    chain = ordered(problem, Inconsistent(problem.denoiser), group_size=2)
    first = torch.combinations(torch.arange(LENGTH), 2)
    early = torch.zeros(len(first), LENGTH, dtype=torch.bool).scatter(1, first, True)
    half = torch.where(early[:, None], problem.states, SIZE)
    ends = problem.states.expand_as(half)
    paths = torch.stack([torch.full_like(half, SIZE), half, ends], -2).flatten(0, 1)
    law = torch.softmax(chain.log_prob(paths) + problem.potential(paths[:, -1]), 0)
    drawn = paths[torch.multinomial(law, 60_000, replacement=True)]
    model = PathModel(chain, lambda x: problem.potential(x))
    after, accepted = Remask(Guidance(problem.potential))(model, model.state(drawn[None]))
    expected = torch.zeros(256, dtype=torch.float64)
    expected.index_add_(0, problem.index(paths[:, -1]), law)
    counts = torch.bincount(problem.index(after.x0[0]), minlength=256)
    assert chi_square_p_value(*pooled(counts, expected)) > 1e-4  # false alarm
    assert 0.2 < float(accepted.double().mean()) < 0.95


def pooled(counts, law):
    """Return counts with rare sequences together, so that every cell expects a few."""
    rare = law * counts.sum() < 5
    return (
        torch.cat([counts[~rare], counts[rare].sum()[None]]),
        torch.cat([law[~rare], law[rare].sum()[None]]),
    )


def test_a_move_scores_what_it_renews():
    """What it remembers of the reveals is what the chain says of the whole path."""
    problem = toy()
    chain = ordered(problem, Inconsistent(problem.denoiser))
    model = PathModel(chain, lambda x: problem.potential(x))
    state = model.state(chain.sample((1, 50)))
    order = OrderRefresh()
    for _ in range(3):
        state, _ = order(model, state)
        state, _ = Remask(Guidance(problem.potential))(model, state)
    assert state.log_c is not None
    whole = state.log_c.sum(-1) - math.lgamma(LENGTH + 1)
    torch.testing.assert_close(whole, chain.log_prob(state.path), rtol=0, atol=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
def test_moves_at_the_end_leave_what_weighted_particles_stand_for(variant):
    """``E[Z^ sum W f]`` with the sequences after two sweeps, for one function of them."""
    problem = toy()
    chain = chain_of(variant, problem)
    law = problem.log_prior.exp()
    if variant == "independent":
        law = ExactChain.of(chain).x0_law()
    value = (problem.states == 3).sum(-1).double()
    truth = float((law * problem.log_g.exp() * value).sum())
    method = AnchoredSMC(variant=variant, num_sweeps=2)
    found = run(chain, problem.potential, method, particles=16, runs=400)
    mean = found.expectation(lambda x0: (x0 == 3).sum(-1).double())
    assert found.exact
    assert abs(z_score(found.log_evidence.exp() * mean, truth)) < 4
    torch.testing.assert_close(found.log_potential, problem.potential(found.x0))


# Shapes and numbers.


def test_a_batch_is_what_its_rows_are_alone():
    problem = toy()
    guidance, rows = GUIDANCE, STATES[::37]
    log_d = problem.denoiser(rows, 1.0)
    together = guidance(rows, log_d)
    for row in range(len(rows)):
        alone = guidance(rows[row : row + 1], log_d[row : row + 1])
        torch.testing.assert_close(alone.log_c[0], together.log_c[row], rtol=0, atol=1e-9)
