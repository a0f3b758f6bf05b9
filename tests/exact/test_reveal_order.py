"""A learned order of the tokens, held to a sum over all the ways in which tokens can be revealed.

Given the codes, sites are revealed independently of each other and of what they hold, so that the
law of a sequence and its bound are averages over the steps at which its sites are. Probabilities
are worked out from odds here; no kernel, step or level is used. Estimates must lie within four
standard errors (one false alarm in 16 000 each), and seeds are fixed.
"""

import functools
import itertools
import math

import pyro
import pytest
import torch
from pyro import poutine

from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.handlers import unroll
from ppl_diffusion.inference import SMC
from ppl_diffusion.kernels import Absorbing, LatentKernel, Path, RevealOrder
from ppl_diffusion.models import LatentDiffusion
from ppl_diffusion.models.latent_order import estimated_cost
from ppl_diffusion.potentials import Potential
from ppl_diffusion.testing.dense import all_states
from ppl_diffusion.testing.latent_laws import LatentLaw
from ppl_diffusion.testing.latent_toys import LatentProblem, binary_saw, entropy, random_latents
from ppl_diffusion.testing.oracles import chi_square_p_value

TRIPLE = random_latents(2, 3, 3, seed=3, sharpness=1.5)
OTHER = random_latents(2, 3, 3, seed=4)
SLOTS = random_latents(2, 2, 2, 2, seed=5, sharpness=1.5)
CASES = {
    "two steps": (TRIPLE, Path.sequential(1, 2)),
    "three steps": (TRIPLE, Path.sequential(1, 3)),
    "two slots at once": (SLOTS, Path.sequential(1, 2)),
    "two slots in turn": (SLOTS, Path.sequential(2, 2)),
}


def order_for(problem, path, seed=0):
    steps = path.num_steps - path.first_token_step
    slots, codes = problem.latent.shape[1:]
    generator = torch.Generator().manual_seed(seed)
    shape = (slots, codes, steps - 1, problem.length)
    table = 1.5 * torch.randn(shape, generator=generator, dtype=torch.float64)
    return RevealOrder(table).requires_grad_(False)


def chances(order, codes):
    """Return the probabilities to be revealed, (steps, L): equal steps, their odds multiplied."""
    table, rows = order.table, []
    for k in range(order.token_steps - 1):
        equal = 1 / (order.token_steps - k)
        odds = equal / (1 - equal)
        for slot, code in enumerate(codes):
            odds = odds * table[slot, code, k].exp()
        rows.append(odds / (1 + odds))
    return torch.stack([*rows, torch.ones(order.length, dtype=torch.float64)])


def conditional(joint, site, x, known, codes):
    """Return ``p(x_site | x_known, c)`` by summing a table."""
    index = [x[j] if j in known or j == site else slice(None) for j in range(len(x))]
    above = joint[(*index, *codes)].sum()
    index[site] = slice(None)
    return float(above / joint[(*index, *codes)].sum())


def enumerated(joint, order):
    """Return ``p(x | c)`` and the cost of the tokens, tables of the shape of ``joint``."""
    law, cost, length = torch.zeros_like(joint), torch.zeros_like(joint), order.length
    for cell in itertools.product(*map(range, joint.shape)):
        x, codes = cell[:length], cell[length:]
        r, told = chances(order, codes), functools.cache(functools.partial(conditional, joint))
        at = [[r[k, i] * (1 - r[:k, i]).prod() for k in range(len(r))] for i in range(length)]
        for when in itertools.product(range(order.token_steps), repeat=length):
            chance, log_p = 1.0, 0.0
            for site, k in enumerate(when):
                chance = chance * at[site][k]
                known = tuple(j for j in range(length) if when[j] < k)
                log_p += math.log(told(site, x, known, codes))
            law[cell] += chance * math.exp(log_p)
            cost[cell] -= chance * log_p
    return law, cost


def chain_of(problem, path, order):
    codes = Absorbing(problem.latent.shape[-1])
    process = Absorbing(problem.vocab_size)
    kernel = LatentKernel(process, codes, problem.denoiser(), path, order=order)
    return ReverseChain(kernel, problem.length)


