"""Look-aheads against none: how often a guess that is wrong makes the evidence wrong.

Problems of 27 sequences (three tokens, one reveal per step, exact denoiser): ``P`` is the softmax
of 27 normals and ``log G`` another 27, times a scale, so that one sequence may hold most of the
posterior mass and be guessed by nobody. D1 to D3 are three of them; the panel has twelve at each
scale. B0 and B1 are those of ``benchmarks.accuracy``, one reveal per step. Per look-ahead: the mean
of ``Z_hat / Z`` (one, for every look-ahead; where it is far below, the rest sits in runs rarer than
those made here), the error and the median of ``log Z_hat - log Z``, and the *mass* of the prior
that the particles still stand for. Panel: the error over that of no look-ahead.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from benchmarks._problems import Problem
from benchmarks._report import Row, run, table
from ppl_diffusion.denoisers import MarkovDenoiser, TableDenoiser
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.inference import SMC
from ppl_diffusion.kernels import Absorbing, OrderedKernel
from ppl_diffusion.potentials import Potential
from ppl_diffusion.smc import Defensive, PersistentFill

MAX_RUNS = 500  # side by side
WORSE = 1.06
"""The goal: the worst of all problems, relative to no look-ahead."""
LOST = 0.8
"""Mean of ``Z_hat / Z`` below which a look-ahead counts as having lost a problem."""

LOOKAHEADS: dict[str, dict[str, Any]] = {
    "none": {"twist": None},
    "argmax": {"twist": "argmax"},
    "persistent 4": {"twist": PersistentFill(4)},
    "persistent 16": {"twist": PersistentFill(16)},
    "argmax, floor .3": {"twist": Defensive(0, 0.3)},
    "persistent 4, floor .2": {"twist": PersistentFill(4, 0.2)},
    "defensive": {"twist": "defensive"},
    "clamped argmax": {"method": "twisted", "twist": "argmax"},
    "clamped defensive": {"method": "twisted"},
}
PANEL = ("none", "argmax", "persistent 4", "argmax, floor .3", "defensive")


@dataclass(frozen=True, eq=False)
class Case:
    """A chain, its potential and the logarithm of its evidence."""

    name: str
    chain: ReverseChain
    potential: Potential
    log_z: float


def steep(name: str, seed: int, scale: float) -> Case:
    """Return a problem of 27 sequences.

    :param seed: of the law and the potential.
    :param scale: standard deviation of ``log G``, in nats.
    """
    rng = np.random.default_rng(seed)
    law = torch.softmax(torch.tensor(rng.normal(size=27)), 0).reshape(3, 3, 3)
    log_g = scale * torch.tensor(rng.normal(size=27)).reshape(3, 3, 3)
    kernel = OrderedKernel(Absorbing(3), TableDenoiser(law, Absorbing(3)), length=3)
    potential = Potential(lambda x: log_g[tuple(x.movedim(-1, 0))])
    log_z = float(torch.logsumexp((law.log() + log_g).flatten(), 0))
    return Case(name, ReverseChain(kernel, 3), potential, log_z)


def markov(name: str) -> Case:
    """Return B0 or B1 with one reveal per step."""
    problem = Problem.load(name)
    process = Absorbing(problem.vocab_size)
    denoiser = MarkovDenoiser(problem.initial, problem.transition, process)
    kernel = OrderedKernel(process, denoiser, length=problem.length)
    chain = ReverseChain(kernel, problem.length)
    return Case(name, chain, Potential(problem.log_potential), problem.log_z)


def errors(case: Case, lookahead: str, size: int, num_runs: int) -> tuple[Tensor, Tensor]:
    """Return ``log Z_hat - log Z`` and the mass, one per run.

    :param lookahead: its name.
    :param size: particles per run.
    """
    options = {"num_particles": size, "store_path": False, **LOOKAHEADS[lookahead]}
    found = []
    for seed, start in enumerate(range(0, num_runs, MAX_RUNS)):
        runs = min(MAX_RUNS, num_runs - start)
        found.append(SMC(case.chain, case.potential, num_runs=runs, **options).run(seed=seed))
    log_z = torch.cat([post.log_evidence for post in found])
    mass = torch.cat([post.log_mass[:, -1] for post in found if post.log_mass is not None])
    return log_z - case.log_z, mass.exp()


def measure_case(case: Case, size: int, num_runs: int, *names: str) -> Iterator[Row]:
    """Return a row per look-ahead."""
    for name in names:
        error, mass = errors(case, name, size, num_runs)
        ratio = error.exp()
        coordinates = {
            "problem": case.name,
            "method": name,
            "num_particles": size,
            "mean": float(ratio.mean()),
            "mean_se": float(ratio.std() / math.sqrt(num_runs)),
            "median": float(error.median()),
            "mass": float(mass.mean()),
        }
        yield Row("lookahead", _rmse(error), "nats", num_runs, coordinates=coordinates)


def _rmse(error: Tensor) -> float:
    return float(error.square().mean().sqrt())


def measure_panel(scale: int, seeds: int, num_runs: int) -> Iterator[Row]:
    """Return, per look-ahead, errors relative to none over problems of one scale, N = 32."""
    cases = [steep(f"P({scale}) {seed}", seed, scale) for seed in range(seeds)]
    none = [_rmse(errors(case, "none", 32, num_runs)[0]) for case in cases]
    for name in PANEL[1:]:
        found = [errors(case, name, 32, num_runs)[0] for case in cases]
        relative = torch.tensor([_rmse(e) / n for e, n in zip(found, none, strict=True)])
        lost = sum(float(e.exp().mean()) < LOST for e in found)
        worst = float(relative.max())
        coordinates = {
            "problem": f"P({scale})",
            "method": name,
            "num_particles": 32,
            "geometric_mean": float(relative.log().mean().exp()),
            "lost": lost,
        }
        goal = WORSE if name == "defensive" else None
        yield Row("lookahead_worst", worst, "of no look-ahead", seeds, goal, coordinates)


def measure(quick: bool, console: Console) -> list[Row]:
    """Measure what look-aheads do to the evidence."""
    runs, seeds = (1000, 6) if quick else (4000, 12)
    steep_cases = [steep("D1", 8, 8), steep("D2", 84, 5), steep("D3", 5, 4)]
    plans = [(case, size, runs) for case in steep_cases for size in (8, 32, 128)]
    plans += [(markov("B0"), 32, runs)]
    plans += [(markov("B1"), size, 40 if quick else 300) for size in ((8,) if quick else (8, 32))]
    rows = [row for plan in plans for row in measure_case(*plan, *LOOKAHEADS)]
    console.print(_case_table(rows))
    panel = [row for scale in (2, 4, 8) for row in measure_panel(scale, seeds, runs // 4)]
    console.print(_panel_table(panel))
    return rows + panel


def _case_table(rows: list[Row]) -> Any:
    columns = ["problem", "look-ahead", "mean Z^/Z", "s.e.", "RMSE", "median", "mass"]
    made = table("log Z_hat - log Z of one run", columns)
    for row in rows:
        c = row.coordinates
        numbers = [c["mean"], c["mean_se"], row.value, c["median"], c["mass"]]
        cells = [f"{number:.2f}" for number in numbers]
        made.add_row(f"{c['problem']} N={c['num_particles']}", c["method"], *cells)
    return made


def _panel_table(rows: list[Row]) -> Any:
    columns = ["panel", "look-ahead", "geometric mean", "worst", "lost", "goal"]
    made = table("RMSE of log Z over that of no look-ahead, N = 32", columns)
    for row in rows:
        c = row.coordinates
        goal = "" if row.ok is None else ("met" if row.ok else "missed")
        cells = [f"{c['geometric_mean']:.2f}", f"{row.value:.2f}", str(c["lost"]), goal]
        made.add_row(c["problem"], c["method"], *cells)
    return made


if __name__ == "__main__":
    run(measure)
