"""The list of what is shipped, from its files alone."""

from __future__ import annotations

import json
from typing import Any

from ppl_diffusion.commands.tables import table
from ppl_diffusion.models.cards import (
    available,
    codecs,
    list_classifiers,
    list_oracles,
    read_card,
)


def list_models(*, as_json: bool = False) -> None:
    """Print the shipped priors, oracles and networks of images with what their cards say.

    :param as_json: print their cards as one JSON object instead.
    """
    if as_json:
        return print(json.dumps(_cards(), indent=2))
    priors = [
        [entry["name"], entry["family"], entry["length"], *_prior_bits(entry["card"])]
        for entry in available()
    ]
    header = ["name", "process", "length", "bits per token, bound", "Markov chain"]
    table("Priors", header, priors)
    oracles = []
    for name in list_oracles():
        parts = read_card(name)["metrics"].items()
        oracles.append([name, ", ".join(f"{part}: {numbers['r']:.3f}" for part, numbers in parts)])
    table("Oracles", ["name", "correlation with measurements, test rows"], oracles)
    images = [
        [name, "x".join(map(str, card["image"])), card["tokens"] or "", _image_score(card)]
        for name, card in ((name, read_card(name)) for name in [*codecs(), *list_classifiers()])
    ]
    table("Codecs and classifiers of images", ["name", "image", "tokens", "test images"], images)


def _cards() -> dict[str, Any]:
    images = [*codecs(), *list_classifiers()]
    return {
        "priors": {entry["name"]: entry["card"] for entry in available()},
        "oracles": {name: read_card(name) for name in list_oracles()},
        "images": {name: read_card(name) for name in images},
    }


def _prior_bits(card: dict[str, Any]) -> tuple[str, str]:
    metrics = card["metrics"]
    bound = f"<= {metrics['bound']:.4f} ± {metrics['bound_error']:.4f}"
    return bound, f"{metrics['markov']:.4f} (order {metrics['order']})"


def _image_score(card: dict[str, Any]) -> str:
    metrics = card["metrics"]
    return f"{card['score']} {metrics['score']:.4f} ± {metrics['score_error']:.4f}"
