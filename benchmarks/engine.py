"""What the particle engine costs when nothing else does, and beside other people's engines.

``engine_over_chain``: process time of a whole run of a method over a masked chain less what it
spent inside a trivial network, over the same of ``chain.sample`` for as many rows
(``N = L = T = 64``, ``V = 4``); every method of the registry as it comes, and the bootstrap filter
without a twist and with the argmax.

``host_reads_per_step`` and ``operations_per_step``: operators of torch that such a run calls, and
those of them that would wait on an accelerator, over the ``T`` steps of the grid; what a run reads
once, before and after, is divided too. :mod:`benchmarks._operations` lists what counts.

``time_per_step`` and ``evidence_error``: the bootstrap filter of a hidden Markov model (8 states,
8 symbols) by our loop, a bare loop of plain torch, Pyro's ``SMCFilter``, and ``particles`` where it
is installed. ``smc_over_particles``, ``smc_over_pyro`` and ``smc_over_torch`` are ratios of the
times. The error is the root mean square of the estimated less the exact log-evidence, in nats; it
must be alike, and says that all run the same algorithm. What is compiled on the first run is left
out. Pyro's filter keeps no evidence: it is timed as it comes, and summed up in runs apart.

``resampler_over_particles``: see :mod:`benchmarks.resamplers`.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
from rich.console import Console

from benchmarks._filters import HMM, evidences, filters, has_particles, pyro_evidence
from benchmarks._operations import Operations, count_operations
from benchmarks._report import Row, run, table, verdict
from benchmarks._trivial import TrivialDenoiser, share_of_first, trivial_chain
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.inference import SMC, Power, methods

SIZE, VOCAB_SIZE = 64, 4
"""Particles, positions and steps; tokens."""

GOAL_ENGINE, GOAL_READS = 3.0, 1.0
WITH_GOAL = ("smc", "smc, no twist", "smc, argmax twist")
ON_EVENTS = (*WITH_GOAL, "steering", "twisted", "soft-value")
"""Methods whose host reads have a goal.

A filter without look-ahead reads nothing inside a step but whether to resample. Look-aheads ask the
potential about distinct sequences, which reads a few more; on the CPU a few rows are looked up in a
dictionary, and that counts as ``tolist`` and ``numpy``.
"""

FILTER_STEPS = 100
NUM_PARTICLES = (64, 1024, 4096)

Work = Callable[[int], tuple[float, Operations]]


def runners() -> dict[str, Callable[[ReverseChain], SMC]]:
    """Return how each method is made, the registry's as they come."""

    def made(method: str, **options: Any) -> Callable[[ReverseChain], SMC]:
        def build(chain: ReverseChain) -> SMC:
            target: Any = Power(chain, 1.5) if method == "corrector" else chain
            return SMC(target, share_of_first, method=method, num_particles=SIZE, **options)

        return build

    # Those that steer through a codebook, or need uniform noise, have none here.
    found = {name: made(name) for name, cls in methods().items() if cls.needs.any_target}
    twists = {"smc, no twist": None, "smc, argmax twist": "argmax"}
    return found | {name: made("smc", twist=twist) for name, twist in twists.items()}


def above_network(work: Callable[[], object], network: TrivialDenoiser) -> float:
    """Return the process time of some work outside of its network, in seconds.

    :param work: what is run.
    :param network: the network it asks.
    """
    inside, started = network.seconds, time.process_time()
    work()
    return time.process_time() - started - (network.seconds - inside)


def measure_methods(repeats: int) -> Iterator[Row]:
    """Time every method and the bare chain by turns, and count what each asks of torch.

    :param repeats: timed rounds.
    """
    chain, network = trivial_chain(SIZE, SIZE, VOCAB_SIZE)
    work: dict[str, Callable[[int], object]] = {"bare chain.sample": _sampling(chain)}
    work |= {name: _running(build(chain)) for name, build in runners().items()}
    for one in work.values():
        one(0)
    times: dict[str, list[float]] = {name: [] for name in work}
    for seed in range(repeats):
        for name, one in work.items():
            times[name].append(above_network(lambda o=one, s=seed: o(s), network))  # type: ignore[misc]
    bare = median(times["bare chain.sample"])
    for name, one in work.items():
        where: dict[str, Any] = {
            "method": name,
            "num_particles": SIZE,
            "length": SIZE,
            "num_steps": SIZE,
            "vocab_size": VOCAB_SIZE,
        }
        cost = {"seconds": median(times[name]), "seconds_min": min(times[name])}
        goal = GOAL_ENGINE if name in WITH_GOAL else None
        ratio = median(times[name]) / bare
        yield Row("engine_over_chain", ratio, "ratio", repeats, goal, {**where, **cost})
        yield from _counted(count_operations(lambda o=one: o(0)), name, where)  # type: ignore[misc]


def _sampling(chain: ReverseChain) -> Callable[[int], object]:
    return lambda seed: chain.sample((SIZE,), generator=torch.Generator().manual_seed(seed))


def _running(runner: SMC) -> Callable[[int], object]:
    return lambda seed: runner.run(seed=seed)


