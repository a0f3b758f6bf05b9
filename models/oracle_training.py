"""Fit, calibrate and evaluate the expression oracles.

::

    python -m ppl_diffusion.models.oracle_training train --data DIR --half design --out OUT
    python -m ppl_diffusion.models.oracle_training evaluate --data DIR OUT ...

``DIR`` holds ``dna/yeast_promoters_80bp.npz``. The two halves share no family of sequences, in
training as in calibration, so that the judge has seen nothing the designer was fitted on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
import typer
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from ppl_diffusion.models import oracle_evaluation as evaluation
from ppl_diffusion.models._quiet import quiet_lightning
from ppl_diffusion.models.oracle_evaluation import HALVES, Promoters, Report, rows_of_half
from ppl_diffusion.models.oracles import Member, Oracle, OracleConfig, load_oracle, one_hot


@dataclass(frozen=True)
class Recipe:
    """How an oracle is fitted.

    :param epochs: passes over the training rows.
    :param learning_rate: peak of the one-cycle schedule (AdamW).
    :param auxiliary: weight of the squared error on expression in defined medium, a second noisy
        view of the same promoter.
    :param family_power: a row of a family of ``n`` weighs ``n ** -family_power``.
    :param max_shift: the window of the first layer moves by up to so many bases between batches,
        which is what keeps the network from learning sequences by heart.
    :param penalty: on the squared weights of the linear member (expression units per k-mer).
    :param seed: of initialisation, order and shifts.
    """

    epochs: int = 12
    batch_size: int = 128
    learning_rate: float = 4e-3
    weight_decay: float = 1e-2
    auxiliary: float = 1.0
    family_power: float = 0.0
    max_shift: int = 6
    penalty: float = 3000.0
    seed: int = 0


class _Fit(lightning.LightningModule):
    """One member: Gaussian likelihood with the variance weighting of Seitzer et al. (2022)."""

    def __init__(self, oracle: Oracle, member: Member, recipe: Recipe, steps: int) -> None:
        super().__init__()
        self.member, self.recipe, self.steps = member, recipe, steps
        self._with_flanks = oracle.with_flanks

    def training_step(self, batch: list[Tensor], _index: int) -> Tensor:
        tokens, target, other, weight = batch
        most = self.recipe.max_shift
        x = self._with_flanks(one_hot(tokens), int(torch.randint(-most, most + 1, ())))
        mean, log_variance, auxiliary = self.member(x)
        variance = log_variance.exp()
        # beta-NLL, beta = 1/2: without it the mean of hard rows is hardly fitted at all.
        likelihood = 0.5 * ((target - mean).square() / variance + log_variance)
        likelihood = likelihood * variance.detach().sqrt()
        loss = likelihood + self.recipe.auxiliary * 0.5 * (other - auxiliary).square()
        self.log("loss", loss.mean(), prog_bar=True)
        return (weight * loss).mean()

    def configure_optimizers(self) -> Any:
        recipe = self.recipe
        optimizer = torch.optim.AdamW(
            self.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, recipe.learning_rate, total_steps=self.steps, pct_start=0.2
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit(
    data: Promoters, half: str, config: OracleConfig, recipe: Recipe, *, progress: bool = True
) -> Oracle:
    """Fit and calibrate an oracle on one half of the families of all rows."""
    train = rows_of_half(data, half, split=0)
    config = replace(config, half=half, centre=float(train.y.mean()), scale=float(train.y.std()))
    torch.manual_seed(recipe.seed)
    oracle = Oracle(config)
    loader = _loader(train, config, recipe)
    _fit_linear(oracle, train, recipe)
    with quiet_lightning():
        for member in oracle.members:
            assert isinstance(member, Member)
            _fit_member(oracle, member, loader, recipe, progress)
    return calibrate(oracle.requires_grad_(False).eval(), rows_of_half(data, half, split=1))


def _loader(train: Promoters, config: OracleConfig, recipe: Recipe) -> DataLoader[Any]:
    other = (train.other - train.other.mean()) / train.other.std()
    _, inverse, size = np.unique(train.family, return_inverse=True, return_counts=True)
    weight = size[inverse] ** -recipe.family_power
    columns = ((train.y - config.centre) / config.scale, other, weight / weight.mean())
    data = TensorDataset(torch.from_numpy(train.x), *(torch.from_numpy(c).float() for c in columns))
    batches = BatchSampler(RandomSampler(data), recipe.batch_size, drop_last=True)
    return DataLoader(data, sampler=batches, batch_size=None)


def _fit_linear(oracle: Oracle, train: Promoters, recipe: Recipe) -> None:
    config = oracle.config
    weight, intercept = evaluation.fit_ridge(train, config.kmer, recipe.penalty)
    oracle.linear.weight.copy_(torch.from_numpy(weight / config.scale))
    oracle.linear.bias.fill_((intercept - config.centre) / config.scale)


def _fit_member(
    oracle: Oracle, member: Member, loader: DataLoader[Any], recipe: Recipe, progress: bool
) -> None:
    trainer = lightning.Trainer(
        max_epochs=recipe.epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=progress,
    )
    member.train()
    trainer.fit(_Fit(oracle, member, recipe, recipe.epochs * len(loader)), loader)


def calibrate(oracle: Oracle, valid: Promoters) -> Oracle:
    """Scale the spread so that the standardised errors on validation rows have unit variance."""
    mean, sd = (a.double().numpy() for a in oracle.predict(torch.from_numpy(valid.x)))
    z = (valid.y - mean) / sd
    spread = oracle.config.spread * float(np.sqrt(np.mean(z**2)))
    oracle.config = replace(oracle.config, spread=spread)
    return oracle


@contextmanager
def _one_sentence() -> Iterator[None]:
    """Turn a mistake of the user into one sentence and exit code 2."""
    try:
        yield
    except (FileNotFoundError, ValueError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from error


app = typer.Typer(add_completion=False, help="Fit and evaluate the expression oracles.")


@app.command()
def train(
    data: str | None = None,
    half: str = "design",
    out: str = "oracle",
    members: int = 2,
    epochs: int = 12,
    progress: bool = True,
) -> None:
    """Fit one oracle and write it with its card."""
    with _one_sentence():
        if half not in HALVES:
            raise ValueError(f"There is no half {half!r}: give --half design or --half judge.")
        rows = evaluation.load_promoters(data)
    name = f"yeast-oracle-{half}"
    recipe = Recipe(seed=HALVES.index(half), epochs=epochs)
    oracle = fit(rows, half, OracleConfig(name=name, members=members), recipe, progress=progress)
    oracle.save(out)
    metrics = evaluation.evaluate_oracle(oracle, rows)
    evaluation.write_card(Path(out), card(name, half, metrics))
    evaluation.print_table({name: metrics})


def card(name: str, half: str, metrics: Report) -> dict[str, Any]:
    """Describe an oracle, with its metrics of :func:`evaluate_oracle`."""
    return {
        "name": name,
        "summary": "Mean and standard deviation of the expression that a yeast promoter of 80 "
        "bases drives in complex medium (YPD), arbitrary units from 0 to 17.",
        "data": "y_complex of yeast_promoters_80bp.npz: reporter assay of Vaishnav et al., Nature "
        "603, 455 (2022); source 1edv/evolution.",
        "licence": "Data and source repository MIT; these weights Apache-2.0 like the package.",
        "halves": f"Fitted on the train families, and its spread calibrated on the valid families, "
        f"that assign_halves of models/oracle_evaluation.py deals to '{half}'.",
        "training": "python -m ppl_diffusion.models.oracle_training train --data DIR "
        f"--half {half} --out models/weights/{name}",
        "evaluation": "python -m ppl_diffusion.models.oracle_training evaluate yeast-oracle-design "
        "yeast-oracle-judge --data DIR",
        "limits": "Families are near copies, so the few native test families make its native "
        "figures on test rows uncertain (see the interval, a bootstrap over families); the native "
        "train families of the other half, which it has not seen, tell more. The spread is "
        "calibrated on measured promoters and may be too small on sequences optimised against the "
        "oracle.",
        "metrics": metrics,
    }


@app.command()
def evaluate(folders: list[str], data: str | None = None, ridges: bool = True) -> None:
    """Print the metrics of oracles (names or folders) beside ridges on the same and on all rows."""
    with _one_sentence():
        rows = evaluation.load_promoters(data)
        oracles = [load_oracle(folder) for folder in folders]
    results = evaluation.evaluate_ridges(rows) if ridges else {}
    for oracle in oracles:
        results |= evaluation.evaluate_ridges(rows, oracle.config.half) if ridges else {}
        results[oracle.name] = evaluation.evaluate_oracle(oracle, rows)
    evaluation.print_table(results)
    if len(oracles) == 2:
        alike = evaluation.error_correlation(oracles, rows)
        typer.echo(f"correlation of their errors on test: {alike:.3f}")


if __name__ == "__main__":
    app()
