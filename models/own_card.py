"""What a prior of one's own is worth, measured and written beside it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppl_diffusion.models.cards import CARD_FILE
from ppl_diffusion.models.chains import (
    MarkovChains,
    bits_of_orders,
    expected_copies,
    strengths,
)
from ppl_diffusion.models.own_data import OwnData, as_weighted
from ppl_diffusion.models.program import DiffusionProgram
from ppl_diffusion.tokenisers import MOLECULES, canonical_smiles

TEST_ROWS = 2000
"""Test rows whose bound is measured, of all of them."""
SAMPLES = 500
_TIMES, _TOKENS = (32, 256), 1024
SHOWN = 10
_CHUNK = 256
_SAMPLE_STEPS = 64
_LN2 = math.log(2.0)


@dataclass(frozen=True)
class Held:
    """Code lengths of held-out rows, in bits per sequence, length included.

    :param bound: upper bound of the prior, float64 ``(n,)``.
    :param times: stratified times per row that the bound was measured at.
    :param orders: of the Markov chains, float64 ``(7, n)``; ``best`` is the one that codes
        validation rows best.
    :param family: family of each row.
    :param weights: how much each row counts, with mean 1.
    :param tokens: mean number of tokens of a row.
    :param given_label: mean bound given the label of each row, NaN without classes.
    :param expected: chance that a draw of the best chain is a training row.
    """

    bound: Tensor
    times: int
    orders: Tensor
    best: int
    family: Tensor
    weights: Tensor
    tokens: float
    given_label: float
    expected: float

    def mean(self, values: Tensor) -> float:
        """Return the weighted mean of some values, one per row."""
        return float((values * self.weights).mean())

    def error(self, values: Tensor) -> float:
        """Return its standard error, with families as the independent units."""
        _, index = self.family.unique(return_inverse=True)
        sums = values.new_zeros(int(index.max()) + 1)
        sums.index_add_(0, index, self.weights * (values - self.mean(values)))
        count = len(sums)
        return float((sums.square().sum() * count / max(count - 1, 1)).sqrt() / len(values))


def measure(program: DiffusionProgram, data: OwnData, *, seed: int = 0) -> Held:
    """Bound the test rows, or 2000 of them, and code them with Markov chains."""
    count = len(data.split.test)
    chosen = torch.arange(min(count, TEST_ROWS)) * count // min(count, TEST_ROWS)
    rows = data.split.test[chosen.numpy()]
    x0, weights = data.sequences.test[chosen], _weights(data, rows)
    labels = data.sequences.labels
    given = None if labels is None else _bound(program, x0, seed, labels[2][chosen]).mean(0)
    orders, best, expected = _chains(data, rows)
    return Held(
        bound=_bound(program, x0, seed).mean(0),
        times=times_of(program.length),
        orders=orders,
        best=best,
        family=torch.from_numpy(data.split.test_family)[chosen],
        weights=weights,
        tokens=float(np.mean([len(data.tokens[i]) for i in rows])),
        given_label=math.nan if given is None else float((given * weights).mean()),
        expected=expected,
    )


def _weights(data: OwnData, rows: np.ndarray) -> Tensor:
    if data.rows.weights is None:
        return torch.ones(len(rows), dtype=torch.float64)
    weights = torch.tensor([data.rows.weights[i] for i in rows], dtype=torch.float64)
    total = float(weights.sum())
    return weights * len(rows) / total if total > 0.0 else torch.ones_like(weights)


def times_of(length: int) -> int:
    """Return at how many times a row is bounded: more where rows are short, and times decide."""
    return min(_TIMES[1], max(_TIMES[0], _TOKENS // length))


def _bound(
    program: DiffusionProgram, x0: Tensor, seed: int, labels: Tensor | None = None
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for part in torch.arange(len(x0)).split(_CHUNK):
        law = program if labels is None else program.labelled(labels[part])
        parts.append(
            law.bound_terms(x0[part], num_times=times_of(program.length), generator=generator)
            / _LN2
        )
    return torch.cat(parts, dim=1)


def _chains(data: OwnData, rows: np.ndarray) -> tuple[Tensor, int, float]:
    def tokens(numbers: Sequence[int] | np.ndarray) -> list[list[int]]:
        return [data.tokens[i] for i in numbers]

    train, weights = tokens(data.split.train), data.rows.weights
    chains = MarkovChains(
        train,
        len(data.tokeniser.symbols),
        ends=data.sequences.lengths is not None,
        weights=None if weights is None else [weights[i] for i in data.split.train],
    )
    valid = tokens(as_weighted(data.split.valid, weights))
    chosen = strengths(chains, valid)
    best = int(bits_of_orders(chains, valid, chosen).mean(1).argmin())
    once = [list(row) for row in dict.fromkeys(map(tuple, train))]
    copies = expected_copies(chains.bits(once, chosen[best])[best])
    return torch.from_numpy(bits_of_orders(chains, tokens(rows), chosen)), best, copies


def draw(program: DiffusionProgram, count: int = SAMPLES, *, seed: int = 0) -> list[str]:
    """Draw sequences with as many steps as they have tokens, at most 64."""
    generator = torch.Generator().manual_seed(seed)
    chain = program.chain(min(_SAMPLE_STEPS, max(program.length, 8)))
    parts = torch.arange(count).split(_CHUNK)
    paths = (chain.sample((len(part),), generator=generator) for part in parts)
    return [text for path in paths for text in program.decode(chain.x0(path))]


def make_card(
    program: DiffusionProgram,
    data: OwnData,
    held: Held,
    samples: Sequence[str],
    run: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the card as JSON knows it.

    :param run: what was chosen and how long it took.
    """
    normal = data.tokeniser.normal
    train = {normal(data.rows.texts[i]) for i in data.split.train}
    test = [normal(data.rows.texts[i]) for i in data.split.test]
    drawn = [normal(text) for text in samples]
    gain = held.orders[held.best] - held.bound
    return {
        "name": program.name,
        "family": program.family,
        "data": {
            "source": data.rows.source,
            "noun": data.sequences.noun,
            "alphabet": data.tokeniser.name,
            "symbols": len(data.tokeniser.symbols),
            "rows": len(data.rows),
            "dropped": data.drops.counts,
            "first_dropped": data.drops.first,
            "classes": list(data.classes),
            "shortest": min(map(len, data.tokens)),
            "longest": program.length,
            "split": data.split.rule,
            "sizes": data.split.sizes,
            "test_rows_in_train": sum(text in train for text in test) / len(test),
        },
        "metrics": {
            "sequences": len(held.bound),
            "families": len(held.family.unique()),
            "tokens": held.tokens,
            "times": held.times,
            "bound": held.mean(held.bound),
            "bound_error": held.error(held.bound),
            "markov": [held.mean(bits) for bits in held.orders],
            "best_order": held.best,
            "gain": held.mean(gain),
            "gain_error": held.error(gain),
            "given_label": None if math.isnan(held.given_label) else held.given_label,
        },
        "samples": {
            "number": len(samples),
            "shown": list(samples[:SHOWN]),
            "in_train": sum(text in train for text in drawn) / len(drawn),
            "different": len(set(drawn)) / len(drawn),
            "valid": _valid(samples) if data.tokeniser.name in MOLECULES else None,
            "expected_in_train": held.expected,
        },
        "run": dict(run),
    }


