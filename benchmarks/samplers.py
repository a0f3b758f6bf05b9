"""What a masked sampler costs beyond its network calls, against a dense float64 baseline.

One run, one random backbone, ratios. ``wall_ratio`` is the time of the dense sampler of
:mod:`benchmarks._dense_baseline` over that of ``ReverseChain.sample`` for the same chain; where the
dense sampler would take hours, evenly spaced steps of a real trajectory are timed and scaled up,
and the table says so. ``above_network`` is the time of our sampler outside the network over the
time inside it, in the same run. ``memory_ratio`` compares what the two samplers add to the peak of
a fresh process. First hitting and a Psi sampler are there for information.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Literal

import torch
from rich.console import Console
from torch import Tensor

from benchmarks._dense_baseline import DenseCost, DenseSampler, dense_cost
from benchmarks._report import Row, run, table
from benchmarks._sampler_profile import measure_profile
from benchmarks._stopwatch import Stopwatch
from benchmarks.memory import in_own_process, peak_gb
from ppl_diffusion.denoisers.config import TransformerConfig
from ppl_diffusion.denoisers.transformer import Transformer
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.kernels import Absorbing, InterpolatingKernel, Kernel, first_hitting, psi

WALL_GOAL, ABOVE_GOAL = 10.0, 0.05
DIM, DEPTH = 128, 3
"""Size of the backbone; with a larger one everything but the network weighs less."""

MEGABYTE = 1e-3
"""In GB: less than the system resolves."""

ETA = 0.01
"""Remasking probability of the Psi sampler, ReMDM-cap."""

Method = Literal["ancestral", "first hitting", "psi"]


class AtLeast(Row):
    """A measured number whose goal is the smallest acceptable value."""

    @property
    def ok(self) -> bool | None:
        """Whether the goal is met, None where there is none."""
        return None if self.goal is None else self.value >= self.goal


@dataclass(frozen=True)
class Setting:
    """One line of a table.

    :param vocab_size: number of clean tokens ``V``.
    :param length: number of positions ``L``.
    :param num_steps: number of steps ``N``; first hitting takes ``L`` instead.
    :param batch: rows ``B``.
    :param repeats: timed runs of our sampler.
    :param dense_steps: steps of the dense sampler to time.
    :param method: which of our samplers.
    :param goals: whether the goals apply.
    """

    vocab_size: int
    length: int
    num_steps: int
    batch: int = 1
    repeats: int = 3
    dense_steps: int = 0
    method: Method = "ancestral"
    goals: bool = False

    @property
    def suffix(self) -> str:
        """What names of rows end in."""
        batch = f"_b{self.batch}" if self.vocab_size < 100 else ""
        return f"v{self.vocab_size}_l{self.length}_n{self.num_steps}{batch}"


def backbone(vocab_size: int, length: int, *, dim: int = DIM, depth: int = DEPTH) -> Transformer:
    """Return the random network that every row uses.

    :param vocab_size: number of clean tokens ``V``.
    :param length: longest sequence.
    :param dim: width.
    :param depth: blocks.
    """
    torch.manual_seed(0)
    config = TransformerConfig(vocab_size, vocab_size + 1, length, dim=dim, depth=depth)
    network = Transformer(config).eval().requires_grad_(False)
    torch.nn.init.normal_(network.vocabulary.weight, std=0.3)  # fresh ones predict nothing
    return network


@dataclass(frozen=True)
class Timing:
    """One timed run of our sampler.

    :param wall: all of it, seconds.
    :param network: inside the network, seconds.
    :param calls: network calls.
    :param rows: rows these saw.
    :param head_rows: positions whose vocabulary was computed.
    """

    wall: float
    network: float
    calls: int
    rows: int
    head_rows: int

    @property
    def above(self) -> float:
        """Time outside the network over time inside it."""
        return (self.wall - self.network) / self.network


def make_kernel(setting: Setting, network: Transformer | Stopwatch) -> Kernel:
    """Return our kernel.

    :param setting: which one.
    :param network: its denoiser.
    """
    process = Absorbing(setting.vocab_size)
    if setting.method == "first hitting":
        return first_hitting(process, network, length=setting.length)
    if setting.method == "psi":
        schedule = psi.remdm_cap(process.schedule, setting.num_steps, eta=ETA)
        return InterpolatingKernel(process, network, psi=schedule)
    return InterpolatingKernel(process, network, num_steps=setting.num_steps)


def time_ours(setting: Setting, network: Transformer, seed: int) -> tuple[Timing, Tensor]:
    """Time one run of our sampler.

    :param setting: what to run.
    :param network: the backbone.
    :param seed: seed of the run.
    :returns: the timing and the paths, int64 ``(B, T + 1, L)``.
    """
    watch = Stopwatch(network)
    chain = ReverseChain(make_kernel(setting, watch), setting.length)
    generator = torch.Generator().manual_seed(seed)
    started = time.perf_counter()
    path = chain.sample((setting.batch,), generator=generator)
    wall = time.perf_counter() - started
    return Timing(wall, watch.seconds, watch.calls, watch.rows, watch.head_rows), path


def measure_setting(setting: Setting, network: Transformer) -> Iterator[Row]:
    """Time our sampler and the dense one.

    :param setting: what to run.
    :param network: the backbone.
    """
    if setting.method != "first hitting":
        time_ours(replace(setting, num_steps=2), network, 0)
    runs = [time_ours(setting, network, seed) for seed in range(setting.repeats)]
    timings, path = [timing for timing, _ in runs], runs[-1][1]
    yield _above(setting, timings)
    if setting.dense_steps:
        kernel = InterpolatingKernel(
            Absorbing(setting.vocab_size), network, num_steps=setting.num_steps
        )
        yield _ratio(setting, timings, dense_cost(DenseSampler(kernel), path, setting.dense_steps))


def _above(setting: Setting, timings: list[Timing]) -> Row:
    shares = [timing.above for timing in timings]
    coordinates = {
        **_coordinates(setting),
        "ratio_min": min(shares),
        "ratio_max": max(shares),
        "seconds": median(t.wall for t in timings),
        "evaluations": round(median(t.rows for t in timings)),
        "network_calls": round(median(t.calls for t in timings)),
        "head_rows": round(median(t.head_rows for t in timings)),
        "head_rows_dense": setting.batch * setting.length * timings[-1].calls,
    }
    name = "above_network" if setting.method == "ancestral" else "above_network_other"
    goal = ABOVE_GOAL if setting.goals else None
    return Row(f"{name}_{setting.suffix}", median(shares), "ratio", len(shares), goal, coordinates)


def _ratio(setting: Setting, timings: list[Timing], dense: DenseCost) -> Row:
    seconds = median(t.wall for t in timings)
    coordinates = {
        **_coordinates(setting),
        "seconds": seconds,
        "network_calls": timings[-1].calls,
        "dense_seconds": dense.seconds,
        "dense_network_calls": dense.calls,
        "dense_steps_timed": dense.num_measured,
        "extrapolated": dense.num_measured < dense.num_steps,
    }
    goal = WALL_GOAL if setting.goals else None
    ratio, name = dense.seconds / seconds, f"wall_ratio_{setting.suffix}"
    return AtLeast(name, ratio, "ratio", len(timings), goal, coordinates)


def _coordinates(setting: Setting) -> dict[str, object]:
    return {
        "method": setting.method,
        "vocab_size": setting.vocab_size,
        "length": setting.length,
        "num_steps": setting.num_steps,
        "batch": setting.batch,
        "backbone": f"{DEPTH} x {DIM}",
        "threads": torch.get_num_threads(),
    }


def resident_gb() -> float:
    """Return the size of this process now, in GB; its peak where the system does not tell."""
    pages = Path("/proc/self/statm")
    if not pages.exists():
        return peak_gb()
    return int(pages.read_text().split()[1]) * resource.getpagesize() / 1e9


def our_memory(setting: Setting) -> float:
    """Return how many GB a run of our sampler adds to the peak of this process.

    :param setting: what to run.
    """
    network = backbone(setting.vocab_size, setting.length)
    before = resident_gb()
    time_ours(setting, network, 0)
    return max(peak_gb() - before, MEGABYTE)


def dense_memory(setting: Setting) -> float:
    """Return how many GB two steps of the dense sampler add to the peak of this process.

    :param setting: what to run.
    """
    network = backbone(setting.vocab_size, setting.length)
    kernel = InterpolatingKernel(Absorbing(setting.vocab_size), network, num_steps=2)
    before = resident_gb()
    generator = torch.Generator().manual_seed(0)
    DenseSampler(kernel).sample(setting.batch, setting.length, generator)
    return max(peak_gb() - before, MEGABYTE)


def measure_memory(setting: Setting) -> Row:
    """Measure the peak memory of both samplers, each in a process of its own.

    :param setting: what to run.
    """
    ours, dense = (in_own_process(usage, setting) for usage in (our_memory, dense_memory))
    coordinates = {**_coordinates(setting), "ours_gb": ours, "dense_gb": dense}
    return Row(f"memory_ratio_{setting.suffix}", dense / ours, "ratio", 1, None, coordinates)


def plan(quick: bool) -> list[Setting]:
    """Return what is run.

    :param quick: fewer repeats and dense steps, the large batch on a coarse grid only.
    """
    once = 1 if quick else 3
    large = Setting(50_257, 1024, 64, repeats=3, dense_steps=4 if quick else 16, goals=True)
    fine = replace(large, num_steps=1024, repeats=once)
    walk = replace(large, method="psi", repeats=once, dense_steps=0, goals=False)
    settings = [large, fine, walk]
    if not quick:
        settings += [replace(walk, num_steps=1024), replace(walk, method="first hitting")]
    return settings + [setting for batch in (1, 16, 256) for setting in _small(batch, quick)]


def _small(batch: int, quick: bool) -> list[Setting]:
    """Return the lines of one batch size at ``V = 5``, ``L = 200``."""
    steps = {1: 1024, 16: 64, 256: 4 if quick else 8}[batch]
    once = batch == 256 or (quick and batch > 1)
    coarse = Setting(5, 200, 64, batch, repeats=1 if once else 3, dense_steps=steps)
    if quick and batch == 256:
        return [replace(coarse, num_steps=16)]
    alone = replace(coarse, dense_steps=0, repeats=1 if quick else coarse.repeats)
    others = [replace(alone, method="psi"), replace(alone, method="first hitting")]
    return [coarse, replace(coarse, num_steps=1024), *others[: 1 if quick and batch > 1 else 2]]


def measure(quick: bool, console: Console) -> list[Row]:
    """Time our masked samplers against a dense float64 one, and against the bare network.

    :param quick: fewer repeats and dense steps, the large batch on a coarse grid only.
    :param console: where the tables go.
    """
    settings = plan(quick)
    # First, as the peak of a new process is never below that of the one which started it.
    rows = [
        measure_memory(replace(settings[0], num_steps=steps))
        for steps in ((64,) if quick else (64, 1024))
    ]
    networks = {(s.vocab_size, s.length): backbone(s.vocab_size, s.length) for s in settings}
    for setting in settings:
        rows += measure_setting(setting, networks[setting.vocab_size, setting.length])
        console.print(_progress(setting, rows[-1]), highlight=False)
    print_tables(rows, console)
    return rows + measure_profile(console)


def _progress(setting: Setting, row: Row) -> str:
    return f"{setting.method}, {setting.suffix}: {row.coordinates['seconds']:.2f} s"


def print_tables(rows: list[Row], console: Console) -> None:
    """Print what was measured.

    :param rows: all rows.
    :param console: where the tables go.
    """
    ratios = [row for row in rows if row.name.startswith("wall_ratio")]
    _print_ratios(ratios, [row for row in rows if row.name.startswith("memory")], console)
    _print_above([row for row in rows if row.name.startswith("above")], console)


def _print_ratios(ratios: list[Row], memories: list[Row], console: Console) -> None:
    made = table(
        f"Ancestral sampling against dense float64 tables, {_machine()}",
        ["V, L, B, N", "ours s", "dense s", "timed", "ratio", "goal", "calls", "dense calls"],
        "timed: dense steps timed; fewer than N means that 'dense s' is scaled up from them, with\n"
        "the network calls that its cache saves counted on the whole trajectory",
    )
    for row in ratios:
        c = row.coordinates
        timed = "all" if not c["extrapolated"] else f"{c['dense_steps_timed']} of {c['num_steps']}"
        cells = [f"{c['seconds']:.2f}", f"{c['dense_seconds']:.1f}", timed, f"{row.value:.1f}"]
        made.add_row(_where(row), *cells, _verdict(row, ">="), *_calls(c))
    for row in memories:
        c = row.coordinates
        cells = [f"{c['ours_gb']:.3f} GB", f"{c['dense_gb']:.3f} GB", "peak", f"{row.value:.1f}"]
        made.add_row(f"{_where(row)}, memory", *cells)
    console.print(made)


def _print_above(rows: list[Row], console: Console) -> None:
    made = table(
        f"Our samplers and their network, {_machine()}",
        ["V, L, B, N", "method", "s", "above network (min-max)", "goal", "calls", "head rows"],
        "above network: time outside the network over time inside it, median of the runs;\n"
        f"head rows: positions whose vocabulary was computed; psi: ReMDM-cap, eta {ETA:g}",
    )
    for row in rows:
        c = row.coordinates
        span = f"{row.value:.1%} ({c['ratio_min']:.1%}-{c['ratio_max']:.1%})"
        counts = (f"{c['network_calls']:,}", f"{c['head_rows']:,}")
        made.add_row(
            _where(row), c["method"], f"{c['seconds']:.2f}", span, _verdict(row, "<="), *counts
        )
    console.print(made)


def _machine() -> str:
    return f"backbone {DEPTH} x {DIM}, {torch.get_num_threads()} thread(s)"


def _calls(c: dict[str, object]) -> tuple[str, str]:
    return f"{c['network_calls']:,}", f"{c['dense_network_calls']:,}"


def _where(row: Row) -> str:
    c = row.coordinates
    steps = c["length"] if c["method"] == "first hitting" else c["num_steps"]
    return f"{c['vocab_size']:,}, {c['length']}, {c['batch']}, {steps}"


def _verdict(row: Row, sign: str) -> str:
    if row.goal is None:
        return ""
    return f"{sign} {row.goal:g}: {'[green]met[/]' if row.ok else '[red]missed[/]'}"


if __name__ == "__main__":
    run(measure)
