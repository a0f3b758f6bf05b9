"""Question answering: how often an answer is right, at an equal budget of network evaluations.

A prior over right strings is asked to complete one (equations with characters hidden, Sudoku
puzzles), with a reward that says how right a completion is. Every method may send the same number
of states through the network for a question, particles times predictions; equal ones are sent
once. ``draws`` is the share of its particles, as it weighs them, that are right; ``answer`` whether
the one is right that the reward likes best, as whoever has a verifier would answer. Standard errors
are over questions, and differences to ``ancestral`` are paired. Nothing but committed files is
read.

* ``ancestral``: tokens at random times, from the prior alone; ``random order`` one group after
  another;
* ``confidence``: a draw for every hidden token, the surest are kept (MaskGIT); ``greedy`` takes
  the likeliest ones and is one answer, not many;
* ``aps``: anchors of the reward's gradient, kept by confidence: an optimiser;
* ``smc``: exact for prior times reward, by a look-ahead alone; ``aps-smc`` with anchors as its
  proposal, opening sites independently (``V-A``), by a policy (``V-B``), or by values (``V-C``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor

from benchmarks._questions import Questions, questions_for
from benchmarks._report import JsonFile, Quick, Row, console, table, write
from benchmarks.quality import load_prior
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.inference import SMC, AnchoredSMC, QuantisedExpectation
from ppl_diffusion.kernels import OrderedKernel
from ppl_diffusion.models.program import DiffusionProgram

PRIORS = ("arithmetic", "sudoku")
PARTICLES = {"arithmetic": 4, "sudoku": 8}
SIZES = {"arithmetic": (100, 20), "sudoku": (24, 4)}
"""Questions of each kind, and with ``--quick``."""
_PLAIN: dict[str, Any] = {"num_iterations": 0, "order": "prior", "mask_schedule": "linear"}


@dataclass(frozen=True)
class Contender:
    """A way to answer.

    :param ordered: whether the chain reveals groups in random order; on a time grid otherwise.
    :param method: of :class:`SMC`, with its ``options``.
    :param once: whether all its particles would be the same.
    """

    name: str
    ordered: bool
    method: Any
    options: dict[str, Any]
    once: bool = False


def contenders(iterations: int) -> list[Contender]:
    """Return all ways to answer.

    :param iterations: of the inner loop of those that follow the gradient.
    """
    loop = QuantisedExpectation(num_iterations=iterations, kl_weight=1.0, quantiser="soft")
    kept = {"mask_schedule": "linear", "num_iterations": iterations, "kl_weight": 1.0}
    plain = "importance-sampling"
    return [
        Contender("ancestral", False, plain, {}),
        Contender("random order", True, plain, {}),
        Contender("confidence", False, "aps", {**_PLAIN, "token": "sample"}),
        Contender("greedy", False, "aps", {**_PLAIN, "token": "argmax", "noise": 0.0}, once=True),
        Contender("aps", False, "aps", kept),
        Contender("aps, soft", False, "aps", {**kept, "quantiser": "soft"}),
        Contender("smc", True, "smc", {}),
        Contender("aps-smc V-A", False, AnchoredSMC(expectation=loop), {}),
        Contender("aps-smc V-B", True, AnchoredSMC(expectation=loop, variant="policy"), {}),
        Contender("aps-smc V-C", True, AnchoredSMC(expectation=loop, variant="values"), {}),
    ]


@dataclass(frozen=True)
class Answers:
    """What one contender answered to the questions of one kind, ``(n,)`` each.

    :param answer: 1 where its best particle is right.
    :param draws: weighted share of its particles that are right.
    :param evaluations: states that the network saw: equal ones once, and none where all is known.
    :param rewarded: sequences that the reward was asked about, those of inner loops included.
    """

    answer: Tensor
    draws: Tensor
    evaluations: Tensor
    rewarded: Tensor


def chain_for(prior: DiffusionProgram, questions: Questions, index: int, ordered: bool) -> Any:
    """Return the chain of a question.

    :param index: of the question.
    :param ordered: see :class:`Contender`.
    """
    prompt = questions.prompts[index]
    if not ordered:
        return prior.chain(questions.num_steps(index), prompt=prompt)
    kernel = OrderedKernel(
        prior.process, prior.denoiser, length=prior.length, group_size=questions.group
    )
    return prior.around(kernel, prompt=prompt)


def ask(
    prior: DiffusionProgram, questions: Questions, contender: Contender, particles: int
) -> Answers:
    """Let a contender answer all questions.

    :param particles: of each question.
    """
    found = []
    for index in range(len(questions.prompts)):
        chain: ReverseChain = chain_for(prior, questions, index, contender.ordered)
        count = 1 if contender.once else particles
        run = SMC(
            chain,
            questions.reward,
            method=contender.method,
            num_particles=count,
            store_path=False,
            **contender.options,
        ).run(seed=index)
        right = questions.right(run.x0[0]).double()
        best = int(run.log_potential[0].argmax())
        drawn = float((run.log_weights[0].exp() * right).sum())
        if contender.method == "importance-sampling":
            drawn = float(right.mean())  # what the prior draws, before the reward weighs it
        costs = float(run.num_evaluations), float(run.num_potential_calls)
        found.append((float(right[best]), drawn, *costs))
    return Answers(*torch.tensor(found, dtype=torch.float64).unbind(-1))


def rows_of(
    prior: str, kind: str, name: str, found: Answers, base: Answers, particles: int
) -> list[Row]:
    """Return what was found as rows.

    :param base: what differences are paired with.
    :param particles: of each question.
    """
    made = []
    for measure in ("answer", "draws"):
        values, others = getattr(found, measure), getattr(base, measure)
        coordinates = {
            "problem": prior,
            "kind": kind,
            "method": name,
            "se": standard_error(values),
            "gain": float((values - others).mean()),
            "gain_se": standard_error(values - others),
            "num_particles": particles,
            "evaluations": float(found.evaluations.mean()),
            "rewarded": float(found.rewarded.mean()),
        }
        made.append(Row(measure, float(values.mean()), "share", len(values), None, coordinates))
    return made


def standard_error(values: Tensor) -> float:
    """Return the standard error of a mean over questions.

    :param values: float64 ``(n,)``.
    """
    return float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def measure(
    prior: DiffusionProgram, questions: Questions, particles: int, iterations: int
) -> list[Row]:
    """Ask all contenders all questions of a kind.

    :param particles: of each question.
    :param iterations: of the inner loop.
    """
    rows: list[Row] = []
    base = None
    for contender in contenders(iterations):
        found = ask(prior, questions, contender, particles)
        base = base or found
        rows += rows_of(prior.name, questions.kind, contender.name, found, base, particles)
    return rows


def print_rows(rows: Sequence[Row], screen: Console) -> None:
    """Print the table of one kind of question.

    :param rows: from :func:`measure`.
    """
    where = rows[0].coordinates
    made = table(
        f"{where['problem']}: {where['kind']} ({rows[0].n} questions, "
        f"{where['num_particles']} particles each)",
        ["method", "answer right", "over ancestral", "draws right", "states", "reward"],
        "Answer: the particle that the reward likes best; draws: all of them, by weight. Every\n"
        "method may ask the network about as many states, particles times steps (greedy: steps);\n"
        "'states' are those that it did ask about, equal ones once, 'reward' sequences scored.\n"
        "The reward of equations knows all products; an inner loop reads it out.",
    )
    for answer, draws in zip(rows[::2], rows[1::2], strict=True):
        c, d = answer.coordinates, draws.coordinates
        made.add_row(
            c["method"],
            f"{answer.value:.3f} ± {c['se']:.3f}",
            f"{c['gain']:+.3f} ± {c['gain_se']:.3f}",
            f"{draws.value:.3f} ± {d['se']:.3f}",
            f"{c['evaluations']:.0f}",
            f"{c['rewarded']:.0f}",
        )
    screen.print(made)


def main(
    quick: Quick = False,
    json_file: JsonFile = None,
    prior: Annotated[
        list[str] | None, typer.Option(help="Name or folder of a prior; may be repeated.")
    ] = None,
    iterations: Annotated[int, typer.Option(min=0, help="Of the inner loop.")] = 10,
    particles: Annotated[int | None, typer.Option(min=1, help="Of each question.")] = None,
) -> None:
    """Compare ways to answer questions at an equal budget of network evaluations."""
    screen, rows = console(), list[Row]()
    for name in prior or PRIORS:
        program = load_prior(name, screen)
        if program is not None:
            key = "arithmetic" if program.length == 10 else "sudoku"
            for questions in questions_for(program, SIZES[key][quick]):
                found = measure(program, questions, particles or PARTICLES[key], iterations)
                print_rows(found, screen)
                rows += found
    write(rows, json_file)


if __name__ == "__main__":
    typer.run(main)
