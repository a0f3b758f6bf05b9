"""What caches and batches save: the same samples for fewer questions, asked all at once.

With caches a program asks its network once per distinct row and its potential once per distinct
sequence; without them every particle pays for itself. For each program both are run from the same
seeds: that samples and evidences are the same is asserted, and ``rows_saved``, ``calls_saved`` and
``time_ratio`` are the ratios of what is paid, uncached over cached, measured in turns in this run.

A batch is one call of the potential's function, or of the network, with any number of rows. All
children and all completions of a step are one batch: ``batches_per_step`` (without caches, which
leave batches out) is the same for few and for many particles, children and completions. A step
asks its network twice, to move and to look ahead, about the same rows: without resampled copies,
caches would still save half of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from torch import Tensor

from benchmarks._paths import ordered
from benchmarks._problems import Problem
from benchmarks._report import Row, run, table
from ppl_diffusion import models
from ppl_diffusion.denoisers import Denoiser, EvaluatedDenoiser
from ppl_diffusion.denoisers.base import Wrapper
from ppl_diffusion.denoisers.evaluation import Rows
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.inference import SMC
from ppl_diffusion.kernels import OrderedKernel
from ppl_diffusion.programs.sources import UncachedPotential
from ppl_diffusion.smc import ParticlePosterior, PersistentFill

PRIOR, GROUP = "yeast-promoter", 8
"""The shipped prior, and how many positions it reveals per step here."""

LogPotential = Callable[[Tensor], Tensor]


class UncachedDenoiser(EvaluatedDenoiser):
    """Every row that is asked for, as often as it is asked for."""

    def _hidden(self, tokens: Tensor, t: float | Tensor, **given: Tensor) -> Tensor:
        return self._evaluate(Rows.of(tokens, given, t)).reshape(*tokens.shape, -1)


UNCACHED = {
    "ppl_diffusion.smc.feynman_kac.EvaluatedDenoiser": UncachedDenoiser,
    "ppl_diffusion.programs.sources.EvaluatedPotential": UncachedPotential,
}
"""What stands for each cache where it is taken away."""


@contextlib.contextmanager
def caches(on: bool) -> Iterator[None]:
    """Run with caches, or without any.

    :param on: whether with them.
    """
    with contextlib.ExitStack() as stack:
        for name, plain in UNCACHED.items() if not on else ():
            stack.enter_context(patch(name, plain))
        yield


class CountedDenoiser(Wrapper):
    """A denoiser that counts its batches.

    :param denoiser: the denoiser.

    :ivar batches: calls so far.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser, self.batches = denoiser, 0
        self.adopt(denoiser)

    def __call__(self, tokens: Tensor, t: float | Tensor, /) -> Tensor:
        """Return the denoiser's output."""
        self.batches += 1
        return self.denoiser(tokens, t)


class CountedPotential:
    """A log-potential that counts its batches.

    :param fn: the log-potential.

    :ivar batches: calls so far.
    """

    def __init__(self, fn: LogPotential) -> None:
        self.fn, self.batches = fn, 0

    def __call__(self, x0: Tensor) -> Tensor:
        """Return the log-potential."""
        self.batches += 1
        return self.fn(x0)


@dataclass(frozen=True)
class Size:
    """How much of everything there is.

    :param particles: particles per run.
    :param runs: runs.
    :param children: children per lineage, where there are any.
    :param fills: completions per state, where there are any.
    """

    particles: int
    runs: int = 2
    children: int = 4
    fills: int = 4

    @property
    def larger(self) -> Size:
        """Twice as much of everything."""
        return Size(2 * self.particles, 2 * self.runs, 2 * self.children, 2 * self.fills)


def smc(
    chain: ReverseChain,
    log_g: LogPotential,
    size: Size,
    seed: int,
    method: str = "smc",
    **options: Any,
) -> ParticlePosterior:
    """Run a method on a bare chain; most look ahead by the likeliest completion."""
    shape = {"num_particles": size.particles, "num_runs": size.runs, "max_rows": None}
    options = {"twist": "argmax", **options}
    return SMC(chain, log_g, method=method, **shape, **options).run(seed=seed)


def steering(chain: ReverseChain, log_g: LogPotential, size: Size, seed: int) -> ParticlePosterior:
    """Run steering by persistent completions."""
    return smc(chain, log_g, size, seed, "steering", twist=PersistentFill(size.fills))


def soft_value(
    chain: ReverseChain, log_g: LogPotential, size: Size, seed: int
) -> ParticlePosterior:
    """Run soft-value guidance by the likeliest completion of each child."""
    return smc(chain, log_g, size, seed, "soft-value", num_children=size.children)


def twisted(chain: ReverseChain, log_g: LogPotential, size: Size, seed: int) -> ParticlePosterior:
    """Run the clamped look-ahead by persistent completions of every child."""
    return smc(chain, log_g, size, seed, "twisted", twist=PersistentFill(size.fills))


Method = Callable[[ReverseChain, LogPotential, Size, int], ParticlePosterior]
METHODS: dict[str, Method] = {
    "smc": smc,
    "steering": steering,
    "soft-value": soft_value,
    "twisted": twisted,
}


@dataclass(frozen=True)
class Plan:
    """One problem and how large it is run.

    :param problem: how tables call it.
    :param size: size of the timed runs.
    :param repeats: timed runs, with and without caches each.
    """

    problem: str
    size: Size
    repeats: int


