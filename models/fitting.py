"""The Lightning side of training; imported only when something is trained."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from lightning.pytorch.utilities.exceptions import SIGTERMException as SIGTERMException
from torch import Tensor
from torch.utils.data import DataLoader

from ppl_diffusion.models.datasets import Sequences, reverse_complement
from ppl_diffusion.models.distillation import Distillation
from ppl_diffusion.models.forward_objective import ForwardObjective
from ppl_diffusion.models.latent_objective import LatentObjective
from ppl_diffusion.models.objectives import Curriculum, Nelbo, Objective
from ppl_diffusion.models.program import DiffusionProgram
from ppl_diffusion.models.recipes import Recipe

_OBJECTIVES: dict[str, type[Objective]] = {
    "nelbo": Nelbo,
    "curriculum": Curriculum,
    "distillation": Distillation,
    "latent": LatentObjective,
    "fldd": ForwardObjective,
}
_SEEDS = 2**63  # torch takes no larger seeds
_VALID_SEED = 20_240_607
_BITS = 1.0 / math.log(2.0)


class Fit(lightning.LightningModule):
    """Trains the transformer of a program by the objective of a recipe.

    Rows, times, noise and dropout of step ``k`` are functions of ``(seed, k)`` alone, so a resumed
    run goes on exactly as the unbroken one would have.

    :param program: the program; its denoiser is trained in place.
    :param steps: length of the run, in optimiser steps.
    :param origin: what the run began with, as JSON knows it; kept in its checkpoints.
    :raises TypeError: if the program has no network to train.

    :ivar saved: whether a checkpoint was written.
    """

    def __init__(
        self,
        program: DiffusionProgram,
        sequences: Sequences,
        recipe: Recipe,
        *,
        steps: int,
        seed: int,
        origin: Mapping[str, Any],
    ) -> None:
        super().__init__()
        if not isinstance(program.denoiser, torch.nn.Module):
            raise TypeError("Fit: the program must be built around a torch.nn.Module.")
        self.network = program.denoiser.train()
        self.recipe, self.steps = recipe, steps
        # A plain attribute would be deep-copied with the module by the weight average.
        self._context = _Context(program, sequences, recipe, steps, seed)
        self.valid_bits = math.nan
        self._valid_terms: list[Tensor] = []
        self._origin = json.dumps(dict(origin))
        self.saved = False

    @property
    def objective(self) -> Objective:
        return self._context.objective

    def training_step(self, batch: Tensor, batch_index: int) -> Tensor:
        """Return the loss of one step in bits per token; the batch holds no rows, only a tick."""
        context = self._context
        torch.manual_seed((context.seed * 1_000_003 + self.global_step) % _SEEDS)
        rows, labels = context.draw(self.global_step)
        rows, labels = rows.to(self.device), None if labels is None else labels.to(self.device)
        loss = self.objective.loss(rows, self.global_step, labels) * _BITS / rows.shape[-1]
        self.log("train_bits", loss, prog_bar=True)
        self.log_dict(self.objective.notes())
        return loss

    def validation_step(self, batch: Tensor, batch_index: int) -> None:
        """Bound some validation rows, with the same times and noise at every validation."""
        generator = torch.Generator("cpu").manual_seed(_VALID_SEED + batch_index)
        times = self.recipe.valid_times
        terms = self._context.program.bound_terms(batch, num_times=times, generator=generator)
        self._valid_terms.append(terms.mean(0))
        mean = float(torch.cat(self._valid_terms).mean())
        self.valid_bits = mean * _BITS / batch.shape[-1]

    def on_validation_epoch_start(self) -> None:
        self._valid_terms.clear()

    def on_validation_epoch_end(self) -> None:
        self.log("valid_bits", self.valid_bits, prog_bar=True)

    def configure_optimizers(self) -> dict[str, Any]:
        """Return AdamW with linear warm-up and what the recipe says of the decay."""
        recipe, steps = self.recipe, self.steps
        optimizer = torch.optim.AdamW(
            _parameter_groups(self.network, recipe.weight_decay),
            lr=recipe.learning_rate,
            betas=(0.9, 0.98),
        )
        warmup = max(1, min(recipe.warmup, steps // 10))

        def factor(step: int) -> float:
            progress = min(step / steps, 1.0) if recipe.decay == "cosine" else 0.0
            return min(1.0, (step + 1) / warmup) * 0.5 * (1.0 + math.cos(math.pi * progress))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what the objective must remember, and what the run began with."""
        checkpoint["objective"] = self.objective.state_dict()
        checkpoint["origin"] = self._origin
        self.saved = True

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.objective.load_state_dict(checkpoint.get("objective", {}))

    def train_dataloader(self) -> DataLoader[Any]:
        # One tick per step between two validations. A run shorter than that must still be
        # validated, and thus kept, at its end.
        ticks = min(self.recipe.validate_every, self.steps)
        return _Ticks(torch.arange(ticks), num_workers=0)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the validation rows, or as many of them as the recipe wants."""
        rows = self._context.sequences.valid
        count = min(self.recipe.valid_rows or len(rows), len(rows))
        chosen = rows[torch.arange(count) * len(rows) // count]
        return DataLoader(chosen, batch_size=512, num_workers=0)  # type: ignore[arg-type]


class _Ticks(DataLoader[Any]):
    """Ticks are alike, so that there is no state to go on from; Lightning asks for one."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(eq=False)
