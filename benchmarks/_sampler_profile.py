"""How many operations and host reads a step of a sampler makes, and that rows add none.

Operations are counted by ``torch.profiler`` in runs of two lengths; the difference is what a step
costs. A host read is an operation that waits for a value: on an accelerator it would stall.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from rich.console import Console
from torch.profiler import ProfilerActivity, profile

from benchmarks._report import Row, table
from ppl_diffusion.denoisers.config import TransformerConfig
from ppl_diffusion.denoisers.transformer import Transformer
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.kernels import Absorbing, InterpolatingKernel, Process, Uniform, psi
from ppl_diffusion.kernels.events import RevealPlan, decode
from ppl_diffusion.kernels.masked_paths import ancestral_steps
from ppl_diffusion.processes.noise import uniforms

HOST_READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero")
LENGTH, BATCHES = 200, (1, 16)
Counts = dict[str, int]


def count(work: Callable[[], object]) -> Counts:
    """Return how often each torch operation ran.

    :param work: what to run.
    """
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        work()
    averages = profiler.key_averages()
    return {e.key: e.count for e in averages if e.key.startswith("aten::")}


def per_step(work: Callable[[int], object], few: int, many: int) -> tuple[float, float]:
    """Return operations and host reads per step, whatever a run costs once.

    :param work: runs so many steps.
    :param few: number of steps of the short run.
    :param many: number of steps of the long run.
    """
    work(few)  # what is built on first use does not count
    short, long = count(partial(work, few)), count(partial(work, many))
    more = {key: long[key] - short.get(key, 0) for key in long}
    reads = sum(more.get(key, 0) for key in HOST_READS)
    return sum(more.values()) / (many - few), reads / (many - few)


def event_rounds(batch: int, vocab_size: int = 5, num_steps: int = 64) -> tuple[float, float]:
    """Return operations and host reads per round of the event engine, the network's included.

    :param batch: rows ``B``.
    :param vocab_size: number of clean tokens ``V``.
    :param num_steps: steps of the grid.
    """
    process = Absorbing(vocab_size)
    kernel = InterpolatingKernel(process, _network(process), num_steps=num_steps)
    generator = torch.Generator().manual_seed(0)
    levels, noise = uniforms((2, batch, LENGTH), generator=generator)
    start = torch.full((batch, LENGTH), vocab_size)
    plan = RevealPlan.of(*ancestral_steps(kernel, start, levels))

    def work(rounds: int) -> None:
        part = replace(plan, rounds=plan.rounds[:rounds])
        with torch.no_grad():
            decode(kernel.denoiser, vocab_size, start, part, noise)

    return per_step(work, 4, 12)


def psi_steps(batch: int, process: Process) -> tuple[float, float]:
    """Return operations and host reads per step of a Psi chain, the network's included.

    :param batch: rows ``B``.
    :param process: forward process.
    """
    network = _network(process)

    def work(steps: int) -> None:
        schedule = psi.constant(process.schedule, steps, kappa=0.9)
        kernel = InterpolatingKernel(process, network, psi=schedule)
        generator = torch.Generator().manual_seed(0)
        ReverseChain(kernel, LENGTH).sample((batch,), generator=generator)

    return per_step(work, 4, 12)


def _network(process: Process) -> Transformer:
    torch.manual_seed(0)
    config = TransformerConfig(process.vocab_size, process.num_states, LENGTH, dim=64, depth=2)
    return Transformer(config).eval().requires_grad_(False)


CASES: dict[str, Callable[[int], tuple[float, float]]] = {
    "event times, per round": event_rounds,
    "psi over masks, per step": lambda batch: psi_steps(batch, Absorbing(5)),
    "psi over uniform noise, per step": lambda batch: psi_steps(batch, Uniform(5)),
}


def profile_rows() -> Iterator[Row]:
    """Profile every case at every batch size."""
    for method, case in CASES.items():
        for batch in BATCHES:
            operations, reads = case(batch)
            where = {"method": method, "batch": batch, "vocab_size": 5, "length": LENGTH}
            yield Row("operations_per_step", operations, "count", 1, None, where)
            yield Row("host_reads_per_step", reads, "count", 1, None, where)


def measure_profile(console: Console) -> list[Row]:
    """Print how many operations a step makes.

    :param console: where the table goes.
    """
    rows = list(profile_rows())
    made = table(
        f"Operations by torch.profiler, V = 5, L = {LENGTH}, network included",
        [
            "",
            *(f"operations, B = {b}" for b in BATCHES),
            *(f"host reads, B = {b}" for b in BATCHES),
        ],
        "a host read waits for a value of a tensor; a loop over rows would show in the operations",
    )
    for method in CASES:
        own = [row for row in rows if row.coordinates["method"] == method]
        operations = [f"{row.value:.1f}" for row in own if row.unit == "count"][::2]
        reads = [f"{row.value:.1f}" for row in own][1::2]
        made.add_row(method, *operations, *reads)
    console.print(made)
    return rows
