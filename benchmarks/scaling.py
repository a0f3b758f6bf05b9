"""How time and memory of a steered run grow along each axis: fitted exponents.

Particles ``N`` to 16,384, positions ``L`` to 1,024, steps ``T`` to 1,024, tokens ``V`` to 50,257,
one at a time, with the argmax twist and a network whose own cost is linear (every position by
itself: an embedding and a head). ``exponent_time`` and ``exponent_memory`` are slopes of
the logarithms by least squares over the upper half of the range, where constants no longer hide
them: 1 is linear, 0 is no growth. Steps of a masked chain cost nothing unless something is
revealed; a chain of uniform noise, where every step moves, is measured along ``T`` too.

Time is process time, the least of the repeats; memory is what the first run adds to the peak of a
process of its own. The quick form leaves out the lower half, which only the table shows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from benchmarks._peak import Peak
from benchmarks._report import Row, run, table, verdict
from benchmarks._trivial import share_of_first
from benchmarks.memory import in_own_process
from ppl_diffusion.denoisers.base import Kind
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.kernels import Absorbing, InterpolatingKernel, Uniform
from ppl_diffusion.smc import FeynmanKac, run_smc

GOAL = 1.05
NUM_POINTS = 5
"""Sizes along an axis, each twice the one before."""


class SiteNetwork(nn.Module):
    """A denoiser that looks at every position by itself, with a head that may be asked alone.

    :param vocab_size: number of clean tokens ``V``.
    :param hidden_size: width.
    """

    kind: Kind = "cavity"
    time_free = True

    def __init__(self, vocab_size: int, hidden_size: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.embedding = nn.Embedding(vocab_size + 1, hidden_size)
        self.vocabulary = nn.Linear(hidden_size, vocab_size)
        self.eval().requires_grad_(False)

    def forward(self, tokens: Tensor, t: float | Tensor) -> Tensor:
        """Return log-probabilities, float32 ``(*batch, L, V)``."""
        return self.head(self.hidden(tokens, t))

    def hidden(self, tokens: Tensor, t: float | Tensor) -> Tensor:
        """Return hidden states, ``(*batch, L, hidden_size)``."""
        # The state at a position must not tell what is there: a cavity has not seen it.
        states: Tensor = self.embedding(torch.full_like(tokens, self.vocab_size))
        return states

    def head(self, hidden: Tensor) -> Tensor:
        """Return log-probabilities of hidden states."""
        return torch.log_softmax(self.vocabulary(hidden), -1)


@dataclass(frozen=True)
class Setting:
    """One run.

    :param masked: whether the chain is masked, or of uniform noise.
    """

    N: int = 64
    L: int = 64
    T: int = 16
    V: int = 4
    masked: bool = True

    @property
    def method(self) -> str:
        """What the tables call the chain."""
        return "masked" if self.masked else "uniform noise"

    def run(self, seed: int) -> None:
        """Steer once.

        :param seed: seed of the run.
        """
        process = Absorbing(self.V) if self.masked else Uniform(self.V)
        kernel = InterpolatingKernel(process, SiteNetwork(self.V), num_steps=self.T)
        model = FeynmanKac(ReverseChain(kernel, self.L), share_of_first, twist="argmax")
        run_smc(model, self.N, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Axis:
    """What is made larger.

    :param name: ``N``, ``L``, ``T`` or ``V``.
    :param largest: where it ends.
    :param others: the rest of the setting.
    """

    name: str
    largest: int
    others: Setting = field(default_factory=Setting)

    def sizes(self, quick: bool) -> list[int]:
        """Return the sizes, ascending; the quick form has the upper half only.

        :param quick: whether that is wanted.
        """
        sizes = [self.largest // 2**back for back in reversed(range(NUM_POINTS))]
        return upper_half(sizes) if quick else sizes

    def at(self, size: int) -> Setting:
        """Return the setting of a size."""
        return replace(self.others, **{self.name: size})


AXES = (
    Axis("N", 16_384, Setting(L=16, T=8)),
    Axis("L", 1_024),
    Axis("T", 1_024),
    Axis("T", 1_024, Setting(L=32, masked=False)),
    Axis("V", 50_257, Setting(N=16, L=16, T=8)),
)


def upper_half(sizes: Sequence[int]) -> list[int]:
    """Return the sizes at or above the geometric middle of the range, up to rounding.

    :param sizes: ascending.
    """
    middle = math.sqrt(sizes[0] * sizes[-1])
    return [size for size in sizes if size > 0.99 * middle]


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Return the slope of the logarithm of costs over that of sizes, by least squares.

    :param sizes: two or more, positive.
    :param costs: as many, positive.
    """
    x, y = ([math.log(value) for value in values] for values in (sizes, costs))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)