def law_of(problem, path, order):
    """Return the law of generated tokens and codes; the codes are drawn without an order."""
    first = Path.sequential(path.first_token_step, 1)
    codes = LatentLaw.of(problem, first).joint.sum(tuple(range(problem.length)))
    return codes * enumerated(problem.joint, order)[0]


def every_path(problem, path):
    """Return all paths of SEQ that end without holes, int64 ``(P, T + 1, L + N)``."""
    steps, first, histories = path.num_steps, path.first_token_step, []
    for site, size in enumerate(problem.joint.shape):
        span = range(first + 1, steps + 1) if site < problem.length else range(1, first + 1)
        moves = itertools.product(span, range(size))
        histories.append([[size] * k + [v] * (steps + 1 - k) for k, v in moves])
    return torch.tensor(list(itertools.product(*histories))).mT


def table_of(problem, paths, values):
    """Sum values of paths over what they end with."""
    table = torch.zeros_like(problem.joint)
    return table.index_put(tuple(paths[:, -1].unbind(-1)), values, accumulate=True)


@pytest.mark.parametrize("case", CASES)
def test_the_law_of_a_chain(case, generator):
    problem, path = CASES[case]
    order = order_for(problem, path)
    chain, paths = chain_of(problem, path, order), every_path(problem, path)
    probs = chain.log_prob(paths).exp()
    assert float(probs.sum()) == pytest.approx(1, abs=1e-12)
    law = law_of(problem, path, order)
    torch.testing.assert_close(table_of(problem, paths, probs), law, rtol=0, atol=1e-12)
    drawn = chain.sample((4000,), generator=generator)
    where = (drawn[:, None] == paths).flatten(2).all(-1)
    assert bool(where.any(-1).all())
    often = probs * 4000 >= 5
    counts = [where.sum(0).double(), probs]
    counts = [torch.cat([x[often], x[~often].sum()[None]]) for x in counts]
    assert chi_square_p_value(*counts) > 1e-4


def test_steps_are_sites_of_their_own(generator):
    problem, path = CASES["three steps"]
    chain = chain_of(problem, path, order_for(problem, path))
    value = chain.sample(generator=generator)

    @unroll
    def program():
        pyro.sample("path", chain, obs=value)

    trace = poutine.trace(program).get_trace()
    trace.compute_log_prob()
    sites = {n: site for n, site in trace.nodes.items() if n[:4] in ("tok_", "lat_")}
    assert set(sites) == {"lat_1", "tok_2", "tok_3", "tok_4"}
    total = sum(site["log_prob_sum"] for site in sites.values())
    torch.testing.assert_close(total, chain.log_prob(value.clone()))


def test_what_is_known_is_not_revealed():
    """A prompt is read while the code is drawn, and is there at every step of the tokens."""
    problem, path = CASES["two steps"]
    kernel = chain_of(problem, path, order_for(problem, path)).kernel
    chain = ReverseChain(kernel, 3, prompt=torch.tensor([-1, 1, -1]))
    paths = every_path(problem, path)
    paths[:, :, 1] = 1
    paths = paths.unique(dim=0)
    probs = chain.log_prob(paths).exp()
    assert float(probs.sum()) == pytest.approx(1, abs=1e-12)


# Bounds.


class Posterior:
    """The encoder of a problem: the law of its code given a sequence."""

    def __init__(self, problem):
        self.problem = problem

    def log_probs(self, x0):
        problem = self.problem
        log_w = problem.weights.log().expand(len(x0), -1)
        for site, law in enumerate(problem.tokens.unbind(1)):
            log_w = log_w + law.log().T[x0[:, site]]
        return (log_w.softmax(-1) @ problem.latent[:, 0]).log()[:, None]

    def __call__(self, x0):
        return self.log_probs(x0).argmax(-1)


def program(problem, path, order=None, denoiser=None):
    return LatentDiffusion(
        denoiser or problem.denoiser(),
        vocabulary="abc"[: problem.vocab_size],
        length=problem.length,
        encoder=Posterior(problem),
        path=path,
        order=order,
    )


