"""Every verdict from both sides of its limit, on posteriors made by hand."""

import copy
import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from ppl_diffusion.smc.khat import khat
from ppl_diffusion.smc.question_rules import stuck
from ppl_diffusion.smc.run_statistics import effective_distinct
from ppl_diffusion.smc.verdict import Verdict
from ppl_diffusion.smc.verdicts import judge

RUNS, SIZE, STEPS, LENGTH = 3, 40, 5, 6
"""Of the posterior that nothing is wrong with; its limits are 10, 5, 5 and 3."""


def f64(values):
    return torch.as_tensor(values, dtype=torch.float64)


def full(*shape, value):
    return torch.full(shape, value, dtype=torch.float64)


@pytest.fixture
def good(make_posterior):
    """Return three runs that agree, with a latent, two particles from each root."""
    one = make_posterior(runs=RUNS, particles=SIZE, steps=STEPS, length=LENGTH, path=True)
    (base,) = one.law.chains
    chain = replace(base, masked=float(LENGTH))
    resampled = torch.zeros(RUNS, STEPS, dtype=torch.bool)
    resampled[:, 2] = True
    return replace(
        one,
        law=one.law.but(latents=("gain",), chains=(chain,)),
        samples={"x0": one.x0, "gain": torch.randn(RUNS, SIZE, dtype=torch.float64)},
        log_weights=full(RUNS, SIZE, value=1 / SIZE).log(),
        log_evidence=f64([0.1, 0.2, 0.3]),
        eve=(torch.arange(SIZE) // 2).expand(RUNS, SIZE),
        ess=f64(torch.full((RUNS, STEPS), 30.0)),
        resampled=resampled,
        log_mass=f64(torch.zeros(RUNS, STEPS)),
    )


def the(posterior, kind, others=()):
    """Return the verdict of a kind, which is the only one but for others that must come with it."""
    found = {verdict.kind: verdict for verdict in posterior.warnings}
    assert found.keys() == {kind, *others}
    return found[kind]


def weights_of(shares):
    """Return log-weights of three runs, the second of which has other shares than equal ones."""
    rows = torch.full((RUNS, SIZE), 1 / SIZE, dtype=torch.float64)
    rows[1] = f64(shares)
    return (rows / rows.sum(-1, keepdim=True)).log()


def in_run_one(values, other):
    """Return labels or values in the second run, and others in the rest, ``(3, N)``."""
    rows = torch.as_tensor(other).expand(RUNS, SIZE).clone()
    rows[1] = torch.as_tensor(values)
    return rows


def labels(sizes):
    """Return labels for all particles of a run, so many of each."""
    return torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))


def test_nothing_is_wrong_with_a_good_one(good):
    assert good.warnings == []
    assert good.evidence.interval is not None
    assert "warnings: none" in repr(good)


def test_a_verdict_is_a_sentence_and_more(good):
    verdict = the(replace(good, log_evidence=f64([0.0, 5.0, 0.0])), "apart")
    assert isinstance(verdict, str)
    assert verdict.startswith("runs disagree: log evidence from 0.0 to 5.0 nats over 3 living runs")
    assert (verdict.level, verdict.limit) == ("weak", 1.0)
    for twin in (pickle.loads(pickle.dumps(verdict)), copy.deepcopy(verdict)):
        assert type(twin) is Verdict
        assert (twin, vars(twin)) == (verdict, vars(verdict))


def test_effective_numbers_are_those_of_weights():
    """One over the sum of squared shares; the failing twin counts labels."""
    found = effective_distinct(np.array([[0, 0, 1, 2]]), np.array([[0.25, 0.25, 0.5, 0.0]]))
    assert found == pytest.approx([2.0])
    assert len({0, 1, 2}) != 2


