"""Train a codec or a classifier of images by its recipe.

::

    ppl-diffusion train digits-codec --out OUT

``OUT`` receives ``network/`` (the best by validation, as safetensors), ``last.ckpt`` (to resume
from) and ``run.json`` (what was done). Images, shifts and dropout of step ``k`` are functions of
``(seed, k)`` alone, so a resumed run goes on as the unbroken one would have.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppl_diffusion.imaging.classifier import ImageClassifier
from ppl_diffusion.imaging.codec import ImageCodec
from ppl_diffusion.imaging.codec_error import CodecError
from ppl_diffusion.models.image_data import Images, load_images, shifted
from ppl_diffusion.models.image_recipes import IMAGE_RECIPES, ImageRecipe
from ppl_diffusion.models.image_tasks import IMAGE_TASKS, ClassifierTask, CodecTask
from ppl_diffusion.models.training import CHECKPOINT, RUN_FILE, TrainingDiverged

NETWORK_FOLDER = "network"
_SEEDS = 2**63  # torch takes no larger seeds


@dataclass(frozen=True)
class ImageRun:
    """What a training run left behind.

    :param network: the codec or classifier at its best validation.
    :param score: its mean score on the validation images, called ``score_name``.
    :param best_step: the optimiser step at which it was reached, of all ``steps``.
    """

    network: ImageCodec | ImageClassifier
    folder: Path
    score: float
    score_name: str
    best_step: int
    steps: int


def train_images(
    name: str,
    *,
    out: str | Path,
    data: str | Path | None = None,
    steps: int | None = None,
    seed: int = 0,
    resume: bool = False,
    quiet: bool = False,
    recipe: ImageRecipe | None = None,
    images: Images | None = None,
    device: torch.device | str = "cpu",
) -> ImageRun:
    """Train a codec or a classifier and keep its best weights.

    :param name: a recipe of :data:`~ppl_diffusion.models.image_recipes.IMAGE_RECIPES`, or any name
        if ``recipe`` is given.
    :param data: the data folder, for sets that do not come with a package.
    :param seed: of the weights, the batches and the shifts.
    :param resume: go on from ``last.ckpt`` in ``out``, with the recipe and seed of its beginning.
    :param images: images of one's own.
    :param device: where the network is trained; the one that comes back is on the CPU.
    :raises ValueError: if the name or the number of steps is wrong, or the run to resume another.
    :raises FileNotFoundError: if the data, or the checkpoint to resume from, are absent.
    :raises TrainingDiverged: if the score was never finite.
    """
    recipe = recipe or IMAGE_RECIPES[name]
    steps = recipe.steps if steps is None else steps
    if steps < 1:
        raise ValueError(f"train: {steps} steps is not a run; give 1 or more.")
    images = images or load_images(recipe.dataset, data)
    place = torch.device(device)
    fit = _Fit(IMAGE_TASKS[recipe.task](recipe), images, steps, seed, Path(out), place)
    with torch.random.fork_rng(devices=[place] if place.type == "cuda" else []):
        fit.run(resume, quiet)
    if fit.best == -math.inf:
        raise TrainingDiverged(
            f"train: the score of {name} was never finite in {steps} steps, so nothing was written "
            f"to {str(fit.out)!r}; lower the learning rate, or check the images."
        )
    network = fit.task.load(fit.out / NETWORK_FOLDER)
    if isinstance(network, ImageCodec):
        CodecError.fit(network, images.valid).save(fit.out / NETWORK_FOLDER)
    run = ImageRun(
        network,
        fit.out,
        fit.best,
        fit.task.score_name,
        fit.best_step,
        steps,
    )
    _record(run, recipe, seed)
    return run


class _Fit:
    """One run: network, optimiser and where it stands."""

    def __init__(
        self,
        task: CodecTask | ClassifierTask,
        images: Images,
        steps: int,
        seed: int,
        out: Path,
        device: torch.device,
    ) -> None:
        self.task: Any = task
        self.images, self.steps, self.seed, self.out = images, steps, seed, out
        self.recipe = task.recipe
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed % _SEEDS)
            self.network: Any = self.task.build(images).to(device)
        self.device = device
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), weight_decay=self.recipe.weight_decay
        )
        self.step, self.best, self.best_step = 0, -math.inf, 0

    def run(self, resume: bool, quiet: bool) -> None:
        if resume:
            self._resume()
        while self.step < self.steps:
            self._train_step()
            if self.step % self.recipe.validate_every == 0 or self.step == self.steps:
                score = self._validate()
                self._save()
                if not quiet:
                    print(f"step {self.step}: {self.task.score_name} {score:.4f}", flush=True)

    def _train_step(self) -> None:
        torch.manual_seed((self.seed * 1_000_003 + self.step) % _SEEDS)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate * self._rate()
        images, labels = self._draw()
        loss = self.task.loss(self.network.train(), images, labels)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1

    def _rate(self) -> float:
        warmup = max(1, min(self.recipe.warmup, self.steps // 10))
        cosine = 0.5 * (1.0 + math.cos(math.pi * self.step / self.steps))
        return min(1.0, (self.step + 1) / warmup) * cosine

    def _draw(self) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(self.images.train), (self.recipe.batch_size,))
        most = self.recipe.shift
        moves = torch.randint(-most, most + 1, (len(rows), 2))
        images = shifted(self.images.train[rows], moves, self.images.edge)
        return images.to(self.device), self.images.labels[0][rows].to(self.device)

    def _validate(self) -> float:
        images = self.images
        scores = image_scores(self.task, self.network.eval(), images.valid, images.labels[1])
        score = float(scores.mean())
        if score > self.best:
            self.best, self.best_step = score, self.step
            self.network.save(self.out / NETWORK_FOLDER)
        return score

    def _save(self) -> None:
        content = {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "progress": (self.step, self.best, self.best_step),
            "origin": self._origin(),
        }
        self.out.mkdir(parents=True, exist_ok=True)
        torch.save(content, self.out / CHECKPOINT)

    def _resume(self) -> None:
        path = self.out / CHECKPOINT
        if not path.is_file():
            raise FileNotFoundError(
                f"There is nothing to resume in {str(self.out)!r}: {CHECKPOINT} is missing; train "
                "without --resume."
            )
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            origin = content["origin"]
        except Exception as error:  # what damage raises depends on where it is
            raise ValueError(
                f"train: {str(path)!r} is damaged or no checkpoint of such a run; train without "
                "--resume."
            ) from error
        if origin != self._origin():
            raise ValueError(
                f"train: the run in {str(self.out)!r} began with another recipe, seed or number "
                "of steps; train without --resume."
            )
        self.network.load_state_dict(content["network"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.step, self.best, self.best_step = content["progress"]

    def _origin(self) -> str:
        # The number of steps shapes the learning rate of all of them.
        entries = {**dataclasses.asdict(self.recipe), "seed": self.seed, "steps": self.steps}
        return json.dumps(entries, sort_keys=True)


@torch.no_grad()
def image_scores(task: Any, network: Any, images: Tensor, labels: Tensor) -> Tensor:
    """Return the score of each image, ``(n,)``."""
    device = next(network.parameters()).device
    parts = zip(images.split(256), labels.split(256), strict=True)
    return torch.cat(
        [task.scores(network, part.to(device), label.to(device)).cpu() for part, label in parts]
    )


def _record(run: ImageRun, recipe: ImageRecipe, seed: int) -> None:
    record = {
        "recipe": dataclasses.asdict(recipe),
        "steps": run.steps,
        "seed": seed,
        "best_step": run.best_step,
        "valid": {run.score_name: run.score},
    }
    text = json.dumps(record, indent=2, sort_keys=True)
    (run.folder / RUN_FILE).write_text(text + "\n", encoding="utf-8")
