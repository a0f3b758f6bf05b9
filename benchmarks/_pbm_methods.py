"""The methods of the PBM benchmark, all at one number of network rows.

A method of size ``n`` asks for ``n`` network rows per step: ``n`` particles, or fewer lineages with
``n`` children between them. Equal rows are evaluated once, so it pays for fewer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from benchmarks._pbm_problem import BASES, Problem
from ppl_diffusion.inference import SMC, Power, methods
from ppl_diffusion.smc import FeynmanKac, ParticlePosterior, PersistentFill, two_sided_evidence
from ppl_diffusion.smc.twists import FillTwist, TwistLike, log_mean_exp
from ppl_diffusion.testing import state_index

MAX_ELEMENTS = 2_000_000  # of the largest array of a batch of runs: about what a cache holds
COST_RUNS = 8  # rows are shared between runs that move side by side, so costs need runs alone
GAP_RUNS = 300
POWERS = (0.0, 0.1, 0.25, 0.5, 1.0)  # of the potential, in tempering
FILLS = PersistentFill(16)

Options = Mapping[str, Any]
Sized = Callable[[Problem, int], Options]


@dataclass(frozen=True)
class Method:
    """A method of the library and how its options follow from the size.

    :param name: how tables call it.
    :param method: its name in the library.
    :param options: ``(problem, n) -> options``.
    :param num_fills: sequences per particle and step the potential may be asked about.
    :param plain: ``twist`` and ``ess_threshold`` of the same sampler as a plain
        :class:`~ppl_diffusion.smc.FeynmanKac`, for the two-sided evidence; None if it is none.
    """

    name: str
    method: str
    options: Sized
    num_fills: int = 1
    plain: tuple[TwistLike, float] | None = None

    def run(
        self, problem: Problem, size: int, runs: int, seed: int, *, cache: bool = True
    ) -> ParticlePosterior:
        """Run it.

        :param problem: the problem.
        :param size: the size ``n``.
        :param runs: independent runs, vectorised.
        :param seed: seed of all of them.
        :param cache: ask the potential once per distinct sequence, where there is a choice; the
            samples are the same.
        """
        options = {**self.options(problem, size), "num_runs": runs, "store_path": False}
        if not cache and "cache" in (f.name for f in fields(methods()[self.method])):
            options["cache"] = False
        if problem.power != 1:
            options["compose"] = lambda chain: Power(chain, problem.power)
        program = SMC(problem.chain, problem.log_potential, method=self.method, **options)
        return program.run(seed=seed)


def _particles(**options: Any) -> Sized:
    return lambda problem, size: {"num_particles": size, **options}


def _children(lineages: int, **options: Any) -> Sized:
    own = {"num_particles": lineages, **options}
    return lambda problem, size: {"num_children": size // lineages, **own}


def _tempered(problem: Problem, size: int) -> Options:
    # A particle is masked and revealed again at every stage: several times the rows of its path.
    return {"num_particles": max(2, size // 7), "powers": POWERS}


def _exact(problem: Problem, size: int) -> Options:
    return {"num_particles": size, "twist": problem.exact_twist}


_WIDE = BASES * FILLS.num_fills
_ASKING, _CLAMPED = _particles(twist=FILLS), _particles(twist=FILLS, clamp=True)

METHODS = (
    Method("importance", "importance-sampling", _particles(), plain=(None, 0.0)),
    Method("best-of-n", "best-of-n", _particles()),
    Method("beam", "beam", _particles(num_children=4)),
    Method("svdd argmax, published", "soft-value", _children(1, alpha=0.0, weighted=False)),
    Method("svdd soft, published", "soft-value", _children(1, weighted=False)),
    Method("svdd weighted, argmax", "soft-value", _children(4, twist="argmax")),
    Method("svdd weighted, persistent", "soft-value", _children(4, twist=FILLS), 16),
    Method("difference, argmax", "steering", _particles(twist="argmax"), plain=("argmax", 0.5)),
    Method("difference, defensive", "steering", _particles(), 5, plain=("defensive", 0.5)),
    Method("difference, persistent", "steering", _ASKING, 16, plain=(FILLS, 0.5)),
    Method("corrector, argmax", "corrector", _particles(twist="argmax")),
    Method(
        "corrector, clamped persistent", "corrector", _particles(twist=FILLS, clamp=True), _WIDE
    ),
    Method("clamped, argmax", "twisted", _particles(twist="argmax"), BASES),
    Method("clamped, persistent", "twisted", _ASKING, _WIDE),
    Method("surprise, persistent", "twisted", _particles(twist=FILLS, surprise=True), _WIDE),
    Method("reweighted, persistent", "twisted", _particles(twist=FILLS, proposal="reweighted"), 16),
    Method("tempering", "tempering", _tempered),
    Method("exact twist", "twisted", _exact, BASES),
)


def methods_of(problem: Problem) -> tuple[Method, ...]:
    """Return the methods that can target a problem.

    :param problem: the problem; only correctors take a power of the prior.
    """
    return tuple(m for m in METHODS if problem.power == 1 or m.method == "corrector")


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a method returned over all runs.

    :param codes: the sequences of all particles, by
        :func:`~ppl_diffusion.testing.state_index`, ``(R, N)``.
    :param weights: their weights, normalised in each run, ``(R, N)``.
    :param draws: one weighted draw per run, int64 ``(R, L)``.
    :param log_evidence: estimates of ``log Z``, ``(R,)``.
    :param exact: whether the method claims the target, and its evidence means anything.
    :param evaluations: network rows of one run.
    :param potential_calls: sequences one run asked the potential about.
    :param seconds: time per run.
    """

    codes: Tensor
    weights: Tensor
    draws: Tensor
    log_evidence: Tensor
    exact: bool
    evaluations: float
    potential_calls: float
    seconds: float

    def means(self, values: Tensor) -> Tensor:
        """Return each run's estimate of a posterior expectation, ``(R,)``.

        :param values: of every sequence, ``(4 ** L,)``.
        """
        return (self.weights * values[self.codes]).sum(-1)


