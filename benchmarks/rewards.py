"""What slow rewards cost: beside the network, in busy workers, and asked about once.

**Overlap.** A network and a reward that both sleep, and take equally long, are run with late scores
(``Defensive(late=True)``) and in time. ``overlap_wall_ratio`` is the wall time over the sum of the
network's seconds and those during which rewards were under way, measured in that very run: half is
all that can be had, one is what waiting in turn costs, and whatever the sampler does besides adds
to it. Where a question takes a given time the two are equal at every step, which is the goal's
case. Where a sequence does, constant or heavy-tailed (log-normal, a standard deviation of one in
the log), they are equal on average: a question holds between 4 and 300 new sequences, and a step
takes the longer of the two.

**Utilisation.** One question of many sequences to a pool: ``utilisation`` is the share of the
workers' time in which they work, by the default pieces and, for comparison, one at a time and in
equal parts; ``idle_share`` is what is missing, with the goal. ``call_overhead_ratio`` is the time
that sequences of no cost take by the default pieces over that of one at a time.

**Processes.** One question to worker processes that can be killed, warm, of sequences that take
.05 s on average: ``wall_over_ideal`` is the wall time over the least that could be had (the sum of
all times over the workers, or the longest if that is more), and ``utilisation`` as above.
``calls_saved_by_cache`` is the share of the calls of a run that a second one does not make, which
is given the file of the first: with its seed, and with another.

**Memory.** ``repeat_share`` is the share of sequences that a run asks about again: with the memory
of a run, and with that of the last question alone. ``memory_over_last_call`` is the process time of
the one over the other for a potential that costs nothing, 4,096 particles.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from torch import Tensor

from benchmarks._problems import Problem
from benchmarks._report import Row, run, table, verdict
from ppl_diffusion.denoisers import Denoiser
from ppl_diffusion.denoisers.base import Wrapper
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.inference import SMC
from ppl_diffusion.potentials import (
    AbstractPotential,
    Potential,
    Processes,
    Reward,
    SequenceFunction,
    Threads,
)
from ppl_diffusion.potentials.failures import watch_failures
from ppl_diffusion.programs import sources
from ppl_diffusion.row_memory import RowMemory
from ppl_diffusion.rows import RowTable, hash_rows
from ppl_diffusion.smc import Defensive, ParticlePosterior
from ppl_diffusion.smc.evaluated_potential import EvaluatedPotential, SortedAnswers

WORKERS = (1, 4, 16)
WALL_GOAL, IDLE_GOAL, MEMORY_GOAL = 0.6, 0.15, 1.1
NO_GOAL = (
    "overlap_wall_ratio has a goal where network and question are equal at every step. Where time "
    "goes with the number of sequences they are not: the least that can be had is the sum of the "
    "longer of the two over the sum of both, which is above half. In time it is about one."
)


@dataclass(frozen=True)
class Size:
    """How much is measured.

    :param network: seconds of a network call, and of a question; a quarter of it where sequences
        take a given time.
    :param num_steps: steps of the chain.
    :param particles: particles of a run.
    :param sequences: of one question to a pool.
    :param work: seconds of all of them together, times the number of workers.
    :param seconds: that a sequence takes in a process.
    :param per_worker: sequences of a question to processes, times the number of workers.
    :param population: sequences of a question where memories are compared.
    :param questions: how many of them.
    :param repeats: how often everything is repeated; medians are shown.
    """

    network: float
    num_steps: int
    particles: int
    sequences: int
    work: float
    seconds: float
    per_worker: int
    population: int
    questions: int
    repeats: int


QUICK = Size(0.2, 24, 64, 400, 0.15, 0.05, 30, 4096, 24, 3)
FULL = Size(0.4, 40, 64, 2000, 2.0, 0.05, 200, 4096, 64, 5)


class SleepingNetwork(Wrapper):
    """A network whose calls take a given time, whatever they are asked.

    :param denoiser: what answers.
    :param seconds: of a call.

    :ivar busy: seconds of all calls so far.
    """

    def __init__(self, denoiser: Denoiser, seconds: float) -> None:
        self.denoiser, self.seconds, self.busy = denoiser, seconds, 0.0
        self.adopt(denoiser, "conditions")

    def __call__(self, tokens: Tensor, t: float | Tensor, /, **given: Tensor) -> Tensor:
        """Return the denoiser's answer, later."""
        started = time.perf_counter()
        output = self.denoiser(tokens, t, **given)
        time.sleep(max(0.0, self.seconds - (time.perf_counter() - started)))
        self.busy += time.perf_counter() - started
        return output