class _Context:
    """What a fit refers to but does not own; shared, not copied, by the weight average."""

    program: DiffusionProgram
    sequences: Sequences
    recipe: Recipe
    steps: int
    seed: int

    def __post_init__(self) -> None:
        make, options = _OBJECTIVES[self.recipe.objective], self.recipe.options
        self.objective = make(self.program, steps=self.steps, **options)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Context:
        return self

    def draw(self, step: int) -> tuple[Tensor, Tensor | None]:
        """Draw the rows of a step from torch's global generator, which the step has seeded.

        :returns: the rows and, if the network learns classes, their labels.
        """
        recipe, sequences = self.recipe, self.sequences
        count = round(recipe.shares[step >= recipe.switch * self.steps] * recipe.batch_size)
        picked = self._picked(count)
        rows = sequences.train[picked]
        if recipe.shape.get("num_classes"):
            assert sequences.labels is not None
            return rows, sequences.labels[0][picked]
        if rest := recipe.batch_size - count:
            picks = torch.multinomial(sequences.related_weights, rest, replacement=True)
            rows = torch.cat([rows, sequences.related[picks]])
        if recipe.both_strands:
            turned = torch.rand(len(rows), 1) < 0.5
            rows = torch.where(turned, reverse_complement(rows), rows)
        return rows, None

    def _picked(self, count: int) -> Tensor:
        weights = self.sequences.train_weights
        if weights is None:
            return torch.randint(len(self.sequences.train), (count,))
        return torch.multinomial(weights, count, replacement=True)


class KeepBest(Callback):
    """Save the program into a folder whenever its validation bound improves.

    Under objectives that do not lower the bound it is saved at every validation. Weights without a
    finite bound are never saved. Must stand before the weight average in the list of callbacks, so
    that it runs while the averaged weights are in place.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.best = math.inf
        self.best_step = 0

    def on_validation_epoch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        assert isinstance(pl_module, Fit)
        kept = pl_module.valid_bits < self.best or not pl_module.objective.best_is_kept
        if trainer.sanity_checking or not (kept and math.isfinite(pl_module.valid_bits)):
            return
        self.best, self.best_step = pl_module.valid_bits, trainer.global_step
        pl_module._context.program.save(self.folder)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "best_step": self.best_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.best_step = state_dict["best"], state_dict["best_step"]


class KeepGoing(Callback):
    """Write a checkpoint every few minutes, and end the run after a step where that is asked for.

    Must stand behind the weight average in the list of callbacks, whose step it holds. Checkpoints
    of validations are others' work: none is written between the last step of an epoch and those.

    :param path: the checkpoint.
    :param every: seconds between two of them, at least.

    :ivar signal: the signal that asked for the end, or None.
    """

    def __init__(self, path: Path, every: float) -> None:
        self.path, self.every = path, every
        self.signal: int | None = None
        self._due = time.monotonic() + every

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Write, and end the run, where that is due.

        :raises KeyboardInterrupt: if a signal asked for the end.
        """
        due = self.signal is not None or time.monotonic() >= self._due
        if not due or trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            return
        scratch = self.path.with_name(f".{self.path.name}")
        trainer.save_checkpoint(scratch)
        scratch.replace(self.path)
        self._due = time.monotonic() + self.every
        if self.signal is not None:
            raise KeyboardInterrupt


class Told(Callback):
    """Say how far training has come.

    :param progress: called with ``(steps done, steps in all)``.
    """

    def __init__(self, progress: Callable[[int, int], None]) -> None:
        self.progress = progress

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Say it."""
        self.progress(trainer.global_step, trainer.max_steps)


class WeightAverage(EMAWeightAveraging):
    """Exponential moving average that forgets the random start.

    The decay per step grows as ``(1 + k) / (10 + k)`` up to its final value.
    """

    def __init__(self, decay: float) -> None:
        # Buffers that learn, as codes do, are averages of their own.
        super().__init__(decay=decay, use_buffers=False)
        self._kwargs["avg_fn"] = lambda mean, value, count: (
            mean + (value - mean) * (1.0 - min(decay, (1.0 + float(count)) / (10.0 + float(count))))
        )

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Average, and take what is not trained any more as it is: other parts rely on it."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        assert self._average_model is not None
        means = self._average_model.module.parameters()
        with torch.no_grad():
            for mean, value in zip(means, pl_module.parameters(), strict=True):
                if not value.requires_grad:
                    mean.copy_(value)


def _parameter_groups(network: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    named = list(network.named_parameters())
    matrices = [p for name, p in named if p.ndim > 1 and not _is_table(name)]
    rest = [p for name, p in named if p.ndim <= 1 or _is_table(name)]
    decayed = {"params": matrices, "weight_decay": weight_decay}
    return [decayed, {"params": rest, "weight_decay": 0.0}]


def _is_table(name: str) -> bool:
    # A row of a table is a vector of its own.
    tables = ("stem", "label", "slots", "queries", "codebook")
    return name.removeprefix("encoder.").split(".")[0] in tables