def usage(setting: Setting, repeats: int) -> tuple[float, float, int]:
    """Run a setting in this process.

    :param setting: what is run.
    :param repeats: timed runs.
    :returns: GB added to the peak, seconds, and the repeats.
    """
    torch.set_num_threads(1)
    Setting(N=2, L=4, T=2, masked=setting.masked).run(0)  # imports, and what is built once
    peak = Peak()
    times = []
    for seed in range(repeats):
        started = time.process_time()
        setting.run(seed)
        times.append(time.process_time() - started)
        peak.stop()
    return peak.gigabytes, min(times), repeats


def measure_axis(axis: Axis, quick: bool) -> Iterator[Row]:
    """Measure every size of an axis, then fit.

    :param axis: what is made larger.
    :param quick: upper half only, fewer repeats.
    """
    costs: dict[int, tuple[float, float]] = {}
    repeats = 2 if quick else 3
    where: dict[str, Any] = {"axis": axis.name, "method": axis.others.method}
    for size in axis.sizes(quick):
        memory, seconds, _ = in_own_process(usage, axis.at(size), repeats)
        costs[size] = (seconds, memory)
        yield Row("scaling_time", seconds, "s", repeats, None, {**where, "size": size})
        yield Row("scaling_memory", memory, "GB", 1, None, {**where, "size": size})
    fitted = upper_half(axis.sizes(quick=False))
    span = {**where, "from": fitted[0], "to": fitted[-1]}
    for place, name in enumerate(("exponent_time", "exponent_memory")):
        slope = exponent(fitted, [costs[size][place] for size in fitted])
        yield Row(name, slope, "exponent", len(fitted), GOAL, span)


def measure(quick: bool, console: Console) -> list[Row]:
    """Fit how cost grows with particles, positions, steps and tokens.

    :param quick: upper halves only.
    :param console: where the tables go.
    """
    rows = []
    for axis in AXES:
        own = list(measure_axis(axis, quick))
        _print(axis, own, console)
        rows += own
    return rows


def _print(axis: Axis, rows: list[Row], console: Console) -> None:
    costs = {
        name: [r for r in rows if r.name == name] for name in ("scaling_time", "scaling_memory")
    }
    sizes = [row.coordinates["size"] for row in costs["scaling_time"]]
    others = {key: value for key, value in vars(axis.others).items() if key != axis.name}
    shape = ", ".join(f"{key}={value}" for key, value in others.items() if key != "masked")
    made = table(
        f"{axis.name} of a {axis.others.method} chain, {shape}",
        ["", *(f"{size:,}" for size in sizes), "exponent", "goal"],
    )
    for what, unit, digits in (("time", "s", 2), ("memory", "GB", 3)):
        fitted = next(row for row in rows if row.name == f"exponent_{what}")
        values = [f"{row.value:.{digits}f}" for row in rows if row.name == f"scaling_{what}"]
        made.add_row(f"{what}, {unit}", *values, f"{fitted.value:.2f}", verdict(fitted))
    console.print(made)


if __name__ == "__main__":
    run(measure)