def _counted(counted: Operations, name: str, where: dict[str, Any]) -> Iterator[Row]:
    goal = GOAL_READS if name in ON_EVENTS else None
    reads = {f"reads_{read}": number for read, number in counted.reads.most_common()}
    per_step = counted.num_reads / SIZE
    yield Row("host_reads_per_step", per_step, "count", 1, goal, {**where, **reads})
    yield Row("operations_per_step", counted.num_calls / SIZE, "count", 1, None, where)


def measure_filters(repeats: int, num_seeds: int) -> Iterator[Row]:
    """Time the filters of a hidden Markov model by turns, and compare their evidence.

    :param repeats: timed rounds.
    :param num_seeds: runs behind an error.
    """
    model = HMM.random(FILTER_STEPS)
    for size in NUM_PARTICLES:
        times = _filter_times(model, size, repeats)
        for name, seconds in times.items():
            where = {"method": name, "num_particles": size, "num_steps": model.num_steps}
            per_step = 1e6 * median(seconds) / model.num_steps
            yield Row("time_per_step", per_step, "us", repeats, None, where)
            error = _evidence_error(model, name, size, num_seeds)
            yield Row("evidence_error", error, "nats", num_seeds, None, where)
        named = {"particles": "particles", "pyro": "Pyro", "torch": "bare torch loop"}
        for short, name in named.items():
            if name in times:
                ratio = median(times["ours"]) / median(times[name])
                where = {"num_particles": size, "num_steps": model.num_steps}
                yield Row(f"smc_over_{short}", ratio, "ratio", repeats, None, where)


def _filter_times(model: HMM, size: int, repeats: int) -> dict[str, list[float]]:
    found = filters()
    for one in found.values():
        one(model, size, 0)  # compiles what is compiled
    times: dict[str, list[float]] = {name: [] for name in found}
    for seed in range(repeats):
        for name, one in found.items():
            started = time.process_time()
            one(model, size, seed)
            times[name].append(time.process_time() - started)
    return times


def _evidence_error(model: HMM, name: str, size: int, num_seeds: int) -> float:
    """Return the root mean square error of the log-evidence, in nats."""
    if name == "ours":  # all runs at once: they are the same, and independent
        estimates = evidences(model, size, num_seeds, 0)
    else:
        one = pyro_evidence if name == "Pyro" else filters()[name]
        estimates = torch.tensor([one(model, size, seed) for seed in range(num_seeds)])
    return float((estimates - model.log_evidence).square().mean().sqrt())


def measure_resamplers(quick: bool, console: Console) -> list[Row]:
    """Return the rows of :mod:`benchmarks.resamplers`, where that exists.

    :param quick: fewer repeats.
    :param console: where its table goes.
    """
    if importlib.util.find_spec("benchmarks.resamplers") is None:
        return []
    module = importlib.import_module("benchmarks.resamplers")
    return list(module.measure_resamplers(quick, console))


def measure(quick: bool, console: Console) -> list[Row]:
    """Measure the particle engine alone.

    :param quick: fewer repeats.
    :param console: where the tables go.
    """
    methods_rows = list(measure_methods(3 if quick else 15))
    _print_methods(methods_rows, console)
    filter_rows = list(measure_filters(3 if quick else 15, 20 if quick else 200))
    _print_filters(filter_rows, console)
    return [*methods_rows, *filter_rows, *measure_resamplers(quick, console)]


def _print_methods(rows: list[Row], console: Console) -> None:
    made = table(
        f"N = L = T = {SIZE}, V = {VOCAB_SIZE}, trivial network",
        ["", "ms", "over chain.sample", "goal", "operations/step", "host reads/step", "goal"],
        "ms: process time of a run outside of the network, median",
    )
    names = dict.fromkeys(row.coordinates["method"] for row in rows)
    for name in names:
        own = {row.name: row for row in rows if row.coordinates["method"] == name}
        ratio, reads = own["engine_over_chain"], own["host_reads_per_step"]
        made.add_row(
            name,
            f"{1e3 * ratio.coordinates['seconds']:.1f}",
            f"{ratio.value:.2f}",
            verdict(ratio),
            f"{own['operations_per_step'].value:.0f}",
            f"{reads.value:.2f}",
            verdict(reads),
        )
    console.print(made)


def _print_filters(rows: list[Row], console: Console) -> None:
    for title, name, digits in (
        ("us per step", "time_per_step", 0),
        ("error of the log-evidence, nats (root mean square)", "evidence_error", 3),
    ):
        own = [row for row in rows if row.name == name]
        made = table(
            f"Bootstrap filter of a hidden Markov model, T = {FILTER_STEPS}: {title}",
            ["", *(f"N = {size:,}" for size in NUM_PARTICLES)],
        )
        for method in dict.fromkeys(row.coordinates["method"] for row in own):
            values = [row.value for row in own if row.coordinates["method"] == method]
            made.add_row(method, *(f"{value:.{digits}f}" for value in values))
        console.print(made)
    ratios = [row for row in rows if row.name.startswith("smc_over_")]
    made = table("Ours over theirs, time", ["", *(f"N = {size:,}" for size in NUM_PARTICLES)])
    for name in dict.fromkeys(row.name for row in ratios):
        made.add_row(name, *(f"{row.value:.2f}" for row in ratios if row.name == name))
    console.print(made)
    if not has_particles():
        console.print("particles is not installed: no smc_over_particles (pip install particles).")


if __name__ == "__main__":
    run(measure)
