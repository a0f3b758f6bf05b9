"""M1, M2: a testbed of 200 positions with known answers, and the checks of sections 4 to 6 on it.

A Markov chain rewarded for a motif: a string-matching automaton gives the exact ``log Z``, value of
every masked state, posterior marginals and draws at any length
(:class:`motif_problem.MotifProblem`). Means are held at four standard errors: false alarm
6e-5 each for a normal mean, below .2 % for the file, once, at the fixed seeds.
"""

import itertools
from dataclasses import replace
from functools import partial

import pytest
import torch
from motif_problem import MotifProblem

from ppl_diffusion.denoisers import MarkovDenoiser
from ppl_diffusion.inference import SMC
from ppl_diffusion.kernels import Absorbing
from ppl_diffusion.smc import PersistentFill
from ppl_diffusion.testing import all_states, chi_square_p_value, state_index, z_score

MAX_Z = 4.0


# The testbed itself, by enumeration.


def short(motif, prompt=None):
    problem = MotifProblem.random(3, 5, motif=motif, weight=1.3)
    return replace(problem, prompt=None if prompt is None else torch.tensor(prompt))


def enumerated(problem):
    """All sequences the prompt allows and their posterior probabilities, with ``log Z``."""
    x = all_states(3, 5)
    log_p = problem.chain.kernel.denoiser.log_prob(x)
    if problem.prompt is not None:
        held = ((x == problem.prompt) | (problem.prompt < 0)).all(-1)
        log_p = log_p.masked_fill(~held, -torch.inf).log_softmax(-1)
    joint = log_p + problem.potential(x)
    log_z = torch.logsumexp(joint, 0)
    return x, (joint - log_z).exp(), float(log_z)


MOTIFS = [(1, 2), (0, 0), (0, 1, 0), (2,), (0, 0, 1, 0)]


@pytest.mark.parametrize("prompt", [None, [-1, 1, -1, -1, 0]], ids=["free", "prompted"])
@pytest.mark.parametrize("motif", MOTIFS, ids=str)
def test_the_testbed_equals_enumeration(motif, prompt):
    """M2: overlapping motifs too. The twin, an automaton without borders, would miss 0, 0, 0."""
    problem = short(motif, prompt)
    x, law, log_z = enumerated(problem)
    assert problem.log_z == pytest.approx(log_z, abs=1e-13)
    assert problem.mean_occurrences == pytest.approx(float(law @ problem.occurrences(x)), abs=1e-13)
    onehot = torch.nn.functional.one_hot(x, 3).to(torch.float64)
    expected = torch.einsum("s,slv->lv", law, onehot)
    torch.testing.assert_close(problem.marginals, expected, rtol=0, atol=1e-13)


