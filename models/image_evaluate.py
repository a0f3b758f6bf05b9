"""What a codec or a classifier of images is worth: its score on held-out images.

::

    python -m ppl_diffusion.models.image_evaluate digits-codec

The score of a codec is the PSNR after encoding and decoding, a ceiling for whatever is restored
through it; that of a classifier is its accuracy.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from ppl_diffusion.imaging.classifier import ImageClassifier
from ppl_diffusion.imaging.codec import ImageCodec
from ppl_diffusion.imaging.codec_error import CodecError
from ppl_diffusion.models.cards import CARD_FILE, WEIGHTS
from ppl_diffusion.models.image_data import Images, load_images
from ppl_diffusion.models.image_recipes import IMAGE_RECIPES, ImageRecipe
from ppl_diffusion.models.image_tasks import IMAGE_TASKS
from ppl_diffusion.models.image_training import image_scores


@dataclass(frozen=True)
class ImageEvaluation:
    """Figures on the test images.

    :param images: how many.
    :param score: mean score of an image, and ``score_error`` its standard error.
    :param codes_used: tokens that occur in them, of a codec; None of a classifier.
    :param codes: tokens that there are.
    :param entropy: of the tokens, in bits per token: what a prior that only counts would need.
    """

    images: int
    score: float
    score_error: float
    codes_used: int | None = None
    codes: int | None = None
    entropy: float | None = None


def evaluate_images(
    network: ImageCodec | ImageClassifier, images: Images, recipe: ImageRecipe
) -> ImageEvaluation:
    """Judge a network by the test images."""
    scores = image_scores(IMAGE_TASKS[recipe.task](recipe), network, images.test, images.labels[2])
    figures: dict[str, Any] = {
        "images": len(scores),
        "score": float(scores.mean()),
        "score_error": float(scores.std()) / math.sqrt(len(scores)),
    }
    if isinstance(network, ImageCodec):
        tokens = torch.cat([network.encode(part) for part in images.test.split(256)])
        shares = torch.bincount(tokens.flatten(), minlength=network.vocab_size) / tokens.numel()
        figures |= {
            "codes_used": int((shares > 0).sum()),
            "codes": network.vocab_size,
            "entropy": float(torch.special.entr(shares).sum()) / math.log(2.0),
        }
    return ImageEvaluation(**figures)


def write_image_card(
    folder: Path,
    name: str,
    network: ImageCodec | ImageClassifier,
    images: Images,
    result: ImageEvaluation,
    *,
    note: str = "",
) -> None:
    """Write ``card.json`` and the same as ``card.md``."""
    recipe = IMAGE_RECIPES[name]
    folder_option = "" if images.bundled else " --data DIR"
    figures = {k: round(v, 4) for k, v in asdict(result).items() if v is not None}
    card: dict[str, Any] = {
        "name": name,
        "task": recipe.task,
        "image": list(network.image_shape),
        "tokens": network.length if isinstance(network, ImageCodec) else None,
        "data": images.source,
        "licence": f"Weights: Apache-2.0. {images.licence}",
        "training": f"ppl-diffusion train {name}{folder_option} --out OUT",
        "note": note,
        "evaluation": f"python -m ppl_diffusion.models.image_evaluate {name}{folder_option}",
        "score": IMAGE_TASKS[recipe.task].score_name,
        "metrics": figures,
    }
    (folder / CARD_FILE).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    (folder / "card.md").write_text(_card_text(card, images.noun), encoding="utf-8")


def _card_text(card: dict[str, Any], noun: str) -> str:
    metrics = card["metrics"]
    rows = [f"| {card['score']} | {metrics['score']:.4f} ± {metrics['score_error']:.4f} |"]
    if "codes" in metrics:
        rows.append(f"| codes in use | {metrics['codes_used']} of {metrics['codes']} |")
        rows.append(f"| entropy of a token, bits | {metrics['entropy']:.4f} |")
    figures = "\n".join(rows)
    return f"""# {card["name"]}

A {card["task"]} of {noun}.

- Data: {card["data"]}
- Licence: {card["licence"]}
- Training: `{card["training"]}` {card["note"]}
- Evaluation: `{card["evaluation"]}`

## Test split ({metrics["images"]} images)

| | mean ± 1 s.e. |
| --- | ---: |
{figures}
"""


def _print(name: str, score_name: str, result: ImageEvaluation) -> None:
    table = Table("", "", "± 1 s.e.", title=f"{name}: {result.images} test images")
    table.add_row(score_name, f"{result.score:.4f}", f"{result.score_error:.4f}")
    if result.entropy is not None:
        table.add_row("codes in use", f"{result.codes_used} of {result.codes}", "")
        table.add_row("entropy of a token, bits", f"{result.entropy:.4f}", "")
    Console().print(table)


def main(
    name: Annotated[str, typer.Argument(help="Shipped network, or the recipe of --weights.")],
    data: Annotated[
        Path | None, typer.Option(envvar="PPL_DIFFUSION_DATA", help="Folder that holds images/.")
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="Folder of a trained network.")] = None,
    note: Annotated[str, typer.Option(help="How it was trained, for the card.")] = "",
    ship: Annotated[
        bool, typer.Option("--ship", help="Put --weights, with a card, among the shipped ones.")
    ] = False,
) -> None:
    """Judge a codec or a classifier of images by its test images."""
    if name not in IMAGE_RECIPES:
        raise typer.BadParameter(f"{name!r} is none of {', '.join(IMAGE_RECIPES)}.")
    recipe = IMAGE_RECIPES[name]
    try:
        network = IMAGE_TASKS[recipe.task](recipe).load(weights or WEIGHTS / name)
        images = load_images(recipe.dataset, data)
    except (FileNotFoundError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    result = evaluate_images(network, images, recipe)
    _print(name, IMAGE_TASKS[recipe.task].score_name, result)
    if ship:
        network.save(WEIGHTS / name)
        if isinstance(network, ImageCodec):
            CodecError.fit(network, images.valid).save(WEIGHTS / name)
        write_image_card(WEIGHTS / name, name, network, images, result, note=note)


if __name__ == "__main__":
    typer.run(main)
