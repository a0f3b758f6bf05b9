"""The problems of the accuracy benchmark as cases: what is sampled, and what is known about it.

B0 and B1 tilt a masked chain, B2 takes powers of one, B3 products and guidance mixtures of two,
B4 powers and tilts of a chain of uniform noise, B5 tilts masked chains whose denoiser is wrong. A
case knows the law of its finite chain wherever that can be enumerated (*declared*), and the law
the chain stands for (*ideal*).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from benchmarks._paths import (
    PathTarget,
    chain_target,
    ordered,
    ordered_paths,
    power_target,
)
from benchmarks._problems import (
    ExactPosterior,
    Problem,
    declared_log_z,
    tabulated,
    total_variation,
)
from ppl_diffusion.denoisers import Denoiser
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.inference import Composition
from ppl_diffusion.testing import all_states, state_index

MAX_CELLS = 1000
"""Longest table of sequences whose distance is taken whole; beyond, that of single positions."""
FLOOR_REPEATS = 20


def tv_of(histogram: Tensor, other: Tensor) -> float:
    """Return the mean total variation between the rows of two histograms.

    :param histogram: masses ``(rows, cells)``.
    :param other: the same.
    """
    first, second = (h / h.sum(-1, keepdim=True) for h in (histogram, other))
    return float(total_variation(first, second).mean())


LogFunction = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Case:
    """A target with its exact answers.

    :param problem: ``"B0"`` to ``"B5"``.
    :param setting: what is sampled, in words.
    :param kernel: how the chain moves: ``"ordered"``, ``"time grid"`` or ``"uniform"``.
    :param target: the chain or the composition that programs are given.
    :param log_potential: ``log G``, or None where the composition is all.
    :param log_prior: ``log P`` of the ideal chain.
    :param ideal: the law the chain stands for.
    :param log_z_declared: log normalising constant of the finite chain's own target.
    :param declared: that target's law of ``x0``, or None where it is not enumerated.
    :param draw_paths: ``(n, generator)``, exact draws of whole paths, or None.
    """

    problem: str
    setting: str
    kernel: str
    target: ReverseChain | Composition
    log_potential: LogFunction | None
    log_prior: LogFunction
    ideal: ExactPosterior
    log_z_declared: float
    declared: ExactPosterior | None
    draw_paths: Callable[[int, torch.Generator], Tensor] | None = None

    @property
    def chain(self) -> ReverseChain:
        """The chain, or the first one of a composition."""
        return self.target if isinstance(self.target, ReverseChain) else self.target.chains[0]

    @property
    def num_steps(self) -> int:
        """Steps of the chain."""
        return self.chain.num_steps

    @property
    def reference(self) -> ExactPosterior:
        """What distances are measured to: the declared law where it is known."""
        return self.ideal if self.declared is None else self.declared

    @property
    def resolution(self) -> str:
        """What distances compare: whole ``"sequences"``, or single ``"positions"`` on average."""
        table = self.reference.table
        return "positions" if table is None or len(table) > MAX_CELLS else "sequences"

    def histogram(self, x0: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return the mass of every sequence ``(1, V ** L)``, or of every token ``(L, V)``.

        :param x0: int64 ``(n, L)``.
        :param weights: ``(n,)``, equal by default.
        """
        size = self.chain.kernel.process.vocab_size
        mass = torch.ones(len(x0), dtype=torch.float64) if weights is None else weights
        if self.resolution == "sequences":
            index = state_index(x0, size)
            return torch.bincount(index, mass, size ** x0.shape[-1])[None]
        hits = torch.nn.functional.one_hot(x0, size).to(torch.float64)
        return torch.einsum("nlv,n->lv", hits, mass)

    def distance(self, histogram: Tensor, law: ExactPosterior | None = None) -> float:
        """Return the total variation between an empirical law and an exact one.

        :param histogram: of what was drawn.
        :param law: the exact law, the reference by default.
        """
        law = law or self.reference
        if law.table is None or self.resolution == "positions":
            return tv_of(histogram, law.marginals)
        return tv_of(histogram, law.table[None])

    def floor(self, num: int) -> float:
        """Return the mean distance of so many exact draws.

        :param num: how many.
        """
        generator, draw = torch.Generator().manual_seed(1), self.reference.draw
        found = [self.distance(self.histogram(draw(num, generator))) for _ in range(FLOOR_REPEATS)]
        return sum(found) / FLOOR_REPEATS

    @cached_property
    def means(self) -> tuple[float | None, float | None]:
        """Exact means of ``log G`` and ``log P`` under the reference law, None where unknown."""
        table = self.reference.table
        if table is None:
            return None, None
        x0 = all_states(self.chain.kernel.process.vocab_size, self.chain.length)
        of_potential = None if self.log_potential is None else self.log_potential(x0) @ table
        return (
            None if of_potential is None else float(of_potential),
            float(self.log_prior(x0) @ table),
        )