def exact_bounds(problem, order, network=None):
    """Return the bound of each sequence, ``(V ** L,)``; ``network`` is the law that is predicted.

    There is one slot, so that its law costs what the network predicts of it.
    """
    joint = (network or problem).joint
    codes = joint.sum(tuple(range(problem.length)))
    encoder = problem.joint / problem.joint.sum(-1, keepdim=True)
    cost = enumerated(joint, order)[1]
    return (encoder * (encoder.log() - codes.log() + cost)).sum(-1).flatten()


BOUNDS = [("two steps", None), ("three steps", None), ("three steps", OTHER)]


@pytest.mark.parametrize(("case", "network"), BOUNDS, ids=["two", "three", "of another law"])
def test_the_bound_is_that_of_the_chain(case, network):
    problem, path = CASES[case]
    order = order_for(problem, path)
    exact = exact_bounds(problem, order, network)
    assert float((problem.data.flatten() * exact).sum()) >= problem.entropy
    model = program(problem, path, order, network and network.denoiser())
    x0, generator = all_states(2, 3), torch.Generator().manual_seed(0)
    for options in ({}, {"num_steps": 2}):
        bound = model.bound(x0, num_samples=2000, generator=generator, **options)
        assert float(((bound.loss - exact) / bound.standard_error).abs().max()) < 4
        assert bound.is_bound
        torch.testing.assert_close(bound.tokens + bound.latent + bound.prior, bound.loss)
    terms = model.bound_terms(x0.repeat(50, 1), num_times=20, generator=generator)
    repeated = terms.mean(0).reshape(50, -1)
    error = repeated.std(0) / 50**0.5
    assert float(((repeated.mean(0) - exact) / error).abs().max()) < 4


def test_a_bound_with_the_weights_of_equal_steps_is_noticed(monkeypatch):
    """A mutant: tokens are hidden by the order, and paid for as if there were none."""
    problem, path = CASES["two steps"]
    order = order_for(problem, path)
    exact = exact_bounds(problem, order)
    equal = RevealOrder(torch.zeros_like(order.table))
    monkeypatch.setattr(order, "reveals", equal.reveals)
    bound = program(problem, path, order).bound(
        all_states(2, 3), num_samples=2000, generator=torch.Generator().manual_seed(0)
    )
    assert float(((bound.loss - exact) / bound.standard_error).abs().max()) > 10


@pytest.mark.parametrize("case", CASES)
def test_an_order_of_zeros_is_none(case):
    problem, path = CASES[case]
    zeros = RevealOrder(torch.zeros_like(order_for(problem, path).table))
    paths = every_path(problem, path)
    ours, theirs = (chain_of(problem, path, order).log_prob(paths) for order in (zeros, None))
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)
    if problem is SLOTS:
        return
    x0 = all_states(2, 3)
    ours, theirs = (
        program(problem, path, order).bound(x0, generator=torch.Generator().manual_seed(0))
        for order in (zeros, None)
    )
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-13, atol=1e-13)


# Learning.


def matched_bits(agree):
    """Return four bits in two pairs; the code says which of the three ways they are paired."""
    pairings = [((0, 1), (2, 3)), ((0, 2), (1, 3)), ((0, 3), (1, 2))]
    tokens, codes = [], torch.eye(3, dtype=torch.float64).repeat_interleave(4, 0)[:, None]
    for pairing, values in itertools.product(pairings, itertools.product((0, 1), repeat=2)):
        law = torch.full((4, 2), 1 - agree, dtype=torch.float64)
        for pair, value in zip(pairing, values, strict=True):
            law[list(pair), value] = agree
        tokens.append(law)
    return LatentProblem(torch.full((12,), 1 / 12).double(), torch.stack(tokens), codes)


@pytest.mark.parametrize("steps", [2, 3])
def test_gradients_are_those_of_the_bound(steps):
    problem, path = matched_bits(0.9), Path.sequential(1, steps)
    order, model = order_for(problem, path).requires_grad_(), program(problem, path)
    (problem.joint * enumerated(problem.joint, order)[1]).sum().backward()
    exact, order.table.grad = order.table.grad, None
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(40):
        x0, codes = problem.draw(1000, generator)
        t = torch.randint(1, order.token_steps + 1, (1000,), generator=generator)
        estimate = estimated_cost(model, order, path, x0, codes, t, 2, generator)
        found += torch.autograd.grad(estimate.loss.mean(), order.table)
    found = torch.stack(found)
    error = found.std(0) / len(found) ** 0.5
    assert float(((found.mean(0) - exact) / error).abs().max()) < 4
    assert float((exact / error).abs().max()) > 8  # the errors are small enough to tell


