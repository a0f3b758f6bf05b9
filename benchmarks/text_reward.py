"""Sentences under a reward: what the reward, an honest judge and the prior say of them.

A character prior over restaurant reviews is steered by a classifier's log-probability of praise,
freely and with the beginning of a sentence held. Every method sends the same number of states
through the network in a run (particles, with their children, times steps). What is printed is the
mean over the particles of a run as the method weighs them, its error over runs:

* ``reward``: probability of praise by ``yelp-reward``, which steers;
* ``judge``: by ``yelp-judge``, which was trained on other sentences and steers nothing;
* ``bits``: the prior's bound in bits per character: what pleases a classifier and is no sentence is
  costly here;
* ``distinct``: share of different sentences among as many as a run has particles, drawn from it.

Only committed files are read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor

from benchmarks._report import JsonFile, Quick, Row, console, table, write
from benchmarks.quality import load_prior
from ppl_diffusion.inference import SMC, AnchoredSMC, QuantisedExpectation, SoftValueGuidance
from ppl_diffusion.models import load_text_classifier
from ppl_diffusion.models.program import DiffusionProgram
from ppl_diffusion.models.sequences import PADDING, unpad
from ppl_diffusion.models.text_reward import TextClassifier
from ppl_diffusion.smc.posterior import ParticlePosterior

BEGINNINGS = {"free": "", "infilling": "the food was "}
"""What is held of a sentence, by the name of the problem."""
STEPS, PARTICLES, CHILDREN, TEMPERATURE = 24, 8, 4, 0.25
_COLUMNS = ("reward", "judge", "bits", "distinct")


@dataclass(frozen=True)
class Contender:
    """A way to steer; see :class:`SMC`.

    :param share: particles of a run over :data:`PARTICLES`; what has children has fewer.
    """

    name: str
    method: Any
    options: dict[str, Any] = field(default_factory=dict)
    share: float = 1.0


def contenders(iterations: int) -> list[Contender]:
    """Return all ways to steer.

    :param iterations: of the inner loop of those that follow the gradient.
    """
    loop = {"num_iterations": iterations, "learning_rate": 0.5}
    soft = QuantisedExpectation(**loop, quantiser="entropy-mix", kl_weight=1.0)  # type: ignore[arg-type]
    svdd = SoftValueGuidance(num_children=CHILDREN, weighted=False, alpha=1.0)
    tokens = {**loop, "token": "sample"}
    return [
        Contender("prior", "prior"),
        Contender("best of N", "best-of-n"),
        Contender("SVDD-PM", svdd, share=1 / CHILDREN),
        Contender("aps", "aps", loop),
        Contender("aps, sampled", "aps", {**tokens, "quantiser": "gumbel"}),
        Contender("aps, entropy mix", "aps", {**tokens, "quantiser": "entropy-mix"}),
        Contender("smc", "smc"),
        Contender("aps-smc", AnchoredSMC(expectation=soft)),
    ]


@dataclass(frozen=True)
class Judges:
    """Whoever says what a sentence is worth.

    :param prior: for the bound.
    :param reward: steers.
    :param judge: does not.
    :param times: times of the bound.
    """

    prior: DiffusionProgram
    reward: TextClassifier
    judge: TextClassifier
    times: int

    def values(self, rows: Tensor) -> dict[str, Tensor]:
        """Return what each says of sentences, float64 ``(n,)``.

        :param rows: int64 ``(n, L)``.
        """
        generator = torch.Generator().manual_seed(0)
        terms = self.prior.bound_terms(rows, num_times=self.times, generator=generator)
        return {
            "reward": self.reward.probability(rows).double(),
            "judge": self.judge.probability(rows).double(),
            "bits": terms.mean(0) / (rows.shape[-1] * math.log(2.0)),
        }


def prompt_of(prior: DiffusionProgram, beginning: str) -> Tensor:
    """Return a beginning as a prompt, int64 ``(L,)``, -1 where nothing is held.

    :param beginning: its characters.
    """
    held = prior.encode(beginning.ljust(prior.length, PADDING))
    return torch.where(torch.arange(prior.length) < len(beginning), held, -1)


def steer(
    judges: Judges, contender: Contender, beginning: str, runs: int
) -> tuple[ParticlePosterior, dict[str, Tensor]]:
    """Run one contender, and return its particles and the figures of each run, ``(R,)`` each.

    :param beginning: what is held.
    :param runs: independent runs.
    """
    prior = judges.prior
    chain = prior.chain(STEPS, prompt=prompt_of(prior, beginning))
    posterior = SMC(
        chain,
        judges.reward.reward(1, temperature=TEMPERATURE),
        method="importance-sampling" if contender.method == "prior" else contender.method,
        num_particles=round(PARTICLES * contender.share),
        num_runs=runs,
        store_path=False,
        **contender.options,
    ).run(seed=0)
    weights = posterior.log_weights.exp()
    if contender.method == "prior":
        weights = torch.full_like(weights, 1 / weights.shape[-1])
    flat = judges.values(posterior.x0.flatten(0, 1))
    figures = {k: (weights * v.reshape(weights.shape)).sum(-1) for k, v in flat.items()}
    return posterior, figures | {"distinct": _distinct(posterior.x0, weights)}


def _distinct(x0: Tensor, weights: Tensor) -> Tensor:
    """Return the share of different sentences among draws from each run, as many as particles."""
    size = weights.shape[-1]
    points = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    picks = torch.searchsorted(weights.cumsum(-1), points.expand(len(weights), -1).contiguous())
    rows = [run[pick.clamp_max(size - 1)] for run, pick in zip(x0, picks, strict=True)]
    return torch.tensor([len(row.unique(dim=0)) / size for row in rows], dtype=torch.float64)


def measure(judges: Judges, runs: int, iterations: int, screen: Console) -> list[Row]:
    """Run all contenders on both problems.

    :param runs: independent runs of each.
    :param iterations: of the inner loop.
    :param screen: where tables and examples go.
    """
    rows: list[Row] = []
    for problem, beginning in BEGINNINGS.items():
        made, examples = _table(problem, beginning, runs), []
        for contender in contenders(iterations):
            posterior, figures = steer(judges, contender, beginning, runs)
            cost = posterior.num_evaluations / runs
            found = _rows(problem, contender.name, figures, cost)
            made.add_row(contender.name, *map(_cell, found), f"{cost:.0f}")
            best = int(posterior.log_weights[0].argmax())
            text = str(judges.prior.decode(posterior.x0[0, best]))
            examples.append(f"{contender.name:>18}: {unpad(text)}")
            rows += found
        screen.print(made)
        screen.print("\n".join(examples), highlight=False, markup=False)
    return rows


def _table(problem: str, beginning: str, runs: int) -> Any:
    held = f", {beginning!r} held" if beginning else ""
    return table(
        f"{problem}{held}: {PARTICLES} particles, {STEPS} steps, {runs} runs",
        ["method", *_COLUMNS, "evaluations"],
        "± one standard error over runs; evaluations: states that the network saw in a run",
    )


def _cell(row: Row) -> str:
    return f"{row.value:.3f} ± {row.coordinates['se']:.3f}"


def _rows(problem: str, name: str, figures: dict[str, Tensor], cost: float) -> list[Row]:
    rows = []
    for measure_, values in figures.items():
        error = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        coordinates = {"problem": problem, "method": name, "se": error, "evaluations": cost}
        unit = "bits per character" if measure_ == "bits" else "share"
        rows.append(Row(measure_, float(values.mean()), unit, len(values), None, coordinates))
    return rows


def main(
    quick: Quick = False,
    json_file: JsonFile = None,
    prior: Annotated[str, typer.Option(help="Name or folder of a prior over sentences.")] = "yelp",
    iterations: Annotated[int, typer.Option(min=0, help="Of the inner loop.")] = 3,
) -> None:
    """Compare ways to steer sentences by a reward, at equal evaluations of the denoiser."""
    screen, rows = console(), list[Row]()
    program = load_prior(prior, screen)
    if program is not None:
        reward, judge = (load_text_classifier(n) for n in ("yelp-reward", "yelp-judge"))
        judges = Judges(program, reward, judge, times=4 if quick else 16)
        rows = measure(judges, 4 if quick else 32, iterations, screen)
    write(rows, json_file)


if __name__ == "__main__":
    typer.run(main)