@dataclass(frozen=True, eq=False)
class MarkovCase(Case):
    """A case too long to enumerate, whose means are derivatives of ``log Z``.

    :param markov: the problem the ideal law belongs to.
    """

    markov: Problem | None = None

    @cached_property
    def means(self) -> tuple[float | None, float | None]:
        """Exact means of ``log G`` and ``log P``: ``d log Z / d scale`` at scale 1."""
        assert self.markov is not None
        return _slope(self.markov.scaled), _slope(self.markov.annealed)


def _slope(family: Callable[[float], Problem], h: float = 1e-4) -> float:
    up, down = (family(1 + s).posterior.log_z for s in (h, -h))
    return (up - down) / (2 * h)


# --- B0, B1: a masked chain under a potential ----------------------------------------------------


def grid_case(name: str, num_steps: int) -> Case:
    """Return B0 or B1 on ``T`` equal time steps.

    :param name: ``"B0"`` or ``"B1"``.
    :param num_steps: number ``T`` of steps.
    """
    problem = Problem.load(name)
    chain, setting = problem.chain(num_steps), f"T={num_steps} equal time steps"
    common = (name, setting, "time grid", chain, problem.log_potential, problem.log_prior)
    if problem.posterior.table is None:
        log_z = declared_log_z(problem, num_steps)
        return MarkovCase(*common, problem.posterior, log_z, None, markov=problem)
    target = power_target([(chain, 1.0)], problem.log_potential)
    return Case(*common, problem.posterior, target.log_z, _law(target), target.draw)


def ordered_case(name: str) -> Case:
    """Return B0 or B1 with one position per step in random order, where declared is ideal.

    :param name: ``"B0"`` or ``"B1"``.
    """
    problem = Problem.load(name)
    chain, exact = ordered(problem.chain(1)), problem.posterior
    return MarkovCase(
        name,
        "one position per step",
        "ordered",
        chain,
        problem.log_potential,
        problem.log_prior,
        exact,
        exact.log_z,
        exact,
        _ordered_draws(exact, problem.vocab_size),
        markov=problem,
    )


# --- B2, B3: compositions of masked chains -------------------------------------------------------


def six() -> Problem:
    """Return the chain of B0 at length 6, MC-6."""
    return replace(Problem.load("B0"), length=6)


def other(problem: Problem, seed: int = 3) -> Problem:
    """Return a problem with another chain: softmax of standard normal logits.

    :param problem: the problem.
    :param seed: seed of the logits.
    """
    generator, size = torch.Generator().manual_seed(seed), problem.vocab_size
    logits = torch.randn(size + 1, size, generator=generator, dtype=torch.float64)
    probs = torch.softmax(logits, -1)
    return replace(problem, initial=probs[0], transition=probs[1:])


def composed_case(
    name: str,
    setting: str,
    compose: Callable[..., Composition],
    problems: Sequence[Problem],
    num_steps: int | None,
) -> Case:
    """Return a composition of masked chains with exact denoisers.

    :param name: ``"B2"`` or ``"B3"``.
    :param setting: the composition in words.
    :param compose: takes one chain per problem.
    :param problems: the chains' laws.
    :param num_steps: equal time steps, or None for one position per step.
    """
    chains = [problem.chain(num_steps or 1) for problem in problems]
    target = compose(*(chains if num_steps else map(ordered, chains)))
    return _composed(name, setting, target, problems, "time grid" if num_steps else "ordered")


