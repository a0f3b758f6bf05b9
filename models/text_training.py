"""Train and evaluate the classifiers of sentences.

::

    python -m ppl_diffusion.models.text_training train --data DIR --name yelp-reward --out OUT
    python -m ppl_diffusion.models.text_training evaluate yelp-reward yelp-judge --data DIR

``DIR`` holds ``text/yelp_sentiment.csv.gz``. The halves share no sentence: every other training
sentence goes to the judge, so that what was designed with one is judged by what has seen others.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from ppl_diffusion.models.cards import CARD_FILE
from ppl_diffusion.models.reviews import LENGTH, LICENCE, SOURCE, Reviews, read_reviews
from ppl_diffusion.models.text_reward import TextClassifier, TextConfig, load_text_classifier

HALVES = ("yelp-reward", "yelp-judge")
_BATCH, _EPOCHS, _RATE = 128, 12, 3e-3


def rows_of_half(reviews: Reviews, name: str) -> tuple[Tensor, Tensor]:
    """Return every other training sentence, and its label.

    :param name: which classifier they are for, one of :data:`HALVES`.
    :raises ValueError: if it is neither.
    """
    if name not in HALVES:
        raise ValueError(f"There is no recipe {name!r}: give --name {' or --name '.join(HALVES)}.")
    index = reviews.of("train").nonzero()[HALVES.index(name) :: len(HALVES), 0]
    return reviews.tokens[index], reviews.labels[index]


def fit(tokens: Tensor, labels: Tensor, config: TextConfig, *, epochs: int, seed: int) -> Any:
    """Fit a classifier by cross-entropy, with a one-cycle schedule.

    :param tokens: int64 ``(n, L)``; ``labels`` int64 ``(n,)``.
    :param epochs: passes over the sentences.
    :param seed: of the start, the order and what is left out.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = TextClassifier(config).train()
        steps = epochs * math.ceil(len(tokens) / _BATCH)
        optimizer = torch.optim.AdamW(classifier.parameters(), _RATE, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=steps)
        for _ in range(epochs):
            for rows in torch.randperm(len(tokens)).split(_BATCH):
                loss = F.cross_entropy(classifier(tokens[rows]), labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return classifier.requires_grad_(False).eval()


def metrics(classifier: TextClassifier, reviews: Reviews, part: str = "test") -> dict[str, Any]:
    """Return accuracy and cross-entropy (nats) on a part, with standard errors."""
    rows = reviews.of(part)
    labels = reviews.labels[rows]
    log_p = classifier(reviews.tokens[rows]).log_softmax(-1)
    right = (log_p.argmax(-1) == labels).double()
    loss = -log_p.gather(-1, labels[:, None])[:, 0].double()
    count = len(labels)
    return {
        "sentences": count,
        "accuracy": round(float(right.mean()), 4),
        "accuracy_error": round(float(right.std()) / math.sqrt(count), 4),
        "cross_entropy": round(float(loss.mean()), 4),
        "cross_entropy_error": round(float(loss.std()) / math.sqrt(count), 4),
    }


def card(name: str, reviews: Reviews, found: dict[str, Any]) -> dict[str, Any]:
    """Describe a classifier, with its metrics on the test sentences."""
    half = "first" if name == HALVES[0] else "second"
    return {
        "name": name,
        "summary": f"Whether a sentence of at most {LENGTH} letters praises a restaurant.",
        "data": f"{SOURCE}; {reviews.left_out} sentences are longer or hold rare characters and "
        f"are left out. Trained on the {half} of two halves of the training sentences.",
        "licence": f"Weights: Apache-2.0. {LICENCE}",
        "training": "python -m ppl_diffusion.models.text_training train --data DIR "
        f"--name {name} --out OUT",
        "evaluation": f"python -m ppl_diffusion.models.text_training evaluate {name} --data DIR",
        "limits": "It saw sentences that people wrote. What is optimised against it may please it "
        "for letters that no reader would take for praise: let the other one judge.",
        "metrics": found,
    }


def write_card(folder: Path, entries: dict[str, Any]) -> None:
    """Write ``card.json`` and the same as ``card.md``."""
    (folder / CARD_FILE).write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
    found = entries["metrics"]
    text = [f"# {entries['name']}"]
    text += [
        f"**{key.capitalize()}.** {entries[key]}"
        for key in ("summary", "data", "licence", "training", "evaluation", "limits")
    ]
    text.append(
        f"Test split ({found['sentences']} sentences): accuracy {found['accuracy']:.4f} ± "
        f"{found['accuracy_error']:.4f}, cross-entropy {found['cross_entropy']:.4f} ± "
        f"{found['cross_entropy_error']:.4f} nats (± one standard error)."
    )
    (folder / "card.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")


app = typer.Typer(add_completion=False, help="Train and evaluate the classifiers of sentences.")
_Data = Annotated[
    Path | None, typer.Option(envvar="PPL_DIFFUSION_DATA", help="Folder that holds text/.")
]


@app.command()
def train(
    name: Annotated[str, typer.Option()],
    out: Annotated[Path, typer.Option()],
    data: _Data = None,
    epochs: int = _EPOCHS,
    seed: int = 0,
) -> None:
    """Train one classifier and write it with its card."""
    try:
        reviews = read_reviews(data)
        rows = rows_of_half(reviews, name)
    except (FileNotFoundError, ValueError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from error
    classifier = fit(*rows, TextConfig(name=name), epochs=epochs, seed=seed)
    classifier.save(out)
    found = metrics(classifier, reviews)
    write_card(out, card(name, reviews, found))
    _print({name: found})


@app.command()
def evaluate(folders: list[str], data: _Data = None) -> None:
    """Print how well classifiers (names or folders) do on the test sentences."""
    try:
        reviews = read_reviews(data)
        classifiers = {folder: load_text_classifier(folder) for folder in folders}
    except (FileNotFoundError, ValueError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from error
    _print({name: metrics(classifier, reviews) for name, classifier in classifiers.items()})


def _print(results: dict[str, dict[str, Any]]) -> None:
    table = Table("classifier", "sentences", "accuracy", "cross-entropy")
    for name, found in results.items():
        shown = [
            f"{found[key]:.4f} ± {found[f'{key}_error']:.4f}"
            for key in ("accuracy", "cross_entropy")
        ]
        table.add_row(name, str(found["sentences"]), *shown)
    Console().print(table)


if __name__ == "__main__":
    app()
