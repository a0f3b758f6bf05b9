"""How large a network, and for how long: chosen from the data, all of it open to change.

With ``N`` training tokens in rows of up to ``L`` tokens:

- width: 64 below 100,000 tokens, 96 below 5 million, 128 above; 3 blocks; heads of about 24.
- embedding: of 7 tokens at once where rows of up to 16 tokens or more have at most 32 symbols, such
  as bases: motifs are then seen without attention.
- dropout: 0.1 below 100,000 tokens, none above.
- batch: the power of two nearest to 1024 / L rows, from 16 to 256: in a few minutes many small
  steps lead further than a few large ones.
- learning rate: 0.2 / width, at most 0.002.
- steps: what fits into the minutes that reading the data has left (half of them at least), by the
  time of a few steps measured at the start and a fifth more for averages and checkpoints, with a
  tenth of the time for validation; at most so many that every training row is seen 200 times, but
  never fewer than 1000 for that reason.
- validation: 20 times, on as many rows as a tenth of the time allows.

Only the steps depend on the machine. They are written down: the same number given as ``--steps``
leads to the same bytes.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ppl_diffusion.models.program import FAMILIES
from ppl_diffusion.models.recipes import Recipe
from ppl_diffusion.models.sequences import Sequences

MINUTES = 8.0
"""What reading and training may take if nothing is said; the card is not counted."""
_OVERHEAD = 1.2
_VALIDATIONS = 20
_VALID_SHARE = 0.1
_VALID_TIMES = 8
_BACKWARD = 3.0  # a training step on a row costs about so many evaluations
_STEM, _STEM_LENGTH, _STEM_SYMBOLS = 7, 16, 32
_EPOCHS, _FEWEST = 200, 1000
_TIMED_SECONDS, _TIMED_STEPS, _UNTIMED_STEPS = 4.0, 40, 3
_LABEL_DROPOUT = 0.2


@dataclass(frozen=True)
class Asked:
    """What was said in place of the rule; None where nothing was.

    :param minutes: how long training may take.
    :param steps: optimiser steps, in place of the minutes.
    """

    minutes: float | None = None
    steps: int | None = None
    dim: int | None = None
    depth: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    dropout: float | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "dim", "depth", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"The option {name} is {value}; give 1 or more.")
        for name in ("minutes", "learning_rate"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0.0):
                raise ValueError(f"The option {name} is {value}; give a number above 0.")
        if self.dropout is not None and not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"The option dropout is {self.dropout}; give a number in [0, 1).")
        if self.minutes is not None and self.steps is not None:
            raise ValueError("Minutes and steps were both given; leave one of them out.")


def choose(sequences: Sequences, asked: Asked, *, classes: int = 0) -> Recipe:
    """Return the recipe of the rule, with the steps that were asked for, or one step.

    :param classes: number of class labels, 0 for none.
    """
    tokens = train_tokens(sequences)
    dim = asked.dim or (64 if tokens < 100_000 else 96 if tokens < 5_000_000 else 128)
    dropout = asked.dropout if asked.dropout is not None else 0.1 if tokens < 100_000 else 0.0
    shape: dict[str, Any] = {
        "dim": dim,
        "depth": asked.depth or 3,
        "heads": heads(dim),
        "mlp_ratio": 2.0,
        "dropout": dropout,
        "learned_positions": True,
        "stem_width": _STEM if _has_motifs(sequences) else 1,
    }
    recipe = Recipe(
        family="masked",
        shape=shape | ({"num_classes": classes} if classes else {}),
        batch_size=asked.batch_size or _batch(sequences.length),
        learning_rate=asked.learning_rate or min(0.2 / dim, 2e-3),
        shares=(1.0, 1.0),
        options={"label_dropout": _LABEL_DROPOUT} if classes else {},
    )
    return with_steps(recipe, asked.steps or 1, len(sequences.valid))


def with_steps(recipe: Recipe, steps: int, valid_rows: int) -> Recipe:
    """Return a recipe of another length, with its validations spread over it.

    :param valid_rows: how many validation rows there are.
    """
    every = max(1, math.ceil(steps / _VALIDATIONS))
    affordable = _VALID_SHARE * every * recipe.batch_size * _BACKWARD / _VALID_TIMES
    return dataclasses.replace(
        recipe,
        steps=steps,
        validate_every=every,
        valid_times=_VALID_TIMES,
        valid_rows=max(1, min(valid_rows, max(int(affordable), 100))),
        warmup=min(200, max(1, steps // 10)),
    )


def steps_in(
    minutes: float, seconds: float, sequences: Sequences, recipe: Recipe, *, spent: float = 0.0
) -> int:
    """Return how many steps fit into some minutes.

    :param seconds: what a step takes.
    :param spent: seconds of the minutes that are gone.
    """
    left = max(60.0 * minutes - spent, 30.0 * minutes)
    affordable = left * (1.0 - _VALID_SHARE) / (_OVERHEAD * seconds)
    epochs = _EPOCHS * len(sequences.train) / recipe.batch_size
    return _rounded(max(1.0, min(affordable, max(epochs, _FEWEST))))


def seconds_per_step(sequences: Sequences, recipe: Recipe, device: torch.device) -> float:
    """Measure what an optimiser step takes, with a network that is thrown away."""
    with torch.random.fork_rng(devices=[]):
        program = FAMILIES[recipe.family].build(
            sequences.vocabulary, sequences.length, lengths=sequences.lengths, **recipe.shape
        )
        program.to(device)
        assert isinstance(program.denoiser, torch.nn.Module)
        optimiser = torch.optim.AdamW(program.denoiser.parameters())
        times: list[float] = []
        while len(times) < _TIMED_STEPS and sum(times) < _TIMED_SECONDS:
            times.append(_step(program, sequences, recipe, optimiser))
    settled = times[_UNTIMED_STEPS:] or times
    return sum(settled) / len(settled)


def _step(program: Any, sequences: Sequences, recipe: Recipe, optimiser: Any) -> float:
    began = time.perf_counter()
    picked = torch.randint(len(sequences.train), (recipe.batch_size,))
    labels: Mapping[str, Any] = {}
    if recipe.shape.get("num_classes") and sequences.labels is not None:
        labels = {"labels": sequences.labels[0][picked].to(program.device)}
    optimiser.zero_grad()
    program.loss(sequences.train[picked].to(program.device), **labels).backward()
    optimiser.step()
    return time.perf_counter() - began


def train_tokens(sequences: Sequences) -> int:
    """Return the number of training tokens, without what fills rows up."""
    if sequences.lengths is None:
        return sequences.train.numel()
    return int((sequences.train != len(sequences.vocabulary) - 1).sum())


def _has_motifs(sequences: Sequences) -> bool:
    return sequences.length >= _STEM_LENGTH and len(sequences.vocabulary) <= _STEM_SYMBOLS


def heads(dim: int) -> int:
    """Return the number of heads of about 24 that a width can have.

    :raises ValueError: if the width is odd.
    """
    if dim % 2:
        raise ValueError(f"The option dim is {dim}; give an even number.")
    fitting = [1, *(n for n in range(2, dim // 16 + 1) if dim % (2 * n) == 0)]
    return min(fitting, key=lambda n: abs(dim / n - 24))


def _batch(length: int) -> int:
    return int(min(256, max(16, 2 ** round(math.log2(1024 / length)))))


def _rounded(steps: float) -> int:
    """Round down to two digits, for a number that can be typed."""
    unit = 10 ** max(0, int(math.log10(steps)) - 1)
    return int(steps // unit * unit)