def _composed(
    name: str, setting: str, target: Composition, problems: Sequence[Problem], kernel: str
) -> Case:
    size, length = problems[0].vocab_size, problems[0].length
    x0 = all_states(size, length)
    log_joint = torch.zeros(len(x0), dtype=torch.float64)
    for problem, exponent in zip(problems, target.exponents, strict=True):
        log_joint = log_joint + exponent * problem.log_prior(x0)
    ideal = tabulated(log_joint, size, length)
    common = (name, setting, kernel, target, None, problems[0].log_prior, ideal)
    if kernel == "ordered":
        return Case(*common, ideal.log_z, ideal, _ordered_draws(ideal, size))
    paths = power_target(target.experts)
    return Case(*common, paths.log_z, _law(paths), paths.draw)


# --- B4: uniform noise ---------------------------------------------------------------------------


def uniform_power_case(length: int, num_steps: int, compose: Callable[..., Composition]) -> Case:
    """Return a power of the chain of B0, at any length, under uniform noise.

    :param length: number ``L`` of positions.
    :param num_steps: number of steps ``K``.
    :param compose: takes the chain.
    """
    problem = replace(Problem.load("B0"), length=length)
    target = compose(problem.uniform_chain(num_steps))
    setting = f"{target.law}, L={length}, K={num_steps}"
    return _composed("B4", setting, target, [problem], "uniform")


def uniform_tilt_case(length: int, num_steps: int) -> Case:
    """Return the potential of B0, at any length, over a chain of uniform noise.

    :param length: number ``L`` of positions.
    :param num_steps: number of steps ``K``.
    """
    problem = replace(Problem.load("B0"), length=length)
    chain = problem.uniform_chain(num_steps)
    paths = power_target([(chain, 1.0)], problem.log_potential)
    return Case(
        "B4",
        f"p * G, L={length}, K={num_steps}",
        "uniform",
        chain,
        problem.log_potential,
        problem.log_prior,
        problem.posterior,
        paths.log_z,
        _law(paths),
        paths.draw,
    )


# --- B5: wrong denoisers -------------------------------------------------------------------------


class PerturbedDenoiser:
    """A denoiser with errors of its own in every state.

    :param base: the right denoiser, of short sequences.
    :param length: number ``L`` of positions.
    :param noise: standard deviation of the error of each logit.
    :param uniform: share of the uniform law mixed in.
    :param seed: seed of the errors.
    """

    def __init__(
        self,
        base: Denoiser,
        length: int,
        *,
        noise: float = 0.0,
        uniform: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.base, self.uniform = base, uniform
        self.vocab_size, self.kind, self.time_free = base.vocab_size, base.kind, base.time_free
        generator, size = torch.Generator().manual_seed(seed), base.vocab_size
        shape = ((size + 1) ** length, length, size)
        self.errors = noise * torch.randn(shape, generator=generator, dtype=torch.float64)

    def __call__(self, tokens: Tensor, t: float | Tensor, /) -> Tensor:
        """Return wrong log-probabilities, ``(*batch, L, V)``."""
        index = state_index(tokens, self.vocab_size + 1)
        wrong = torch.log_softmax(self.base(tokens, t) + self.errors[index], -1)
        return torch.log((1 - self.uniform) * wrong.exp() + self.uniform / self.vocab_size)


def perturbed_case(*, noise: float = 0.0, uniform: float = 0.0) -> Case:
    """Return B0 with a wrong denoiser, one position per step: its order matters.

    :param noise: standard deviation of the error of each logit in each state (seed 0).
    :param uniform: share of the uniform law mixed in.
    """
    problem = Problem.load("B0")
    right = problem.chain(1)
    wrong = PerturbedDenoiser(right.kernel.denoiser, problem.length, noise=noise, uniform=uniform)
    chain = ordered(ReverseChain(right.kernel.with_denoiser(wrong), length=problem.length))
    target = chain_target(chain, problem.log_potential)
    return Case(
        "B5",
        f"logit noise {noise:g}" if noise else f"{uniform:g} uniform mixed in",
        "ordered",
        chain,
        problem.log_potential,
        problem.log_prior,
        problem.posterior,
        target.log_z,
        _law(target),
        target.draw,
    )


def _law(target: PathTarget) -> ExactPosterior:
    size, length = target.vocab_size, target.states.shape[1]
    return replace(tabulated(target.x0_law().log(), size, length), log_z=target.log_z)


def _ordered_draws(exact: ExactPosterior, mask: int) -> Callable[[int, torch.Generator], Tensor]:
    def draw(num: int, generator: torch.Generator) -> Tensor:
        return ordered_paths(exact.draw(num, generator), mask, generator)

    return draw
