"""How each shipped prior is trained: data, network and optimisation, by name."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from ppl_diffusion.models import (  # noqa: F401  (the families of the recipes)
    forward_learned,
    latent,
    masked,
    uniform,
)
from ppl_diffusion.models.image_recipes import IMAGE_RECIPES
from ppl_diffusion.models.program import FAMILIES

ObjectiveName = Literal["nelbo", "curriculum", "distillation", "latent", "fldd"]
DecayName = Literal["cosine", "none"]
OBJECTIVES: tuple[str, ...] = get_args(ObjectiveName)
_NAMES = {"objective": OBJECTIVES, "decay": get_args(DecayName)}
_LOWEST = {"steps": 1, "batch_size": 1, "warmup": 0, "validate_every": 1, "valid_times": 1}
_DISTILLATION_RATE = 0.2  # learning rate of distillation over that of training, as Duo has it


def _counts(value: object, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


@dataclass(frozen=True)
class Recipe:
    """A training run, all of it but the seed.

    Training is one run in two phases: related rows first, then mostly the rows of the law to be
    learnt. What is kept is the average of the weights at its best validation bound.

    :param family: ``"masked"``, ``"uniform"``, or another family whose module was imported.
    :param dataset: a key of :data:`ppl_diffusion.models.datasets.READERS`, empty for data of
        one's own.
    :param shape: fields of :class:`~ppl_diffusion.denoisers.config.TransformerConfig`.
    :param steps: optimiser steps, of ``batch_size`` sequences each.
    :param learning_rate: peak of the cosine schedule (AdamW), after ``warmup`` linear steps.
    :param weight_decay: of AdamW, on matrices only.
    :param ema_decay: decay of the moving average of the weights, per step.
    :param switch: share of the steps after which the second phase begins.
    :param shares: share of a batch drawn from the law to be learnt, in either phase.
    :param both_strands: whether every row is replaced by its reverse complement half of the time.
    :param validate_every: steps between validations.
    :param valid_rows: how many validation sequences, spread over all of them, or None for all;
        each is bounded at ``valid_times`` times.
    :param objective: what a step minimises, one of :data:`OBJECTIVES`.
    :param options: further arguments of the objective,
        :class:`~ppl_diffusion.models.objectives.Curriculum`,
        :class:`~ppl_diffusion.models.distillation.Distillation`,
        :class:`~ppl_diffusion.models.latent_objective.LatentObjective` or
        :class:`~ppl_diffusion.models.forward_objective.ForwardObjective`.
    :param init: the prior that training starts from, a shipped name; None to start anew.
    :param decay: what the learning rate does after the warm-up: fall to zero as a cosine, or stay.
    :param markov_order: order of the Markov chain that the prior is compared with.
    :param quoted_baseline: bits per token of that chain as quoted, NaN if there is no such figure.
    :raises ValueError: if a name is unknown or a number out of its range.
    """

    family: str
    dataset: str = ""
    shape: dict[str, Any] = field(default_factory=dict)
    steps: int = 4000
    batch_size: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    warmup: int = 200
    ema_decay: float = 0.998
    switch: float = 0.5
    shares: tuple[float, float] = (0.3, 0.8)
    both_strands: bool = False
    validate_every: int = 250
    valid_times: int = 8
    valid_rows: int | None = None
    objective: ObjectiveName = "nelbo"
    options: dict[str, Any] = field(default_factory=dict)
    init: str | None = None
    decay: DecayName = "cosine"
    markov_order: int = 2
    quoted_baseline: float = float("nan")

    def __post_init__(self) -> None:
        for field_, names in {"family": sorted(FAMILIES), **_NAMES}.items():
            known = f"one of {', '.join(names)}"
            self._require(field_, getattr(self, field_) in names, known)
        for field_, low in _LOWEST.items():
            self._require(field_, _counts(getattr(self, field_), low), f"an integer from {low} up")
        some = self.valid_rows is None or _counts(self.valid_rows, 1)
        self._require("valid_rows", some, "an integer from 1 up, or None for all")
        for field_ in ("learning_rate", "weight_decay"):
            value = getattr(self, field_)
            self._require(field_, math.isfinite(value) and value >= 0.0, "a number from 0 up")
        for field_ in ("switch", "ema_decay"):
            self._require(field_, 0.0 <= getattr(self, field_) <= 1.0, "a number in [0, 1]")
        shares = len(self.shares) == 2 and all(0.0 <= share <= 1.0 for share in self.shares)
        self._require("shares", shares, "two numbers in [0, 1]")

    def _require(self, field_: str, holds: bool, wanted: str) -> None:
        if not holds:
            raise ValueError(f"Recipe: {field_} is {getattr(self, field_)!r}; give {wanted}.")

    def with_objective(self, objective: str) -> Recipe:
        if objective not in OBJECTIVES:
            raise ValueError(
                f"There is no objective {objective!r}: choose one of {', '.join(OBJECTIVES)}."
            )
        changes: dict[str, Any] = {"objective": objective, "options": {}}
        if objective == "distillation":
            rate = _DISTILLATION_RATE * self.learning_rate
            changes |= {"learning_rate": rate, "decay": "none"}
        return self if objective == self.objective else dataclasses.replace(self, **changes)


_SHAPE = {"dim": 96, "depth": 3, "heads": 4, "mlp_ratio": 2.0, "learned_positions": True}

_YEAST = Recipe(
    family="masked",
    dataset="yeast",
    shape={**_SHAPE, "dim": 64, "stem_width": 7, "dropout": 0.1},
    steps=3500,
    shares=(0.2, 0.5),
    both_strands=True,
    quoted_baseline=1.9116,
)
_TIMED = {**_YEAST.shape, "time_conditioning": True}

_MASKED_NAMES = Recipe(
    family="masked",
    dataset="names",
    shape=_SHAPE,
    steps=15_000,
    batch_size=128,
    shares=(1.0, 1.0),
    validate_every=500,
    markov_order=3,
)

# As many parameters at sampling as the masked networks: the encoder is not counted.
_LATENT_SHAPE = {**_SHAPE, "dim": 64, "dropout": 0.1, "adaptive": False}
_CODES = {"num_slots": 2, "num_codes": 128}
_VECTORS = {"num_slots": 2, "latent_dim": 4}
_LATENT_NAMES = dataclasses.replace(
    _MASKED_NAMES, family="latent", objective="latent", shape={**_LATENT_SHAPE, **_CODES}
)
_LATENT_QM9 = dataclasses.replace(
    _LATENT_NAMES,
    dataset="qm9",
    shape={**_LATENT_SHAPE, "num_slots": 2, "num_codes": 192},
    steps=5000,
    valid_rows=500,
)

_LEARNED = dataclasses.replace(
    _MASKED_NAMES,
    family="forward-learned",
    objective="fldd",
    steps=2500,
    learning_rate=1e-3,
    weight_decay=0.0,
    valid_times=4,
    valid_rows=500,
    validate_every=250,
    options={"warmup": 0.05},
)
_LEARNED_QM9 = dataclasses.replace(_LEARNED, dataset="qm9")

_TEXT = dataclasses.replace(_MASKED_NAMES, dataset="yelp", valid_rows=500)

# Half of the labels are withheld: most questions are asked of the unconditional prior.
_DIGITS = Recipe(
    family="masked",
    dataset="digits",
    shape={**_SHAPE, "dropout": 0.0, "num_classes": 10},
    steps=3500,
    shares=(1.0, 1.0),
    valid_times=32,
    options={"label_dropout": 0.5},
    markov_order=1,
)

RECIPES: dict[str, Recipe] = {
    "yeast-promoter": _YEAST,
    "yeast-promoter-uniform": dataclasses.replace(
        _YEAST, family="uniform", shape=_TIMED, steps=3000
    ),
    "human-promoter": Recipe(
        family="masked",
        dataset="human",
        shape={**_SHAPE, "stem_width": 7, "dropout": 0.0},
        steps=2750,
        shares=(0.7, 1.0),
        markov_order=6,
        quoted_baseline=1.8695,
    ),
    "tinyshakespeare-uniform": Recipe(
        family="uniform",
        dataset="tinyshakespeare",
        shape={"dim": 160, "depth": 4, "heads": 5, "stem_width": 7, "dropout": 0.0}
        | {"time_conditioning": True},
        steps=8000,
        batch_size=32,
        shares=(1.0, 1.0),
        valid_rows=128,
        markov_order=3,
    ),
    "masked-names": _MASKED_NAMES,
    "masked-qm9": dataclasses.replace(_MASKED_NAMES, dataset="qm9", steps=10_000, valid_rows=2000),
    "latent-names": _LATENT_NAMES,
    "latent-names-co": dataclasses.replace(
        _LATENT_NAMES, shape={**_LATENT_SHAPE, **_VECTORS}, steps=10_000
    ),
    "latent-qm9": _LATENT_QM9,
    "latent-qm9-co": dataclasses.replace(
        _LATENT_QM9, shape={**_LATENT_SHAPE, **_VECTORS}, steps=4000
    ),
    **{
        f"learned-{dataset}-{steps}": dataclasses.replace(
            recipe, init=f"masked-{dataset}", shape={**_SHAPE, "num_steps": steps}
        )
        for dataset, recipe in (("names", _LEARNED), ("qm9", _LEARNED_QM9))
        for steps in (2, 4, 10)
    },
    "arithmetic": dataclasses.replace(
        _TEXT,
        dataset="arithmetic",
        shape={**_SHAPE, "depth": 4, "dropout": 0.0},
        steps=5500,
        batch_size=256,
    ),
    "sudoku": dataclasses.replace(
        _TEXT,
        dataset="sudoku",
        shape={**_SHAPE, "depth": 4, "dropout": 0.0},
        steps=2500,
        batch_size=32,
        valid_rows=None,
    ),
    "yelp": dataclasses.replace(
        _TEXT, shape={**_SHAPE, "dim": 112, "depth": 4, "stem_width": 5}, steps=6000, batch_size=48
    ),
    "digits": _DIGITS,
    "digits-uniform": dataclasses.replace(
        _DIGITS,
        family="uniform",
        shape={**_DIGITS.shape, "time_conditioning": True},
        steps=3000,
    ),
    "mnist": dataclasses.replace(
        _DIGITS,
        dataset="mnist",
        steps=1500,
        valid_rows=256,
        valid_times=8,
    ),
    "faces": dataclasses.replace(
        _DIGITS,
        dataset="faces",
        shape={**_SHAPE, "dropout": 0.3},
        steps=3000,
        batch_size=32,
        options={},
    ),
}


def find_recipe(name: str) -> Recipe:
    if name not in RECIPES:
        known = ", ".join([*RECIPES, *IMAGE_RECIPES])
        raise ValueError(f"There is no training recipe {name!r}: choose one of {known}.")
    return RECIPES[name]
