"""The list of what is shipped, from its files alone."""

from __future__ import annotations

from typing import Any

from ppl_diffusion.commands.tables import table
from ppl_diffusion.models.cards import available, list_oracles, read_card


def list_models() -> None:
    """Print the shipped priors and oracles with what their cards say."""
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


def _prior_bits(card: dict[str, Any]) -> tuple[str, str]:
    metrics = card["metrics"]
    bound = f"<= {metrics['bound']:.4f} ± {metrics['bound_error']:.4f}"
    return bound, f"{metrics['markov']:.4f} (order {metrics['order']})"
