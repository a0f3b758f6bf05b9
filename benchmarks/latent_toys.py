"""Trained networks on data whose entropy is known: how near their bounds come to it.

Two bits that agree mostly, with one code or one number beside them, and (in the full form) 128 bits
of a saw with a random shift, with one of 64 codes. What is printed is the strict bound of a path
less the exact ``-log p(x)``, in nats per sequence, on held-out sequences: zero is perfect. Beside
it stands what a perfect network would reach on the same path without the latent, one token step
after the latent's or as many evaluations of masked diffusion.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console

from benchmarks._report import Row, run, table, verdict
from ppl_diffusion.kernels import Path as Levels
from ppl_diffusion.models.datasets import Sequences
from ppl_diffusion.models.latent import LatentDiffusion
from ppl_diffusion.models.recipes import Recipe
from ppl_diffusion.models.training import train
from ppl_diffusion.testing.latent_toys import LatentProblem, binary_saw, corr_bits

_SEED = 11


@dataclass(frozen=True)
class Case:
    """A problem and a network for it.

    :param problem: the data.
    :param shape: fields of the network's configuration.
    :param steps: optimiser steps.
    :param rows: training sequences.
    :param goal: largest acceptable gap on the path that draws the latent first, nats.
    :param latent_steps: steps of the latent on that path.
    """

    problem: LatentProblem
    shape: Mapping[str, Any]
    steps: int
    rows: int
    goal: float
    latent_steps: int = 1


_SMALL = {"dim": 32, "depth": 2, "heads": 2, "num_slots": 1, "dropout": 0.0}
_SAW = {"dim": 64, "depth": 3, "heads": 4, "num_slots": 1, "learned_positions": True}
QUICK = {
    "two bits, code": Case(
        corr_bits(0.05), {**_SMALL, "num_codes": 2, "latent_dim": 8}, 800, 4000, 0.02
    ),
    "two bits, number": Case(
        corr_bits(0.05), {**_SMALL, "latent_dim": 1}, 1500, 4000, 0.25, latent_steps=16
    ),
}
CASES = {
    **QUICK,
    "saw of 128 bits, code": Case(
        binary_saw(64, length=128), {**_SAW, "num_codes": 64, "latent_dim": 16}, 2500, 40_000, 1.0
    ),
}


def data(problem: LatentProblem, rows: int) -> Sequences:
    """Return sequences drawn from a problem, split into three."""
    generator = torch.Generator().manual_seed(_SEED)
    drawn = [problem.draw(n, generator)[0] for n in (rows, 1000, 2000)]
    return Sequences(
        *drawn,
        test_family=torch.arange(2000),
        related=drawn[0],
        related_weights=torch.ones(rows, dtype=torch.float64),
        licence="generated",
        source="generated",
        vocabulary="01",
        noun="sequences of bits",
        unit="bit",
    )


def trained(name: str, case: Case, sequences: Sequences, folder: Path) -> LatentDiffusion:
    """Train the network of a case with the product's own command."""
    recipe = Recipe(
        family="latent",
        dataset="names",
        shape=dict(case.shape),
        steps=case.steps,
        batch_size=128,
        warmup=50,
        objective="latent",
        shares=(1.0, 1.0),
        validate_every=max(case.steps // 8, 1),
    )
    made = train(name, out=folder, recipe=recipe, sequences=sequences, seed=0, quiet=True)
    assert isinstance(made.program, LatentDiffusion)
    return made.program


def gap(program: LatentDiffusion, problem: LatentProblem, rows: Any, path: Levels) -> Any:
    """Return the bound less ``-log p(x)``, mean and standard error, nats per sequence."""
    found = program.bound(rows, path, generator=torch.Generator().manual_seed(1))
    excess = found.bound + problem.log_prob(rows)
    return float(excess.mean()), float(excess.std()) / len(excess) ** 0.5


def measure(quick: bool, console: Console) -> list[Row]:
    """Train on data of known entropy and compare bounds with it.

    :param quick: two bits alone.
    :param console: where the table goes.
    """
    rows: list[Row] = []
    made = table(
        "Bound less -log p(x), nats per sequence",
        ["data", "path", "evaluations", "gap", "s.e.", "goal"],
    )
    for name, case in (QUICK if quick else CASES).items():
        sequences = data(case.problem, case.rows)
        with TemporaryDirectory() as folder:
            program = trained("toy", case, sequences, Path(folder))
        first = Levels.sequential(case.latent_steps, 1)
        paths = {"seq": first, "masked": Levels.masked(first.num_steps)}
        for label, path in paths.items():
            value, error = gap(program, case.problem, sequences.test, path)
            where = {"problem": name, "method": label, "evaluations": path.num_steps, "se": error}
            goal = case.goal if label == "seq" else None
            row = Row("gap", value, "nats", len(sequences.test), goal, where)
            rows.append(row)
            shown = (f"{value:.4f}", f"{error:.4f}", verdict(row))
            made.add_row(name, label, str(path.num_steps), *shown)
    console.print(made)
    return rows


if __name__ == "__main__":
    run(measure)