@pytest.mark.parametrize(("dead", "level"), [((), None), ((1,), "weak"), ((0, 1, 2), "broken")])
def test_dead(good, dead, level):
    log_weights, evidence = good.log_weights.clone(), good.log_evidence.clone()
    died = torch.full((RUNS,), -1)
    for run in dead:
        log_weights[run], evidence[run], died[run] = -torch.inf, -torch.inf, 3
    posterior = replace(good, log_weights=log_weights, log_evidence=evidence, died_at=died)
    if level is None:
        assert posterior.warnings == []
        return
    verdict = the(posterior, "dead")
    assert (verdict.level, verdict.value) == (level, len(dead))
    assert f"run {dead[0]} after 4 of 5 steps" in verdict
    assert posterior.evidence.interval is None


@pytest.mark.parametrize(
    ("shares", "level"),
    [
        ([0.71, 0.71, 0.71], None),
        ([0.69, 0.69, 0.69], "weak"),
        ([0.09, 0.09, 0.09], "broken"),
        ([0.4, 0.5, 1.3], None),  # the mean is .73
        ([0.1, 0.2, 20.0], "weak"),  # one run holds more than 90 %: the median is .2
        ([0.0, 0.0, 0.0], "broken"),
    ],
)
def test_mass(good, shares, level):
    """The failing twin looks at the first step, where nothing is lost yet."""
    log_mass = f64(shares).log()[:, None] * torch.linspace(0, 1, STEPS, dtype=torch.float64)
    log_mass[:, -1], log_mass[:, 0] = f64(shares).log(), 0.0
    posterior = replace(good, log_mass=log_mass, settings={"twist": "argmax"})
    if level is None:
        assert posterior.warnings == []
        return
    verdict = the(posterior, "mass")
    assert verdict.level == level
    assert "the look-ahead 'argmax' or the data left the rest behind" in verdict
    assert "guessed wrong, use twist='defensive', or more particles, else it is" in verdict
    # Agreement of such runs is none.
    assert posterior.evidence.interval is None
    guarded = replace(posterior, settings={"twist": "defensive"})
    assert "use twist=" not in the(guarded, "mass")


def test_mass_of_what_is_no_prior_is_not_judged(good):
    lost = f64(torch.full((RUNS, STEPS), -9.0))
    assert judge(replace(good, log_mass=lost)) != []
    assert judge(replace(good, log_mass=None)) == []
    assert judge(replace(good, log_mass=lost, settings={"twist": "moments"})) == []
    assert judge(replace(good, log_mass=lost, law=good.law.but(product="p^2"))) == []


@pytest.mark.parametrize(("sizes", "fires"), [((20, 20), False), ((22, 18), True), ((40,), True)])
def test_roots(good, sizes, fires):
    """Shares .55 and .45 are 1.98 effective roots; the failing twin counts two."""
    posterior = replace(good, eve=in_run_one(labels(sizes), torch.arange(SIZE)))
    if not fires:
        assert posterior.warnings == []
        return
    verdict = the(posterior, "roots")
    assert (verdict.level, verdict.where) == ("weak", "run 1")
    assert verdict.value == pytest.approx(1 / sum((n / SIZE) ** 2 for n in sizes))
    everywhere = the(replace(posterior, eve=labels(sizes).expand(RUNS, SIZE)), "roots")
    assert "(and in 2 of 2 others)" in everywhere
    # Draws that were never resampled descend from themselves alone, few or many.
    never = replace(posterior, resampled=torch.zeros(RUNS, STEPS, dtype=torch.bool))
    assert never.warnings == []


