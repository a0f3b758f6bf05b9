"""What the particle engine costs beyond its network calls.

``smc_over_network`` is the wall time of ``run_smc`` over the time spent inside the network during
that same run: 1 means that steering is free. The potential is trivial, so that a reward's own
cost does not enter, and is timed separately. Rows evaluated fall short of particles x steps
because each distinct row is evaluated once and kept while it does not change.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from benchmarks._report import Row, run, table, verdict
from benchmarks.network import part_rows
from ppl_diffusion import models
from ppl_diffusion.denoisers import Denoiser
from ppl_diffusion.denoisers.batching import rows_per_call
from ppl_diffusion.denoisers.config import TransformerConfig
from ppl_diffusion.denoisers.transformer import Transformer
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.kernels import Absorbing, InterpolatingKernel
from ppl_diffusion.smc import FeynmanKac, run_smc

PRIOR = "yeast-promoter"
GOAL = 1.05
LENGTH = 80


class TimedDenoiser:
    """A denoiser with a stopwatch.

    :param denoiser: what is timed.

    :ivar seconds: time spent inside it.
    :ivar rows: rows it saw.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = denoiser
        self.vocab_size, self.kind = denoiser.vocab_size, denoiser.kind
        self.time_free = denoiser.time_free
        self.rows_per_call = partial(rows_per_call, denoiser)
        self.seconds, self.rows = 0.0, 0

    def __call__(self, tokens: Tensor, t: float | Tensor, /) -> Tensor:
        """Return the denoiser's output."""
        started = time.perf_counter()
        output = self.denoiser(tokens, t)
        self.seconds += time.perf_counter() - started
        self.rows += tokens[..., 0].numel()
        return output


