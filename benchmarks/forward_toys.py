"""Noise learned by trained networks, on data whose entropy is known: how near to it they come.

Two bits that agree mostly, and three of a mixture, in two steps: masks that are hidden as any state
or only shown sooner or later, and uniform noise. Learned noise reaches the entropy of each (F4 to
F6 of the tests); noise that is given does not. Trained by the product's own command from ten seeds,
and scored by enumeration of all sequences and states, not by samples: ``gap`` is the bound of the
trained pair less the entropy, ``chain`` how much of it a perfect chain of the same noise would take
off, ``total correlation`` what is left in the two steps, all in nats per sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from benchmarks._report import Row, run, table, verdict
from ppl_diffusion.models.datasets import Sequences
from ppl_diffusion.models.forward_learned import ForwardLearned
from ppl_diffusion.models.recipes import Recipe
from ppl_diffusion.models.training import train
from ppl_diffusion.testing.dense import all_states
from ppl_diffusion.testing.forward_learned_laws import ForwardLaw
from ppl_diffusion.testing.latent_toys import LatentProblem, corr_bits, mix_prod

SEEDS, GOAL = 10, 0.02
"""Runs of a case, and the largest gap that any of them may leave, nats."""
_VALIDATION = 400
"""Sequences of a validation, each as often as the data say."""
_SHAPE = {"dim": 32, "depth": 2, "heads": 2, "dropout": 0.0, "learned_positions": True}


@dataclass(frozen=True)
class Case:
    """Data and how noise is learned for them.

    :param problem: the data.
    :param given: what masked diffusion of two steps leaves, nats.
    :param family: of the prior.
    :param noise: what is learned of it.
    :param steps: optimiser steps.
    """

    problem: LatentProblem
    given: float
    family: str = "forward-learned"
    noise: str = "tokens"
    steps: int = 2000


_BITS, _MIXTURE = corr_bits(0.05), mix_prod(3, 0.9)
QUICK = {"two bits, any state": Case(_BITS, 0.189596, steps=1200)}
CASES = {
    **QUICK,
    "two bits, uniform": Case(_BITS, 0.189596, family="forward-learned-uniform", steps=1200),
    "three bits, any state": Case(_MIXTURE, 0.233349),
    "three bits, shown or not": Case(_MIXTURE, 0.233349, noise="reveals"),
}


def data(problem: LatentProblem) -> Sequences:
    """Return all sequences of a problem, drawn as often as it says."""
    rows = all_states(2, problem.length)
    law = problem.log_prob(rows).exp()
    counts = (_VALIDATION * law / law.sum()).round().long()
    valid = rows.repeat_interleave(counts, 0)
    return Sequences(
        rows, valid, rows, train_weights=law, test_family=torch.arange(len(rows)),
        related=rows, related_weights=law, licence="generated", source="generated",
        vocabulary="01", noun="sequences of bits", unit="bit",
    )  # fmt: skip


def trained(case: Case, seed: int, folder: Path) -> ForwardLearned:
    """Train noise and chain of a case with the product's own command."""
    recipe = Recipe(
        family=case.family,
        dataset="names",
        shape={**_SHAPE, "num_steps": 2, "noise": case.noise},
        steps=case.steps,
        batch_size=128,
        learning_rate=3e-3,
        weight_decay=0.0,
        warmup=50,
        ema_decay=0.99,
        objective="fldd",
        shares=(1.0, 1.0),
        validate_every=case.steps // 8,
        valid_times=16,
    )
    made = train("toy", out=folder, recipe=recipe, sequences=data(case.problem), seed=seed,
                 quiet=True)  # fmt: skip
    assert isinstance(made.program, ForwardLearned)
    return made.program


@torch.no_grad()
def score(program: ForwardLearned, problem: LatentProblem) -> Mapping[str, float]:
    """Return what a trained pair leaves, by enumeration, nats per sequence."""
    x = all_states(2, problem.length)
    data = problem.log_prob(x).exp()
    law = ForwardLaw(data, x, program.marginals(x), program.steps_coupling)
    network: Any = program.denoiser
    bound = float(law.bound(lambda z, t: network(z, t / program.num_steps).double()))
    steps = range(1, program.num_steps + 1)
    return {
        "gap": bound - law.entropy,
        "chain": bound - law.nelbo(),
        "total_correlation": sum(law.total_correlation(t) for t in steps),
    }


def measure(quick: bool, console: Console) -> list[Row]:
    """Learn noise for data of known entropy, from many seeds.

    :param quick: two bits from three seeds.
    :param console: where the table goes.
    """
    rows: list[Row] = []
    seeds = 3 if quick else SEEDS
    made = table(
        "Bound less entropy, nats per sequence; two steps",
        ["data, noise", "given", "median", "worst", "chain", "correlation", "goal of the worst"],
        f"given: noise that is not learned; chain and correlation: means of {seeds} seeds",
    )
    for name, case in (QUICK if quick else CASES).items():
        found = []
        progress = Console(stderr=True)
        for seed in track(range(seeds), name, console=progress, transient=True):
            with TemporaryDirectory() as folder:
                found.append(score(trained(case, seed, Path(folder)), case.problem))
        gaps = [one["gap"] for one in found]
        rest = {key: sum(one[key] for one in found) / seeds for key in found[0] if key != "gap"}
        where = {"case": name, "given": case.given, "median": median(gaps), **rest}
        row = Row("forward_toys", max(gaps), "nats", seeds, GOAL, where)
        rows.append(row)
        numbers = (case.given, median(gaps), row.value, *rest.values())
        made.add_row(name, *(f"{value:.4f}" for value in numbers), verdict(row))
    console.print(made)
    return rows


if __name__ == "__main__":
    run(measure)