@pytest.mark.parametrize(("groups", "fires"), [(10, False), (8, True)])
def test_latent(good, groups, fires):
    """Ten values of four particles each are ten; eight of five are too few."""
    values = in_run_one(0.5 + f64(labels([SIZE // groups] * groups)), f64(torch.arange(SIZE)))
    posterior = replace(good, samples={"x0": good.x0, "gain": values})
    assert [v.kind for v in posterior.warnings] == ["latent"] * fires
    if fires:
        (verdict,) = posterior.warnings
        assert (verdict.level, verdict.value, verdict.limit) == ("broken", 8.0, 10.0)
        assert verdict.startswith("latent 'gain': 8 effective distinct values among 40 particles")
        # The worst element of a plate is what counts.
        both = torch.stack([f64(torch.arange(SIZE)).expand(RUNS, SIZE), values], -1)
        plated = replace(good, samples={"x0": good.x0, "gain": both})
        assert the(plated, "latent").value == 8.0
        worse = in_run_one(0.5 + f64(labels([8] * 5)), f64(torch.arange(SIZE)))
        both = torch.stack([values, worse, values], -1)
        plated = replace(good, samples={"x0": good.x0, "gain": both})
        assert the(plated, "latent").value == 5.0


def test_latents_that_cannot_collapse_are_not_judged(good):
    constant = f64(torch.ones(RUNS, SIZE))  # in all runs: an atom, no collapse
    own = constant * f64([1.1, 2.1, 3.1])[:, None]
    found = [
        judge(replace(good, samples={"x0": good.x0, "gain": values}))
        for values in (constant, constant.long(), own.long(), own)
    ]
    assert [[v.kind for v in one] for one in found] == [[], [], [], ["latent"]]


@pytest.mark.parametrize("known", [None, ["gain"], []])
def test_discrete_latents_are_told_by_their_support(good, known):
    """Pyro's are floats. Of unknown support, whole numbers are taken to be discrete."""
    settings = {} if known is None else {"discrete_latents": known}
    leaky = f64(torch.arange(SIZE) % 2).expand(RUNS, SIZE)
    posterior = replace(good, samples={"x0": good.x0, "gain": leaky}, settings=settings)
    assert [v.kind for v in posterior.warnings] == ["latent"] * (known == [])


def test_numbers_fixed_beside_others_are_no_collapse(good):
    """A triangular matrix has them, in a single run too; the failing twin looks at each number."""
    one = {
        name: getattr(good, name)[:1]
        for name in ("x0", "log_weights", "log_evidence", "eve", "ess", "resampled")
    }
    values = torch.stack([torch.randn(1, SIZE), torch.full((1, SIZE), 0.5)], -1)
    gone = {"compact_path": None, "log_mass": None, "died_at": good.died_at[:1]}
    gone["log_potential"] = good.log_potential[:1]
    single = replace(good, **one, **gone, samples={"gain": values})
    assert single.warnings == []
    assert [v.kind for v in judge(replace(single, samples={"gain": values[..., 1]}))] == ["latent"]


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"left": {"gain": "moves=None"}}, "); move latents (moves='auto'), or use more"),
        ({"left": {"gain": "its X"}}, "); it was carried as it was drawn (its X): use more"),
        ({"kernels": {"gain": "hmc"}, "left": {}}, "); use more particles or runs, or Part"),
    ],
)
def test_advice_about_a_latent_fits_what_was_done(good, told, said):
    values = 0.5 + f64(labels([SIZE // 2] * 2)).expand(RUNS, SIZE)
    settings = {"latent_moves": told, "discrete_latents": []}
    posterior = replace(good, samples={"x0": good.x0, "gain": values}, settings=settings)
    assert said in the(posterior, "latent")
    mixed = replace(posterior, settings={**settings, "discrete_latents": ["leaky"]})
    assert "ParticleGibbs" not in the(mixed, "latent")  # it refuses discrete latents


@pytest.mark.parametrize(("groups", "fires"), [(5, False), (4, True)])
def test_copies(good, groups, fires):
    path = good.compact_path.clone()
    path[1] = path[1, labels([SIZE // groups] * groups)]
    posterior = replace(good, compact_path=path)
    assert [v.kind for v in posterior.warnings] == ["copies"] * fires
    if fires:
        assert posterior.warnings[0].value == pytest.approx(groups)
        # Paths of a program are sites; what is not stored is not judged.
        named = replace(good.law.chains[0], site="path")
        law = good.law.but(chains=(named,))
        samples = {**good.samples, "path": path.long()}
        program = replace(good, compact_path=None, samples=samples, law=law)
        assert the(program, "copies").value == pytest.approx(groups)
        assert replace(posterior, compact_path=None).warnings == []


def pareto(shape, size=RUNS * SIZE):
    """Quantiles of a Pareto law: weights whose k-hat is near its shape."""
    quantiles = (np.arange(size) + 0.5) / size
    weights = (1 - quantiles) ** -shape
    order = np.random.default_rng(0).permutation(size)
    return f64(weights[order].reshape(RUNS, SIZE)).log()


@pytest.mark.parametrize(("shape", "level"), [(0.5, None), (1.0, "weak"), (1.6, "broken")])
def test_khat(good, shape, level):
    """Of the pooled weights: a run with equal ones and a heavy evidence does not hide the tail."""
    log_w = pareto(shape)
    found = float(khat(log_w.reshape(1, -1))[0])
    bounds = {None: (-1.0, 0.7), "weak": (0.7, 1.0), "broken": (1.0, 9.0)}[level]
    assert bounds[0] < found < bounds[1]
    evidence = torch.logsumexp(log_w, -1)
    posterior = replace(
        good, log_weights=log_w.log_softmax(-1), log_evidence=evidence - evidence.mean()
    )
    by_kind = {verdict.kind: verdict for verdict in posterior.warnings}
    assert ("khat" in by_kind) == (level is not None)
    if level is not None:
        assert by_kind["khat"].level == level
        assert by_kind["khat"].value == pytest.approx(found)


def test_khat_of_tied_weights_is_excused_by_a_high_ess(good):
    log_w = torch.zeros(RUNS, SIZE, dtype=torch.float64)
    log_w[0, :8] = f64(np.log([1.001, 1.002, 1.004, 1.01, 1.03, 1.1, 1.5, 4.0]))
    found = float(khat(log_w.reshape(1, -1))[0])
    assert found > 0.7
    evidence = torch.logsumexp(log_w, -1)
    posterior = replace(good, log_weights=log_w.log_softmax(-1), log_evidence=evidence)
    assert posterior.warnings == []


@pytest.mark.parametrize(("held", "fires"), [(0.40, False), (0.46, True)])
def test_ess_end(good, held, fires):
    """A particle that holds .40 leaves an ESS of 5.9, one of .46 one of 4.6."""
    posterior = replace(
        good,
        log_weights=weights_of([held] + [(1 - held) / (SIZE - 1)] * (SIZE - 1)),
        samples={"x0": good.x0},  # a latent would be poor as well
    )
    others = ("copies",) if fires else ()
    assert [v.kind for v in posterior.warnings] == (["copies", "ess end"] if fires else [])
    if fires:
        verdict = the(posterior, "ess end", others)
        assert (verdict.where, verdict.limit) == ("run 1", 5.0)


@pytest.mark.parametrize(("size", "fires"), [(3.1, False), (2.9, True)])
def test_ess_path(good, size, fires):
    """Before a resampling only: elsewhere weights go on to accumulate, and nothing is lost."""
    ess = good.ess.clone()
    ess[1, 2], ess[1, 3] = size, 1.0
    posterior = replace(good, ess=ess)
    assert [v.kind for v in posterior.warnings] == ["ess path"] * fires
    if fires:
        assert "2.9 of 40 after 3 of 5 steps in run 1 (limit 3)" in posterior.warnings[0]


@pytest.mark.parametrize(
    ("spread", "level"), [(0.99, None), (1.01, "weak"), (2.99, "weak"), (3.01, "broken")]
)
def test_apart(good, spread, level):
    posterior = replace(good, log_evidence=f64([-spread, 0.0, spread]))
    if level is None:
        assert posterior.warnings == []
        return
    verdict = the(posterior, "apart")
    assert (verdict.level, verdict.value) == (level, pytest.approx(spread))
    bound = posterior.pooled_log_evidence - math.log(20)
    assert f"log Z >= {bound:.1f} at 95 %" in verdict


@pytest.mark.parametrize(
    ("runs", "forbidden", "fires"),
    [
        (3, 0, False),
        (3, 95, False),
        (3, 96, True),
        (1, 0, False),
        (20, 719, False),
        (20, 721, True),
    ],
)
def test_constraint(good, runs, forbidden, fires):
    """Fewer than 25 living of 120; or more than 90 % forbidden, here 720 of 800."""
    log_g = torch.zeros(runs * SIZE, dtype=torch.float64)
    log_g[:forbidden] = -torch.inf
    shape = {
        name: getattr(good, name)[:1].expand(runs, *getattr(good, name).shape[1:])
        for name in ("x0", "log_weights", "eve", "ess", "resampled", "compact_path")
    }
    posterior = replace(
        good,
        **shape,
        samples={"x0": shape["x0"]},
        log_evidence=f64(torch.zeros(runs)),
        died_at=torch.full((runs,), -1),
        log_mass=None,
        log_potential=log_g.reshape(runs, SIZE),
    )
    assert [v.kind for v in posterior.warnings] == ["constraint"] * fires
    if fires:
        assert posterior.warnings[0].level == "weak"


@pytest.mark.parametrize(
    ("failed", "level"), [(0, None), (128, None), (129, "weak"), (256, "broken")]
)
def test_reward(good, failed, level):
    told = {"dock": {"asked": 256, "failed": failed, "first": "TimeoutError: no answer"}}
    posterior = replace(good, settings={"failures": told})
    if level is None:
        assert posterior.warnings == []
        return
    verdict = the(posterior, "reward")
    assert (verdict.level, verdict.where) == (level, "dock")
    assert f"'dock' failed for {failed} of 256 sequences" in verdict
    assert "first: TimeoutError: no answer" in verdict


@pytest.mark.parametrize(("masked", "fires"), [(20.0, False), (21.0, True), (0.0, False)])
def test_steps(good, masked, fires):
    (base,) = good.law.chains
    posterior = replace(good, law=good.law.but(chains=(replace(base, masked=masked),)))
    assert [v.kind for v in posterior.warnings] == ["steps"] * fires
    if fires:
        verdict = posterior.warnings[0]
        assert (verdict.level, verdict.value) == ("note", pytest.approx(4.2))


@pytest.mark.parametrize(
    ("rates", "fires"),
    [([0.0, 0.021], False), ([0.0, 0.019], True), ([[0.01, None], [0.0]], True), ([], False)],
)
def test_stuck(good, rates, fires):
    posterior = replace(good, settings={"latent_moves": {"acceptance": rates}})
    assert [v.kind for v in posterior.warnings] == ["stuck"] * fires
    dead = replace(posterior, log_evidence=torch.full_like(posterior.log_evidence, -math.inf))
    assert stuck(dead) is None


def test_searches_are_held_to_less(good):
    """No evidence: what weights and family trees say is not what such a result claims."""
    log_evidence = f64([math.nan] * RUNS)
    law = good.law.but(exact=False, why="the best", has_evidence=False)
    one = replace(
        good,
        law=law,
        log_evidence=log_evidence,
        log_weights=weights_of([1.0] + [0.0] * (SIZE - 1)),
        eve=torch.zeros(RUNS, SIZE, dtype=torch.int64),
        log_mass=f64(torch.full((RUNS, STEPS), -9.0)),
    )
    assert one.warnings == []
    nothing = replace(one, log_potential=f64(torch.full((RUNS, SIZE), -torch.inf)))
    assert the(nothing, "constraint").level == "broken"
    assert nothing.evidence is None


def test_the_worst_comes_first(good):
    posterior = replace(
        good,
        log_evidence=f64([0.0, 9.0, 0.0]),
        eve=torch.zeros(RUNS, SIZE, dtype=torch.int64),
        law=good.law.but(chains=(replace(good.law.chains[0], masked=99.0),)),
    )
    assert [v.level for v in posterior.warnings] == ["broken", "weak", "note"]
    assert [v.kind for v in posterior.warnings] == ["apart", "roots", "steps"]


def test_verdicts_survive_a_file(good, tmp_path):
    posterior = replace(good, log_evidence=f64([0.0, 9.0, 0.0]))
    again = type(good).load(posterior.save(tmp_path))
    assert again.warnings == posterior.warnings != []