def run_method(problem: Problem, method: Method, size: int, runs: int) -> Outcome:
    """Run a method many times, with the same random numbers for every problem.

    :param problem: the problem.
    :param method: the method.
    :param size: its size ``n``.
    :param runs: independent runs.
    """
    cost = [method.run(problem, size, 1, seed) for seed in range(min(COST_RUNS, runs))]
    batch = max(1, MAX_ELEMENTS // (size * method.num_fills * problem.length))
    started = time.perf_counter()
    posts = [
        # A look-up in a table is quicker than finding out whether it was asked before.
        method.run(problem, size, min(batch, runs - done), COST_RUNS + done, cache=False)
        for done in range(0, runs, batch)
    ]
    seconds = (time.perf_counter() - started) / runs
    generator = torch.Generator().manual_seed(runs)
    return Outcome(
        codes=torch.cat([state_index(post.x0, BASES) for post in posts]),
        weights=torch.cat([post.weights for post in posts]),
        draws=torch.cat([_draws(post, generator) for post in posts]),
        log_evidence=torch.cat([post.log_evidence for post in posts]),
        exact=posts[0].exact,
        evaluations=sum(post.num_evaluations for post in cost) / len(cost),
        potential_calls=sum(post.num_potential_calls for post in cost) / len(cost),
        seconds=seconds,
    )


def two_sided_gap(problem: Problem, method: Method, size: int) -> float | None:
    """Return the mean upper minus the mean lower bound of ``log Z``, in nats.

    :param problem: the problem.
    :param method: the method; None is returned where it is not a plain Feynman-Kac model.
    :param size: its size ``n``.
    """
    if method.plain is None:
        return None
    twist, threshold = method.plain
    generator = torch.Generator().manual_seed(size)
    return two_sided_evidence(
        FeynmanKac(problem.chain, problem.log_potential, twist=twist),
        problem.draw_paths(GAP_RUNS, generator),
        num_particles=size,
        ess_threshold=threshold,
        generator=generator,
    ).gap


def twist_error(problem: Problem, twist: FillTwist, num: int = 2000) -> float:
    """Return the spread of a twist around the exact value, in nats.

    It is taken over states with half of the positions revealed, on exact posterior paths: what the
    twist gets wrong there is noise in the weights of the particles that matter.

    :param problem: the problem.
    :param twist: completes unfinished sequences.
    :param num: number of states.
    """
    generator, k = torch.Generator().manual_seed(0), problem.length // 2
    state = problem.draw_paths(num, generator)[None, :, k]
    shape = (1, num, problem.length)
    noise = twist.uniforms(twist.init(shape, generator), shape, generator)
    filled = twist.fill(problem.chain.kernel.completions({"tokens": state}, k), noise)
    guess = log_mean_exp(problem.log_potential(filled), 2)
    return float((guess - problem.exact_twist({"tokens": state}, k)).std())


def _draws(post: ParticlePosterior, generator: torch.Generator) -> Tensor:
    drawn: Tensor = post.resample(1, generator=generator, pooled=False)["x0"][:, 0]
    return drawn
