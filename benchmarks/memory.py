"""Peak memory of very large particle populations, each measured in a process of its own.

``smc_peak_memory`` is a whole run with 100,000 particles over 80 bases and 64 steps, paths not
stored. Its denoiser is the exact one of a Markov chain: a transformer would have to see some four
million distinct rows, and its own memory is that of one chunk of rows whatever the number of
particles. ``network_peak_memory`` shows that: one step's worth of distinct rows through the
shipped prior.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import torch
from rich.console import Console
from torch import Tensor

from benchmarks._problems import Problem
from benchmarks._report import Row, run, table, verdict
from benchmarks.overhead import LENGTH, load_setting
from ppl_diffusion.denoisers import EvaluatedDenoiser, MarkovDenoiser
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.kernels import Absorbing, InterpolatingKernel
from ppl_diffusion.smc import FeynmanKac, run_smc

GOAL_GB = 8.0
Usage = tuple[float, float, int]


def peak_gb() -> float:
    """Return the largest resident size of this process so far, in GB (1e9 bytes)."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def smc_usage(num_particles: int, num_steps: int, twist: str) -> Usage:
    """Run SMC without stored paths.

    :param num_particles: particles ``N``.
    :param num_steps: steps ``T``.
    :param twist: name of the twist.
    :returns: peak GB, seconds, network rows.
    """
    law, process = Problem.load("B1"), Absorbing(4)
    denoiser = MarkovDenoiser(law.initial, law.transition, process)
    kernel = InterpolatingKernel(process, denoiser, num_steps=num_steps)
    model = FeynmanKac(ReverseChain(kernel, LENGTH), _potential, twist=twist)  # type: ignore[arg-type]
    started = time.perf_counter()
    generator = torch.Generator().manual_seed(0)
    post = run_smc(model, num_particles, generator=generator, store_path=False)
    return peak_gb(), time.perf_counter() - started, post.num_evaluations


def network_usage(num_rows: int) -> Usage:
    """Evaluate distinct half-masked rows with the shipped prior.

    :param num_rows: number of rows.
    :returns: peak GB, seconds, network rows.
    """
    setting = load_setting(Console(stderr=True))
    network = EvaluatedDenoiser(setting.chain.kernel.denoiser)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(4, (num_rows, setting.chain.length), generator=generator)
    masked = torch.rand(tokens.shape, generator=generator) < 0.5
    started = time.perf_counter()
    with torch.no_grad():
        network(torch.where(masked, 4, tokens), 0.5)
    return peak_gb(), time.perf_counter() - started, network.rows_evaluated


def _potential(x0: Tensor) -> Tensor:
    return (x0 == 0).sum(-1) * 0.1


def in_own_process(usage: Callable[..., Usage], *arguments: object) -> Usage:
    """Call a function in a fresh process, so that nothing else counts towards its peak.

    :param usage: :func:`smc_usage` or :func:`network_usage`.
    :param arguments: its arguments.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(usage, *arguments).result()


def measure(quick: bool, console: Console) -> list[Row]:
    """Measure the peak memory of 100,000 particles.

    :param quick: 16 steps instead of 64 (memory hardly depends on them), 10,000 network rows.
    :param console: where the table goes.
    """
    steps, network_rows = (16, 10_000) if quick else (64, 100_000)
    rows = []
    for twist in ("argmax",) if quick else ("argmax", "persistent"):
        usage = in_own_process(smc_usage, 100_000, steps, twist)
        where = {"method": f"SMC, {twist} twist", "num_particles": 100_000, "num_steps": steps}
        rows.append(_row("smc_peak_memory", usage, {**where, "length": LENGTH}))
        console.print(f"{where['method']}: {usage[0]:.2f} GB after {usage[1]:.0f} s")
    usage = in_own_process(network_usage, network_rows)
    where = {"method": "shipped prior, one step", "num_particles": network_rows, "num_steps": 1}
    rows.append(_row("network_peak_memory", usage, {**where, "length": LENGTH}))
    _print(rows, console)
    return rows


def _row(name: str, usage: Usage, coordinates: dict[str, object]) -> Row:
    peak, seconds, evaluations = usage
    cost = {"seconds": seconds, "evaluations": evaluations}
    return Row(name, peak, "GB", 1, GOAL_GB, {**coordinates, **cost})


def _print(rows: list[Row], console: Console) -> None:
    made = table(
        "Peak resident memory of a process",
        ["", "particles", "steps", "peak GB", "goal", "rows", "seconds"],
    )
    for row in rows:
        c = row.coordinates
        made.add_row(
            c["method"],
            f"{c['num_particles']:,}",
            str(c["num_steps"]),
            f"{row.value:.2f}",
            verdict(row),
            f"{c['evaluations']:,}",
            f"{c['seconds']:.0f}",
        )
    console.print(made)


if __name__ == "__main__":
    run(measure)