FULL = (Plan("B1", Size(64), 5), Plan(PRIOR, Size(32), 3))
QUICK = (Plan("B1", Size(16), 3), Plan(PRIOR, Size(8), 1))


def chain_of(problem: str) -> tuple[ReverseChain, LogPotential]:
    """Return a masked chain and a cheap log-potential.

    :param problem: ``"B0"``, ``"B1"`` or the name of a shipped masked prior.
    """
    if problem.startswith("B"):
        toy = Problem.load(problem)
        return ordered(toy.chain(1)), toy.log_potential
    prior: Any = models.load(problem)
    kernel = OrderedKernel(prior.process, prior.denoiser, length=prior.length, group_size=GROUP)
    return ReverseChain(kernel, prior.length), _gc_steps


def _gc_steps(x0: Tensor) -> Tensor:
    """Return two nats for each CG: a motif that neighbours have to agree on."""
    return 2.0 * ((x0[..., :-1] == 1) & (x0[..., 1:] == 2)).sum(-1)


def measure_method(plan: Plan, name: str) -> Iterator[Row]:
    """Compare a program with caches and without.

    :param plan: the plan.
    :param name: one of :data:`METHODS`.
    """
    chain, log_g = chain_of(plan.problem)
    found: dict[bool, list[ParticlePosterior]] = {True: [], False: []}
    for seed in range(plan.repeats):
        for on in (True, False):
            with caches(on):
                found[on].append(METHODS[name](chain, log_g, plan.size, seed))
    for cached, plain in zip(found[True], found[False], strict=True):
        require_same(cached, plain)
    where = {"problem": plan.problem, "method": name, "num_particles": plan.size.particles}
    for what, paid in (
        ("rows_saved", lambda p: p.num_evaluations),
        ("calls_saved", lambda p: p.num_potential_calls),
        ("time_ratio", lambda p: p.seconds),
    ):
        ratio = median(map(paid, found[False])) / median(map(paid, found[True]))
        yield Row(what, ratio, "uncached / cached", plan.repeats, coordinates=where)
    yield from _batches(chain, log_g, plan, name, where)


def require_same(cached: ParticlePosterior, plain: ParticlePosterior) -> None:
    """Refuse results of one seed that differ.

    :param cached: with caches.
    :param plain: without.
    :raises AssertionError: if they differ in a token, or in an evidence by more than a network in
        single precision differs between batches of another size.
    """
    same = torch.equal(cached.x0, plain.x0) and torch.allclose(
        cached.log_evidence, plain.log_evidence, rtol=1e-5, atol=1e-5
    )
    if not same:
        raise AssertionError("caches change the samples; they may change nothing but the cost.")


def _batches(
    chain: ReverseChain, log_g: LogPotential, plan: Plan, name: str, where: dict[str, Any]
) -> Iterator[Row]:
    # More particles, children and completions make larger batches, not more of them.
    few = count_batches(chain, log_g, METHODS[name], Size(4))
    many = count_batches(chain, log_g, METHODS[name], Size(4).larger)
    for what, small, large in zip(("network", "potential"), few, many, strict=True):
        coordinates = {**where, "asked": what, "larger": large}
        if small != large:
            raise AssertionError(f"{name}: {what} batches per step go from {small} to {large}.")
        yield Row("batches_per_step", small, "batches", 1, coordinates=coordinates)


def count_batches(
    chain: ReverseChain, log_g: LogPotential, method: Method, size: Size
) -> tuple[float, float]:
    """Return batches per step of the network and of the potential, without caches.

    :param chain: the chain.
    :param log_g: the log-potential.
    :param method: the program.
    :param size: its size.
    """
    denoiser, potential = CountedDenoiser(chain.kernel.denoiser), CountedPotential(log_g)
    counted = ReverseChain(chain.kernel.with_denoiser(denoiser), chain.length)
    with caches(False):
        method(counted, potential, size, 0)
    return denoiser.batches / chain.num_steps, potential.batches / chain.num_steps


def measure(quick: bool, console: Console) -> list[Row]:
    """Compare programs with caches and without: same samples, other costs.

    :param quick: fewer particles and repeats.
    :param console: where the table goes.
    """
    rows: list[Row] = []
    for plan in QUICK if quick else FULL:
        found = {name: list(measure_method(plan, name)) for name in METHODS}
        _print(plan, found, console)
        rows += [row for each in found.values() for row in each]
    return rows


COLUMNS = ("rows saved", "calls saved", "time ratio", "network batches", "potential batches")


def _print(plan: Plan, found: dict[str, list[Row]], console: Console) -> None:
    size = plan.size
    made = table(
        f"{plan.problem}: {size.particles} particles x {size.runs} runs, {size.children} children, "
        f"{size.fills} completions; {plan.repeats} repeats",
        ["", "same samples", *COLUMNS],
        "Uncached over cached; batches per step without caches, equal for twice as many particles, "
        "runs,\nchildren and completions. Samples and evidences are compared for every seed.",
    )
    for name, rows in found.items():
        cells = (f"{row.value:.2f}" for row in rows)
        made.add_row(name, "yes", *cells)
    console.print(made)


if __name__ == "__main__":
    run(measure)
