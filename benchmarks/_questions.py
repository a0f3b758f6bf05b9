"""Questions with right answers: equations with characters to be found, and Sudoku puzzles."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ppl_diffusion.models import arithmetic, sudoku
from ppl_diffusion.models.program import DiffusionProgram
from ppl_diffusion.potentials import EmbeddedPotential

HIDDEN = {"result": (6, 7, 8, 9), "operand": (3, 4), "factors": (0, 1, 3, 4)}
"""Which characters of a product a kind of question hides."""
CLUES = (40, 30)


@dataclass(frozen=True)
class Questions:
    """Questions of one kind.

    :param kind: what is hidden.
    :param prompts: what is known, int64 ``(n, L)``, -1 where a token is asked for.
    :param reward: what guides the search for an answer.
    :param right: ``x0 (*batch, L) -> bool (*batch,)``: whether an answer is one.
    :param group: tokens revealed from one prediction.
    """

    kind: str
    prompts: Tensor
    reward: EmbeddedPotential
    right: Callable[[Tensor], Tensor]
    group: int = 1

    def num_steps(self, index: int) -> int:
        """Return how many predictions an answer takes.

        :param index: of the question.
        """
        hidden = int((self.prompts[index] < 0).sum())
        return -(-hidden // self.group)


def equation_questions(count: int, slack: float = 1e-3, seed: int = 0) -> list[Questions]:
    """Return questions about products that no prior was trained on, the hardest equations.

    :param count: questions of each kind.
    :param slack: of the reward.
    :param seed: of what is asked.
    """
    held_out = arithmetic.sequences().test
    generator = torch.Generator().manual_seed(seed)
    products = held_out[held_out[:, 2] == arithmetic.LETTERS.index("*")]
    rows = products[torch.randperm(len(products), generator=generator)[:count]]
    reward, verifier = arithmetic.EquationReward(slack), arithmetic.RightEquation()
    questions = []
    for kind, places in HIDDEN.items():
        prompts = rows.clone()
        prompts[:, list(places)] = -1
        questions.append(Questions(kind, prompts, reward, verifier.satisfied))
    return questions


def sudoku_questions(count: int, temperature: float = 0.5, seed: int = 1) -> list[Questions]:
    """Return puzzles made of grids generated anew, with clues at random places.

    A grid that keeps all rules and clues is right, whether or not it is the only one.

    :param count: puzzles of each kind.
    :param temperature: broken pairs per nat.
    :param seed: of grids and clues.
    """
    source, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    grids = torch.tensor([sudoku.filled_grid(source) for _ in range(count)])
    order = torch.rand(grids.shape, generator=generator).argsort(-1)
    rules = sudoku.SudokuRules(temperature)
    return [
        Questions(
            f"{clues} clues",
            torch.where(order < clues, grids, -1),
            rules,
            lambda x0: rules.broken(x0) == 0,
            group=3,
        )
        for clues in CLUES
    ]


def questions_for(prior: DiffusionProgram, count: int) -> list[Questions]:
    """Return the questions that a prior is asked, by what it is a prior of.

    :param prior: over equations or over grids.
    :param count: questions of each kind.
    """
    letters = "".join(prior.vocabulary)
    return sudoku_questions(count) if letters == sudoku.DIGITS else equation_questions(count)