@dataclass(frozen=True)
class SleepingReward:
    """A log-potential that takes its time.

    :param value: what is answered.
    :param seconds: of a sequence, on average, or of a call.
    :param times: a name of :data:`TIMES`.
    """

    value: Callable[[Tensor], Tensor]
    seconds: float
    times: str

    def __call__(self, x0: Tensor) -> Tensor:
        """Return ``log G``, ``(B,)``, after the time that all of them take."""
        time.sleep(self.seconds * TIMES[self.times](x0))
        return self.value(x0)


def heavy_tailed(x0: Tensor) -> float:
    """Return a log-normal time of each sequence, the same whenever it is asked, mean one, summed.

    :param x0: int64 ``(B, L)``.
    """
    share = ((hash_rows(x0) % 999_983).double() + 0.5) / 999_983
    normal = 2**0.5 * torch.erfinv(2 * share - 1)
    return float(torch.exp(normal - 0.5).sum())


PER_QUESTION, CONSTANT, HEAVY = "per question", "constant", "heavy-tailed"
TIMES: dict[str, Callable[[Tensor], float]] = {
    PER_QUESTION: lambda x0: 1.0,
    CONSTANT: len,
    HEAVY: heavy_tailed,
}
"""What a call takes, by name."""


# Beside the network.


def wall_ratio(size: Size, workers: int, times: str, *, late: bool, seed: int) -> float:
    """Return the wall time of a run over the sum of what network and rewards take.

    :param workers: calls that run at once.
    :param times: a name of :data:`TIMES`.
    :param late: whether scores may arrive a step late.
    """
    problem, asked = Problem.load("B1"), []

    def counted(x0: Tensor) -> Tensor:
        asked.append(len(x0))
        return problem.log_potential(x0)

    chain, whole = problem.chain(size.num_steps), times == PER_QUESTION
    steered(chain, Potential(counted), size, late, seed)
    seconds = size.network if whole else size.network / 4
    share = 1.0 if whole else workers * len(asked) / sum(asked)
    reward = SleepingReward(problem.log_potential, seconds * share, times)
    network = SleepingNetwork(chain.kernel.denoiser, seconds)
    slow = ReverseChain(chain.kernel.with_denoiser(network), chain.length)
    with Threads(workers) as pool:
        potential = Reward(reward, executor=pool, batch_size=10**6 if whole else None)
        started = time.perf_counter()
        (told,) = steered(slow, potential, size, late, seed).settings["rewards"].values()
        wall = time.perf_counter() - started
    return wall / (network.busy + told["under_way"])


def steered(
    chain: ReverseChain, potential: AbstractPotential, size: Size, late: bool, seed: int
) -> ParticlePosterior:
    """Return one run of the bootstrap filter with look-aheads."""
    twist = Defensive(late=late)
    return SMC(chain, potential, twist=twist, num_particles=size.particles).run(seed=seed)


def measure_overlap(size: Size) -> Iterator[Row]:
    """Yield the wall time over the sum of both, late and in time."""
    each = [(times, workers) for times in (CONSTANT, HEAVY) for workers in WORKERS]
    for times, workers in [(PER_QUESTION, 1), *each]:
        whole = times == PER_QUESTION
        for late in (True, False) if whole else (True,):
            repeats = size.repeats if whole and late else 1
            found = [wall_ratio(size, workers, times, late=late, seed=s) for s in range(repeats)]
            where = {"workers": workers, "times": times, "late": late}
            goal = WALL_GOAL if whole and late else None
            yield Row("overlap_wall_ratio", median(found), "of the sum", repeats, goal, where)


# In busy workers.