def test_values_of_every_masked_state():
    """M2: ``log E[G(x0) | x]`` of all 1024 states of five positions."""
    problem, states = short((0, 1, 0)), all_states(4, 5)
    x, _, _ = enumerated(problem)
    log_p = problem.chain.kernel.denoiser.log_prob(x)
    agree = ((states[:, None] == x) | (states[:, None] == 3)).all(-1)
    log_p = log_p.expand(len(states), -1).masked_fill(~agree, -torch.inf)
    expected = torch.logsumexp(log_p + problem.potential(x), -1) - torch.logsumexp(log_p, -1)
    torch.testing.assert_close(problem.log_value(states), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("prompt", [None, [-1, 1, -1, -1, 0]], ids=["free", "prompted"])
def test_draws_follow_the_posterior(prompt):
    """M2: Pearson's test, level 1e-4; paths reveal one position per step, in any order."""
    problem = short((0, 1), prompt)
    x, law, _ = enumerated(problem)
    path = problem.draw_paths(20_000, torch.Generator().manual_seed(0))
    counts = torch.bincount(state_index(path[:, -1], 3), minlength=len(x)).double()
    rare = law * 20_000 < 5
    cells = [torch.cat([y[~rare], y[rare].sum()[None]]) for y in (counts, law)]
    assert chi_square_p_value(*[c[cells[1] > 0] for c in cells]) > 1e-4
    assert bool(problem.chain.log_prob(path[:100]).isfinite().all())
    free = 5 if prompt is None else 3
    orders = (path == 3).sum(1).argsort(-1)
    assert len(orders.unique(dim=0)) == len(list(itertools.permutations(range(free))))


@pytest.mark.parametrize("length", [4, 200])
def test_marginals_of_a_sequence_are_products_of_predictions(length):
    """M1: ``p(x with l := v) = p(x) D_l(v)``, where ``p`` sums over what is masked.

    Sums over masks by the testbed at weight 0, which is a code path of its own.
    """
    problem = MotifProblem.random(4, length, motif=(0,), weight=0.0, seed=3)
    generator = torch.Generator().manual_seed(1)
    x0 = problem.draw(20, generator)
    hidden = torch.rand(x0.shape, generator=generator) < 0.5
    hidden[:, 2] = True
    tokens = torch.where(hidden, 4, x0)
    children = tokens[:, None].repeat(1, 4, 1)
    children[:, :, 2] = torch.arange(4)
    log_p = partial(log_mass, problem.initial, problem.transition)
    gain = log_p(children.flatten(0, 1)).reshape(20, 4) - log_p(tokens)[:, None]
    denoiser = MarkovDenoiser(problem.initial, problem.transition, Absorbing(4))
    torch.testing.assert_close(denoiser(tokens, 0.5)[:, 2], gain, rtol=0, atol=1e-12)


def log_mass(initial, transition, tokens):
    """Sum a product along a chain over all ways to fill the masks; returns its log, ``(B,)``."""
    size = len(initial)
    allowed = (tokens[..., None] == torch.arange(size)) | (tokens == size)[..., None]
    law, scale = initial * allowed[:, 0], torch.zeros(len(tokens), dtype=torch.float64)
    for site in range(1, tokens.shape[1]):
        total = law.sum(-1, keepdim=True)
        scale, law = scale + total[:, 0].log(), (law / total) @ transition * allowed[:, site]
    return scale + law.sum(-1).log()


# 200 positions, four tokens. Two gaps of ten positions keep the tests quick.


LONG = MotifProblem.random(4, 200).with_gaps(2, 10)
OPTIONS = {"num_particles": 3, "num_runs": 40, "store_path": False, "ess_threshold": 0.9}


LAST = {}


def value(carry, k):
    """The true value; the same rows, one step after another, are asked about once."""
    tokens = carry["tokens"]
    rows, back = tokens.reshape(-1, LONG.length).unique(dim=0, return_inverse=True)
    asked = rows.numpy().tobytes()
    if asked not in LAST:
        LAST.clear()
        LAST[asked] = LONG.log_value(rows)
    return LAST[asked][back].reshape(tokens.shape[:-1])


PROGRAMS = {
    "T4.3": partial(SMC, method="soft-value", num_children=2),
    "T4.3 at the true value": partial(SMC, method="soft-value", num_children=2, twist=value),
    "T5.2": partial(SMC, method="steering", every=3),
    "T5.7": partial(SMC, method="steering", twist=PersistentFill(1)),
    "6.3": partial(SMC, method="twisted"),
    "6.3 with surprise": partial(SMC, method="twisted", surprise=True),
    "6.4": partial(SMC, method="twisted", twist=PersistentFill(2)),
    "6.5": partial(SMC, method="twisted", proposal="reweighted", twist=PersistentFill(4)),
    "T6.3": partial(SMC, method="twisted", top=2),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_evidence_at_two_hundred_positions(name):
    """M2 with the checks it is named after: ``E[Z_hat] = Z`` and the mean number of motifs."""
    posterior = PROGRAMS[name](LONG.chain, LONG.potential, **OPTIONS).run(seed=1)
    ratio = (posterior.log_evidence - LONG.log_z).exp()
    assert abs(z_score(ratio, 1.0)) < MAX_Z
    mean = posterior.expectation(LONG.occurrences)
    assert abs(z_score(ratio * mean, LONG.mean_occurrences)) < MAX_Z
    assert float(ratio.std()) < 1.5  # a mean of 40 says something
    assert bool((posterior.x0 == LONG.prompt)[..., LONG.prompt >= 0].all())  # T5.8