def gap(problem, reveals):
    """Return what two steps lose, ``E_c`` of bound less entropy, from entropies of subsets.

    :param reveals: of the first step, ``(K, L)``.
    """
    length, num_codes = problem.length, problem.joint.shape[-1]
    weights = problem.joint.sum(tuple(range(length)))
    total = 0.0
    for code in range(num_codes):
        law, r = problem.joint[..., code] / weights[code], reveals[code].tolist()
        known = {
            s: entropy(
                law.sum([i for i in range(length) if i not in s]) if len(s) < length else law
            )
            for size in range(length + 1)
            for s in itertools.combinations(range(length), size)
        }
        lost = sum(r[i] * known[i,] for i in range(length)) - known[tuple(range(length))]
        for s, base in known.items():
            chance = math.prod(r[i] if i in s else 1 - r[i] for i in range(length))
            for i in set(range(length)) - set(s):
                lost += chance * (known[tuple(sorted((*s, i)))] - base)
        total += float(weights[code]) * lost
    return total


def learned_gap(problem, **options):
    generator = torch.Generator().manual_seed(0)
    x0, _ = problem.draw(5000, generator)
    model = program(problem, Path.sequential(1, 1), denoiser=problem.denoiser(unseen="uniform"))
    learned = model.learn_order(x0, token_steps=2, generator=generator, **options)
    codes = torch.arange(problem.joint.shape[-1])[:, None]
    equal = torch.full((len(codes), problem.length), 0.5)
    assert model.order is None
    return gap(problem, equal), gap(problem, learned.order.reveals(codes)[0]), learned


def test_a_learned_order_keeps_apart_what_belongs_together():
    """Pairs that are never revealed at once lose nothing, and no order without codes does that."""
    problem = matched_bits(0.95)
    given, learned, model = learned_gap(problem, steps=200, learning_rate=0.2, batch_size=64)
    assert given == pytest.approx(0.379191, abs=1e-6)
    assert 0 < learned < 0.01
    alike = min(
        gap(problem, torch.tensor(r).double().expand(3, -1))
        for r in itertools.product((0, 1), repeat=4)
    )
    assert alike > 0.2
    # The bound says the same of the chain that is sampled.
    x0 = all_states(2, 4)
    found = model.bound(x0, num_samples=1000, generator=torch.Generator().manual_seed(1))
    weight = problem.data.flatten()
    error = float((weight * found.standard_error).square().sum().sqrt())
    assert abs(float((weight * found.loss).sum()) - problem.entropy - learned) < 4 * error


def test_a_learned_order_of_a_saw():
    """Eight bits, four bins: one step loses .1145 nats, two equal ones .0536, the best .0432."""
    problem = binary_saw(4, length=8, num_points=32)
    given, learned, _ = learned_gap(problem, steps=200, batch_size=64)
    assert given == pytest.approx(0.0536, abs=1e-4)
    assert 0.0432 < learned < given - 0.003


# Particles.


def test_the_evidence_of_a_reward():
    problem, path = CASES["two steps"]
    order = order_for(problem, path)
    generator = torch.Generator().manual_seed(3)
    tilt = 1.5 * torch.randn((2, 2, 2), generator=generator, dtype=torch.float64)
    expected = float((law_of(problem, path, order) * tilt.exp()[..., None]).sum())
    chain = chain_of(problem, path, order)
    reward = Potential(lambda x: tilt[x.unbind(-1)])
    for options in ({"method": "smc", "ess_threshold": 2.0}, {"method": "importance-sampling"}):
        found = SMC(chain, reward, num_particles=16, num_runs=300, **options).run(seed=1)
        values = found.log_evidence.exp()
        error = float(values.std()) / len(values) ** 0.5
        assert abs(float(values.mean()) - expected) < 4 * error