PIECES: dict[str, Callable[[int, int], int | None]] = {
    "guided": lambda count, workers: None,
    "one by one": lambda count, workers: 1,
    "equal parts": lambda count, workers: -(-count // workers),
}
"""How many sequences a call is given, by name: ``(sequences, workers) -> batch_size``."""


def utilisation(size: Size, workers: int, pieces: str, times: str) -> float:
    """Return the share of the workers' time in which they work at one question.

    :param workers: calls that run at once.
    :param pieces: a name of :data:`PIECES`.
    :param times: a name of :data:`TIMES`.
    """
    reward = SleepingReward(first_token, size.work * workers / size.sequences, times)
    x0 = torch.arange(size.sequences)[:, None].expand(-1, 4)
    with Threads(workers) as pool, watch_failures() as watched:
        batch = PIECES[pieces](size.sequences, workers)
        SequenceFunction(reward, executor=pool, batch_size=batch, name="r")(x0)
        return float(watched.work()["r"]["utilisation"])


def first_token(x0: Tensor) -> Tensor:
    """Return the first token of sequences: an answer of no cost.

    :param x0: int64 ``(B, L)``.
    """
    return x0[:, 0].to(torch.float64)


def call_overhead(size: Size, workers: int) -> float:
    """Return the time of sequences of no cost by the default pieces, over one at a time.

    :param workers: calls that run at once.
    """
    x0 = torch.arange(10 * size.sequences)[:, None].expand(-1, 4)
    seconds = {}
    for batch in (None, 1):
        with Threads(workers) as pool:
            started = time.perf_counter()
            SequenceFunction(first_token, executor=pool, batch_size=batch)(x0)
            seconds[batch] = time.perf_counter() - started
    return seconds[None] / seconds[1]


def measure_workers(size: Size) -> Iterator[Row]:
    """Yield how busy workers are."""
    for times in (CONSTANT, HEAVY):
        for workers in WORKERS:
            for pieces in PIECES:
                found = [utilisation(size, workers, pieces, times) for _ in range(size.repeats)]
                value, where = median(found), {"workers": workers, "times": times, "pieces": pieces}
                yield Row("utilisation", value, "share", size.repeats, None, where)
                if pieces == "guided":
                    yield Row("idle_share", 1 - value, "share", size.repeats, IDLE_GOAL, where)
    ratios = [call_overhead(size, 4) for _ in range(size.repeats)]
    yield Row("call_overhead_ratio", median(ratios), "x", size.repeats, 1.0, {"workers": 4})


# In processes.


def in_processes(size: Size, pool: Processes, times: str, seed: int) -> tuple[float, float]:
    """Return the wall time of a question over the ideal one, and the share of time worked.

    :param pool: the workers, warm.
    :param times: a name of :data:`TIMES`.
    :param seed: of the sequences.
    """
    count, workers = size.per_worker * pool.num_workers, pool.num_workers
    x0 = torch.arange(seed * count, (seed + 1) * count)[:, None].expand(-1, 4)
    each = [size.seconds * TIMES[times](row[None]) for row in x0]
    reward = SleepingReward(first_token, size.seconds, times)
    with watch_failures() as watched:
        started = time.perf_counter()
        SequenceFunction(reward, executor=pool, timeout=60.0, name="r")(x0)
        wall = time.perf_counter() - started
        busy = float(watched.work()["r"]["utilisation"])
    return wall / max(sum(each) / workers, max(each)), busy


def measure_processes(size: Size) -> Iterator[Row]:
    """Yield how near to the ideal worker processes come."""
    for workers in WORKERS:
        with Processes(workers) as pool:
            list(pool.map(time.sleep, [0.1] * workers))  # each has started then
            for times in (CONSTANT, HEAVY):
                found = [in_processes(size, pool, times, seed) for seed in range(size.repeats)]
                ratio, busy = (median(column) for column in zip(*found, strict=True))
                where = {"workers": workers, "times": times, "pieces": "processes"}
                yield Row("wall_over_ideal", ratio, "x", size.repeats, None, where)
                yield Row("utilisation", busy, "share", size.repeats, None, where)


def saved_by_cache(size: Size, seed: int, other: int) -> float:
    """Return the share of a run's calls that another run's file saves.

    :param seed: of the run that fills it.
    :param other: of the run that is given it.
    """
    problem, asked = Problem.load("B1"), []
    chain = problem.chain(size.num_steps)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "answers.sqlite"
        for run_seed, cache in ((seed, file), (other, None), (other, file)):
            reward = Reward(problem.log_potential, name="r", cache=cache)
            steered(chain, reward, size, False, run_seed)
            asked.append(reward.num_calls)
    return 1 - asked[2] / asked[1]


def measure_cache(size: Size) -> Iterator[Row]:
    """Yield what a file of answers saves."""
    for run_again, shift in (("the same seed", 0), ("another seed", 1)):
        found = [saved_by_cache(size, 2 * i, 2 * i + shift) for i in range(size.repeats)]
        where = {"second_run": run_again}
        yield Row("calls_saved_by_cache", median(found), "share", size.repeats, None, where)


# Asked about once.


class LastQuestion(RowMemory):
    """A memory of what was asked last, as runs had before."""

    def __init__(self) -> None:
        super().__init__()
        self._table: RowTable | None = None

    def find(self, rows: Tensor, hashes: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is remembered; whoever asks fills in the rest, which is remembered then."""
        values = torch.empty(len(rows), dtype=torch.float64)
        known = torch.zeros(len(rows), dtype=torch.bool)
        if self._table is not None:
            index = self._table.find(rows, hashes)
            known = index >= 0
            values[known] = self._table.values[index[known]]
        self._table = RowTable(hashes, rows, values)
        return values, known

    def add(self, rows: Tensor, hashes: Tensor, values: Tensor) -> None:
        """Nothing is left to do."""


class LastQuestionPotential(EvaluatedPotential):
    """A potential with such a memory."""

    def __init__(self, potential: AbstractPotential) -> None:
        super().__init__(potential)
        self._answers = {final: SortedAnswers(LastQuestion()) for final in (True, False)}


@contextmanager
def remembering(kind: type[EvaluatedPotential]) -> Iterator[None]:
    """Let runs ask through another memory.

    :param kind: the class they ask through.
    """
    usual = sources.EvaluatedPotential
    sources.EvaluatedPotential = kind  # type: ignore[misc]
    try:
        yield
    finally:
        sources.EvaluatedPotential = usual  # type: ignore[misc]


def repeat_share(
    size: Size, kind: type[EvaluatedPotential], seed: int, noise: str = "masked"
) -> float:
    """Return the share of sequences that a run asks about again.

    :param kind: the class it asks through.
    :param noise: ``"masked"``, or ``"uniform"``, whose guesses come back more often.
    """
    problem, seen, asked = Problem.load("B1"), set(), 0

    class Recorded(Potential):
        def lookahead(self, x0: Tensor) -> Tensor:
            nonlocal asked
            asked += len(x0)
            seen.update(row.tobytes() for row in x0.numpy())
            return super().lookahead(x0)

    make = problem.chain if noise == "masked" else problem.uniform_chain
    with remembering(kind):
        steered(make(size.num_steps), Recorded(problem.log_potential), size, False, seed)
    return 1 - len(seen) / asked


def questions(size: Size, seed: int) -> list[Tensor]:
    """Return guesses of particles that move and are resampled, int64 ``(1, N, F, L)`` each."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    shape, length = (1, size.population, 5), 64
    x0, found = draw(4, *shape, length), []
    for k in range(size.questions):
        if k % 4 == 0:
            x0 = x0[:, draw(size.population, size.population).sort().values]
        moved = x0.scatter(-1, draw(length, *shape, 1), draw(4, *shape, 1))
        x0 = torch.where(draw(5, *shape, 1) > 0, moved, x0)
        found.append(x0)
    return found


def memory_seconds(kind: type[EvaluatedPotential], asked: list[Tensor]) -> float:
    """Return the process time of questions to a potential of next to no cost.

    :param kind: the class they are asked through.
    """
    evaluated = kind(Potential(lambda x0: (x0 == 2).sum(-1) / 10))
    started = time.process_time()
    for x0 in asked:
        evaluated.lookahead(x0)
    return time.process_time() - started


def measure_memory(size: Size) -> Iterator[Row]:
    """Yield what is asked again, and what remembering it costs."""
    kinds = {"run": EvaluatedPotential, "last question": LastQuestionPotential}
    for noise in ("masked", "uniform"):
        for name, kind in kinds.items():
            shares = [repeat_share(size, kind, seed, noise) for seed in range(size.repeats)]
            where, goal = {"memory": name, "noise": noise}, 0.0 if name == "run" else None
            yield Row("repeat_share", median(shares), "share", len(shares), goal, where)
    ratios = []
    for seed in range(size.repeats):
        asked = questions(size, seed)
        now, before = (memory_seconds(kind, asked) for kind in kinds.values())
        ratios.append(now / before)
    population = {"num_particles": size.population}
    yield Row("memory_over_last_call", median(ratios), "x", len(ratios), MEMORY_GOAL, population)


def measure(quick: bool, console: Console) -> list[Row]:
    """Measure what slow rewards cost."""
    size = QUICK if quick else FULL
    parts = measure_overlap, measure_workers, measure_processes, measure_cache, measure_memory
    rows = [row for part in parts for row in part(size)]
    shown = table("Rewards beside the network", ["what", "where", "value", "goal"], NO_GOAL)
    for row in rows:
        where = ", ".join(f"{name} {value}" for name, value in row.coordinates.items())
        shown.add_row(row.name, where, f"{row.value:.3f} {row.unit}", verdict(row))
    console.print(shown)
    return rows


if __name__ == "__main__":
    run(measure)