class TimedPotential:
    """A trivial log-potential, the share of token 0, with a stopwatch."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self, x0: Tensor) -> Tensor:
        """Return the log-potential."""
        started = time.perf_counter()
        value = (x0 == 0).sum(-1) * (4.0 / x0.shape[-1])
        self.seconds += time.perf_counter() - started
        return value


@dataclass(frozen=True)
class Timing:
    """One timed run.

    :param wall: all of it, seconds.
    :param network: inside the network, seconds.
    :param potential: inside the potential, seconds.
    :param rows: rows the network saw.
    """

    wall: float
    network: float
    potential: float
    rows: int

    @property
    def ratio(self) -> float:
        """Wall time over network time."""
        return self.wall / self.network


@dataclass(frozen=True)
class Setting:
    """What is timed.

    :param prior: name of the network.
    :param chain: its reverse chain.
    :param num_particles: particles ``N``.
    """

    prior: str
    chain: ReverseChain
    num_particles: int = 256

    @property
    def rows_requested(self) -> int:
        """Particles x steps."""
        return self.num_particles * self.chain.num_steps

    def shortened(self, num_steps: int) -> ReverseChain:
        """Return the chain on a coarser grid.

        :param num_steps: number of its steps.
        """
        kernel = self.chain.kernel
        coarse = InterpolatingKernel(kernel.process, kernel.denoiser, num_steps=num_steps)
        return ReverseChain(coarse, self.chain.length)

    def timed(self) -> tuple[ReverseChain, TimedDenoiser]:
        """Return the chain around a fresh stopwatch."""
        stopwatch = TimedDenoiser(self.chain.kernel.denoiser)
        kernel = self.chain.kernel.with_denoiser(stopwatch)
        return ReverseChain(kernel, self.chain.length), stopwatch


def load_setting(console: Console, *, num_steps: int = 64, num_particles: int = 256) -> Setting:
    """Return the shipped prior's chain, or a random network of the same kind with a warning.

    :param console: where the warning goes.
    :param num_steps: number ``T`` of steps.
    :param num_particles: particles ``N``.
    """
    try:
        chain = models.load(PRIOR).chain(num_steps=num_steps)
        return Setting(PRIOR, chain, num_particles)
    except (ValueError, FileNotFoundError) as error:
        console.print(f"[yellow]A random network stands in for the shipped prior:[/] {error}")
    return Setting("random transformer", random_chain(num_steps), num_particles)


def random_chain(num_steps: int, **shape: Any) -> ReverseChain:
    """Return the chain of an untrained transformer over 80 bases.

    :param num_steps: number ``T`` of steps.
    :param shape: fields of :class:`TransformerConfig`.
    """
    network = Transformer(TransformerConfig(4, 5, LENGTH, **shape)).eval().requires_grad_(False)
    return ReverseChain(InterpolatingKernel(Absorbing(4), network, num_steps=num_steps), LENGTH)


def time_smc(setting: Setting, twist: str | None, seed: int) -> Timing:
    """Time one SMC run.

    :param setting: what to run.
    :param twist: name of the twist, or None.
    :param seed: seed of the run.
    """
    chain, network = setting.timed()
    potential = TimedPotential()
    model = FeynmanKac(chain, potential, twist=twist)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    started = time.perf_counter()
    run_smc(model, setting.num_particles, generator=generator)
    wall = time.perf_counter() - started
    return Timing(wall, network.seconds, potential.seconds, network.rows)


def time_chain(setting: Setting, seed: int) -> Timing:
    """Time the bare chain: every row goes to the network at every step.

    :param setting: what to run.
    :param seed: seed of the run.
    """
    chain, network = setting.timed()
    generator = torch.Generator().manual_seed(seed)
    started = time.perf_counter()
    chain.sample((setting.num_particles,), generator=generator)
    wall = time.perf_counter() - started
    return Timing(wall, network.seconds, 0.0, network.rows)


METHODS: dict[str, Callable[[Setting, int], Timing]] = {
    "SMC, no twist": lambda setting, seed: time_smc(setting, None, seed),
    "SMC, argmax twist": lambda setting, seed: time_smc(setting, "argmax", seed),
    "bare chain.sample": time_chain,
}
"""What is timed, in the order of the table; the first is the figure with the goal."""


def measure_timings(setting: Setting, repeats: int, methods: list[str]) -> dict[str, list[Timing]]:
    """Time the methods alternately, after a few untimed steps.

    :param setting: what to run.
    :param repeats: timed rounds.
    :param methods: keys of :data:`METHODS`.
    """
    warm_up = replace(setting, chain=setting.shortened(2))
    for name in methods:
        METHODS[name](warm_up, 0)
    timings: dict[str, list[Timing]] = {name: [] for name in methods}
    for seed in range(repeats):
        for name in methods:
            timings[name].append(METHODS[name](setting, seed))
    return timings


def summarise(setting: Setting, timings: dict[str, list[Timing]]) -> Iterator[Row]:
    """Return one row per method.

    :param setting: what was run.
    :param timings: from :func:`measure_timings`.
    """
    steps = setting.chain.num_steps
    for method, runs in timings.items():
        is_smc = method.startswith("SMC")
        coordinates = {
            "method": method,
            "prior": setting.prior,
            "num_particles": setting.num_particles,
            "num_steps": steps,
            "length": setting.chain.length,
            "ratio_min": min(t.ratio for t in runs),
            "ratio_max": max(t.ratio for t in runs),
            "step_ms": 1e3 * median(t.wall for t in runs) / steps,
            "network_ms": 1e3 * median(t.network for t in runs) / steps,
            "network_row_ms": 1e3 * median(t.network / t.rows for t in runs),
            "rows_per_call": rows_per_call(setting.chain.kernel.denoiser, setting.chain.length),
            "potential_ms": 1e3 * median(t.potential for t in runs) / steps,
            "evaluations": round(median(t.rows for t in runs)),
            "rows_requested": setting.rows_requested,
            "threads": torch.get_num_threads(),
        }
        name = "smc_over_network" if is_smc else "chain_over_network"
        ratio = median(t.ratio for t in runs)
        yield Row(name, ratio, "ratio", len(runs), GOAL if is_smc else None, coordinates)


def network_rows(setting: Setting, found: list[Row], repeats: int) -> Iterator[Row]:
    """Yield the network's own speed: a ratio to a slow network would prove little.

    :param setting: what was run.
    :param found: rows of :func:`summarise`.
    :param repeats: calls of the network beside its own matrix products.
    """
    c = found[0].coordinates
    yield Row("network_ms_per_row", c["network_row_ms"], "ms", found[0].n)
    yield Row("rows_per_call", c["rows_per_call"], "rows", 1)
    network = setting.chain.kernel.denoiser
    if isinstance(network, Transformer):
        with torch.no_grad():
            yield from part_rows(network, min(c["rows_per_call"], setting.num_particles), repeats)


def measure(quick: bool, console: Console) -> list[Row]:
    """Time SMC against its own network calls on the shipped prior.

    :param quick: leave the bare chain to one round.
    :param console: where the table goes.
    """
    setting = load_setting(console)
    timings = measure_timings(setting, 5, list(METHODS)[:2])
    timings |= measure_timings(setting, 1 if quick else 5, list(METHODS)[2:])
    rows = list(summarise(setting, timings))
    _print(setting, rows, console)
    own = list(network_rows(setting, rows, 10 if quick else 40))
    for row in own:
        console.print(f"{row.name} {row.value:.3g} {row.unit}")
    return rows + own


def _print(setting: Setting, rows: list[Row], console: Console) -> None:
    shape = f"N={setting.num_particles}, L={setting.chain.length}, T={setting.chain.num_steps}"
    made = table(
        f"{setting.prior}, {shape}, {torch.get_num_threads()} thread(s)",
        ["", "ratio (min-max)", "goal", "ms/step", "network", "potential", "rows", "of N x T"],
        "ratio: wall time over time inside the network in the same run, median of the runs",
    )
    for row in rows:
        c = row.coordinates
        made.add_row(
            c["method"],
            f"{row.value:.3f} ({c['ratio_min']:.3f}-{c['ratio_max']:.3f})",
            verdict(row),
            *(f"{c[key]:.2f}" for key in ("step_ms", "network_ms", "potential_ms")),
            f"{c['evaluations']:,}",
            f"{c['evaluations'] / c['rows_requested']:.0%} of {c['rows_requested']:,}",
        )
    console.print(made)


if __name__ == "__main__":
    run(measure)
