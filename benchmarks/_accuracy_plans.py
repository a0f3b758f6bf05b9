"""What the accuracy benchmark runs: which methods on which case, how often, and the goals."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from benchmarks import _methods as methods
from benchmarks._cases import (
    Case,
    composed_case,
    grid_case,
    ordered_case,
    other,
    perturbed_case,
    six,
    uniform_power_case,
    uniform_tilt_case,
)
from benchmarks._methods import Method
from ppl_diffusion.inference import CFG, Power, Product


@dataclass(frozen=True)
class Plan:
    """What is run on one case.

    :param case: makes the case.
    :param methods: the rows.
    :param num_particles: the budgets ``N``.
    :param num_runs: independent runs per method and budget.
    :param num_costly: the same for methods marked as costly.
    :param num_bounds: runs of each side of the two-sided evidence.
    :param goals: largest acceptable values by (quantity, method, budget).
    """

    case: Callable[[], Case]
    methods: Sequence[Method]
    num_particles: tuple[int, ...]
    num_runs: int
    num_costly: int
    num_bounds: int = 1000
    goals: Mapping[tuple[str, str, int], float] = field(default_factory=dict)

    def runs_of(self, method: Method) -> int:
        """Return how often a method is run.

        :param method: the method.
        """
        return self.num_costly if method.costly else self.num_runs


SHORT_GOALS = {
    ("rmse_log_z", methods.SURPRISE.name, 8): 0.14,
    ("rmse_log_z", methods.SURPRISE.name, 32): 0.07,
}
LONG_GOALS = {
    ("rmse_log_z", method.name, size): goal
    for method in methods.CLAMPED_PERSISTENT
    for size, goal in ((16, 1.15), (64, 0.55))
}
ANNEALED_GOALS = {("tv", methods.LOCKSTEP.name, 8): 0.03}


def _power(beta: float) -> Callable[[Any], Power]:
    return lambda chain: Power(chain, beta)


def _guided(conditional: Any, unconditional: Any) -> CFG:
    return CFG(conditional, unconditional, 2.0)


def annealing(
    num_runs: int, betas: Sequence[float], grids: Mapping[int, Sequence[Method]]
) -> Iterator[Plan]:
    """Yield B2: powers of MC-6, in lockstep and on grids of time steps.

    :param num_runs: independent runs in lockstep; twenty times fewer on grids.
    :param betas: the powers.
    :param grids: rows by number of equal time steps.
    """
    for beta in betas:
        case = partial(composed_case, "B2", f"p^{beta:g}", _power(beta), [six()])
        goals = ANNEALED_GOALS if beta == 2 else {}
        lockstep, few = (methods.LOCKSTEP,), num_runs // 20
        yield Plan(partial(case, None), lockstep, (8, 32), num_runs, num_runs, goals=goals)
        for steps, rows in grids.items():
            yield Plan(partial(case, steps), rows, (8, 32), few, few, 300)


def pairs(num_runs: int, grids: Sequence[int]) -> Iterator[Plan]:
    """Yield B3: the product of two chains, and guidance of one by the other.

    :param num_runs: independent runs in lockstep; ten times fewer on grids.
    :param grids: numbers of equal time steps.
    """
    both = [six(), other(six())]
    for setting, compose in (("p1 p2", Product), ("p1^2 p2^-1", _guided)):
        case = partial(composed_case, "B3", setting, compose, both)
        yield Plan(partial(case, None), (methods.LOCKSTEP,), (8, 32), num_runs, num_runs)
        for steps in grids:
            rows = (methods.PATH, methods.RATES)
            yield Plan(partial(case, steps), rows, (8, 32), num_runs // 10, num_runs // 10, 300)


def uniform_noise(num_runs: int, lengths: Sequence[int], steps: Sequence[int]) -> Iterator[Plan]:
    """Yield B4: powers and tilts of a chain of uniform noise.

    :param num_runs: independent runs of the powers; a third for the tilts.
    :param lengths: lengths ``L``.
    :param steps: numbers of steps ``K``.
    """
    for length in lengths:
        for k in steps:
            power = partial(uniform_power_case, length, k, _power(2.0))
            yield Plan(power, (methods.PATH,), (16,), num_runs, num_runs, 500)
            tilt, few = partial(uniform_tilt_case, length, k), num_runs // 3
            yield Plan(tilt, methods.ON_UNIFORM, (16,), few, few, 500)


def perturbed(num_runs: int, budgets: tuple[int, ...], *errors: dict[str, float]) -> Iterator[Plan]:
    """Yield B5: wrong denoisers.

    :param num_runs: independent runs; a third for costly methods.
    :param budgets: the budgets ``N``.
    :param errors: arguments of :func:`perturbed_case`.
    """
    for error in errors:
        case = partial(perturbed_case, **error)
        yield Plan(case, methods.ON_PERTURBED, budgets, num_runs, num_runs // 3, 500)


def full_plans() -> Iterator[Plan]:
    """Yield everything."""
    b0, b1 = partial(ordered_case, "B0"), partial(ordered_case, "B1")
    yield Plan(partial(grid_case, "B0", 64), methods.ON_GRID, (8, 32), 600, 600, 300)
    yield Plan(b0, methods.SHORT, (8, 32), 10_000, 3000, goals=SHORT_GOALS)
    yield Plan(partial(grid_case, "B1", 128), methods.ON_GRID, (16,), 300, 300)
    yield Plan(b1, methods.LONG, (16,), 300, 300, 100, goals=LONG_GOALS)
    yield Plan(b1, methods.LONG_BEST, (64,), 300, 300, 50, goals=LONG_GOALS)
    both, rates = (methods.PATH, methods.RATES), (methods.RATES,)
    yield from annealing(60_000, (2.0,), {6: (methods.PATH,), 24: both, 96: rates})
    yield from annealing(60_000, (0.5, 4.0), {24: both})
    yield from pairs(30_000, (24,))
    yield from uniform_noise(3000, (3, 5, 8), (2, 8, 32))
    yield from perturbed(6000, (8, 32), {"noise": 0.5}, {"uniform": 0.1})


def quick_plans() -> Iterator[Plan]:
    """Yield what is done within five minutes."""
    b0, b1 = partial(ordered_case, "B0"), partial(ordered_case, "B1")
    yield Plan(partial(grid_case, "B0", 64), methods.ON_GRID, (8,), 300, 300, 100)
    yield Plan(b0, methods.SHORT, (8, 32), 1500, 1500, 200, goals=SHORT_GOALS)
    yield Plan(b1, methods.LONG_FEW, (16,), 300, 300, 50, goals=LONG_GOALS)
    yield from annealing(30_000, (2.0,), {6: (methods.PATH,)})
    yield from pairs(6000, ())
    yield from uniform_noise(1500, (3,), (2, 8, 32))
    yield from perturbed(1500, (8,), {"noise": 0.5})