def _valid(samples: Sequence[str]) -> float | None:
    """Return the share that RDKit reads, None without it."""
    try:
        return sum(bool(canonical_smiles(text)) for text in samples) / len(samples)
    except ModuleNotFoundError:
        return None


def write_card(folder: Path, card: Mapping[str, Any]) -> None:
    """Write ``card.json`` and the same as ``card.md``."""
    text = json.dumps(card, indent=2, ensure_ascii=False)
    (folder / CARD_FILE).write_text(text + "\n", encoding="utf-8")
    (folder / "card.md").write_text(card_text(card), encoding="utf-8")


def card_text(card: Mapping[str, Any]) -> str:
    """Return a card as a page."""
    data, metrics, samples, run = (card[key] for key in ("data", "metrics", "samples", "run"))
    sizes = ", ".join(f"{number} {part}" for part, number in data["sizes"].items())
    drops = "".join(
        f"\n- Left out, {cause}: {number} rows. The first: {data['first_dropped'][cause]}"
        for cause, number in data["dropped"].items()
    )
    classes = f"\n- Classes: {', '.join(data['classes'])}" if data["classes"] else ""
    lengths = f"{data['shortest']} to {data['longest']}"
    valid = "" if samples["valid"] is None else f", and {samples['valid']:.1%} are molecules"
    one = data["shortest"] == data["longest"]
    shown = "\n".join(f"    {text}" for text in samples["shown"])
    shape = ", ".join(f"{key} {value}" for key, value in run["recipe"]["shape"].items())
    return f"""# {card["name"]}

A {card["family"]} diffusion prior over {data["noun"]}.

- Data: {data["source"]}
- Alphabet: {data["alphabet"]}, {data["symbols"]} symbols
- Lengths: {data["longest"] if one else lengths} tokens
- Rows: {data["rows"]} ({sizes}); {data["test_rows_in_train"]:.1%} of the test rows are also \
training rows{drops}{classes}
- Split: {data["split"]}
- Training: `{run["command"]}`
- Network: {shape}
- Optimisation: {run["steps"]} steps of {run["recipe"]["batch_size"]} rows, learning rate \
{run["recipe"]["learning_rate"]:.4g}; best at step {run["best_step"]}
- Time: {run["seconds"]:.0f} s

## Held-out rows ({metrics["sequences"]} sequences, {metrics["families"]} families)

{bound_table(metrics)}

Errors are one standard error over families. The bound is an upper bound on the code length of a
sequence, its length included, and so are the code lengths of the chains, which pay for their ends.

## Samples

{shown}

Of {samples["number"]} samples {samples["in_train"]:.1%} are training rows and
{samples["different"]:.1%} are different{valid}; of draws from the best chain
{samples["expected_in_train"]:.1%} would be training rows.
"""


def bound_table(metrics: Mapping[str, Any]) -> str:
    """Return the bound beside the Markov chains, as a table."""
    per_token = metrics["tokens"]
    given = metrics["given_label"]
    label = "" if given is None else f"\n| bound given the label | ≤ {given:.3f} | |"
    orders = "\n".join(
        f"| Markov chain of order {order}"
        f"{' (best on validation rows)' if order == metrics['best_order'] else ''} "
        f"| {bits:.3f} | {bits / per_token:.4f} |"
        for order, bits in enumerate(metrics["markov"])
    )
    return f"""| | bits per sequence | bits per token |
| --- | ---: | ---: |
| bound, {metrics["times"]} times a sequence | ≤ {metrics["bound"]:.3f} ± \
{metrics["bound_error"]:.3f} | ≤ {metrics["bound"] / per_token:.4f} |{label}
{orders}
| gain over the best chain (paired) | {metrics["gain"]:+.3f} ± {metrics["gain_error"]:.3f} | \
{metrics["gain"] / per_token:+.4f} |"""
