"""What a prior is worth: its bound on held-out sequences beside a Markov chain.

::

    python -m ppl_diffusion.models.evaluate yeast-promoter --data DIR

The bound is that of the continuous-time chain, in bits per token, averaged over stratified times;
where there is a latent it is that of the chain on the default path, averaged over its steps, and
where noise was learned that of the steps that there are. It is an upper bound on the code length,
so the prior may be better than it says. Rows of one family are near copies, so standard errors
treat families, not rows, as independent.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ppl_diffusion.models.cards import CARD_FILE, WEIGHTS
from ppl_diffusion.models.datasets import Sequences, load_sequences
from ppl_diffusion.models.latent import LatentDiffusion
from ppl_diffusion.models.library import load
from ppl_diffusion.models.markov_baseline import MarkovBaseline
from ppl_diffusion.models.program import DiffusionProgram
from ppl_diffusion.models.recipes import Recipe, find_recipe

MIN_TIMES = 64


@dataclass(frozen=True)
class Evaluation:
    """Figures on the test rows; all in bits per token, errors are one standard error.

    :param families: independent families among them.
    :param times: stratified times per row.
    :param bound: mean upper bound of the prior.
    :param bound_error: its standard error over families, noise of the times included.
    :param noise_error: the part of it that is due to the finite number of times.
    :param markov: mean code length of the Markov chain over all tokens.
    :param markov_full_context: the same without the first ``order`` tokens.
    :param quoted: that figure as it is quoted, NaN if it is not.
    :param gain: ``markov - bound``, paired by sequence; positive if the prior is better.
    :param gain_error: its standard error over families.
    :param gain_error_rows: the same as if rows were independent, which near copies are not.
    :param given_label: the bound of the conditional prior at the labels of the rows, NaN if the
        network knows no classes; the label itself is not counted.
    """

    sequences: int
    families: int
    times: int
    bound: float
    bound_error: float
    noise_error: float
    order: int
    markov: float
    markov_full_context: float
    quoted: float
    gain: float
    gain_error: float
    gain_error_rows: float
    given_label: float = math.nan


def evaluate(
    program: DiffusionProgram,
    sequences: Sequences,
    recipe: Recipe,
    *,
    times: int = MIN_TIMES,
    seed: int = 0,
) -> Evaluation:
    """Bound the test rows and compare with a Markov chain fitted on the training rows."""
    terms = _bound_terms(program, sequences.test, times, seed)
    labels = sequences.labels if getattr(program.denoiser, "num_classes", 0) else None
    given = _bound_terms(program, sequences.test, times, seed, labels[2]) if labels else None
    bound = terms.mean(0)
    chain = MarkovBaseline(sequences.train, recipe.markov_order, len(program.vocabulary))
    bits = chain.bits(sequences.test)
    gain = bits.mean(1) - bound
    family = sequences.test_family
    return Evaluation(
        sequences=len(bound),
        families=len(family.unique()),
        times=times,
        bound=float(bound.mean()),
        bound_error=_error(bound, family),
        noise_error=_noise(terms),
        order=recipe.markov_order,
        markov=float(bits.mean()),
        markov_full_context=float(bits[:, recipe.markov_order :].mean()),
        quoted=recipe.quoted_baseline,
        gain=float(gain.mean()),
        gain_error=_error(gain, family),
        gain_error_rows=_error(gain, torch.arange(len(gain), device=gain.device)),
        given_label=math.nan if given is None else float(given.mean()),
    )


def _bound_terms(
    program: DiffusionProgram, rows: Tensor, times: int, seed: int, labels: Tensor | None = None
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for part in torch.arange(len(rows)).split(512):
        law = program if labels is None else program.labelled(labels[part])
        x0 = rows[part].to(program.device)
        parts.append(law.bound_terms(x0, num_times=times, generator=generator))
    return torch.cat(parts, dim=1).to(rows.device) / (program.length * math.log(2.0))


def _noise(terms: Tensor) -> float:
    """Return the error of the mean due to the times alone, from pairs of neighbouring strata."""
    pairs = terms[: len(terms) // 2 * 2].unflatten(0, (-1, 2))
    variance = (pairs[:, 0] - pairs[:, 1]).square().sum(0) / len(terms) ** 2
    return float(variance.sum().sqrt() / terms.shape[1])


def _error(values: Tensor, family: Tensor) -> float:
    """Return the standard error of the mean, with families as the independent units."""
    _, index = family.unique(return_inverse=True)
    sums = values.new_zeros(int(index.max()) + 1)
    sums.index_add_(0, index, values - values.mean())
    count = len(sums)
    return float((sums.square().sum() * count / max(count - 1, 1)).sqrt() / len(values))


def print_evaluation(name: str, result: Evaluation, *, unit: str = "base") -> None:
    """Print the figures as a table; ``unit`` says what a token is."""
    title = f"{name}: {result.sequences} test sequences of {result.families} families"
    table = Table("", f"bits per {unit}", "± 1 s.e.", title=title)
    label = f"bound, {result.times} times a sequence"
    table.add_row(label, f"≤ {result.bound:.4f}", f"{result.bound_error:.4f}")
    table.add_row("  of which noise of the times", "", f"{result.noise_error:.4f}")
    if not math.isnan(result.given_label):
        table.add_row("  given the label", f"≤ {result.given_label:.4f}", "")
    table.add_row(f"order-{result.order} Markov, all {unit}s", f"{result.markov:.4f}", "")
    quoted = "" if math.isnan(result.quoted) else f" (quoted: {result.quoted:.4f})"
    rest = f"{result.markov_full_context:.4f}{quoted}"
    table.add_row(f"  without the first {result.order} {unit}s", rest, "")
    table.add_row("gain, at least (paired)", f"{result.gain:+.4f}", f"{result.gain_error:.4f}")
    table.add_row("  if rows were independent", "", f"{result.gain_error_rows:.4f}")
    Console().print(table)


def describe_path(program: DiffusionProgram) -> str | None:
    """Say which path the bound is of, None where it is in continuous time.

    :param program: the prior.
    """
    if program.fixed_steps is not None:
        return f"the {program.fixed_steps} steps that there are, all of them each time"
    if not isinstance(program, LatentDiffusion):
        return None
    falls = [(x < x0, y < y0) for (x0, y0), (x, y) in pairwise(program.path.levels)]
    tokens, latent = (sum(column) for column in zip(*falls, strict=True))
    order = ", one after the other" if program.path.one_at_a_time else ""
    return f"{len(falls)} evaluations, {latent} for the latent and {tokens} for the tokens{order}"


def write_card(
    folder: Path,
    name: str,
    sequences: Sequences,
    result: Evaluation,
    *,
    note: str = "",
    path: str | None = None,
) -> None:
    """Write ``card.json`` and the same as ``card.md``.

    :param path: which path the bound is of, from :func:`describe_path`.
    """
    recipe = find_recipe(name)
    folder_option = "" if sequences.bundled else "--data DIR "
    # JSON knows no NaN.
    metrics = {k: None if math.isnan(v) else round(v, 4) for k, v in asdict(result).items()}
    if metrics["given_label"] is None:
        del metrics["given_label"]
    card: dict[str, Any] = {
        "name": name,
        "family": recipe.family,
        "data": sequences.source,
        "licence": f"Weights: Apache-2.0. {sequences.licence}",
        "training": f"ppl-diffusion train {name} {folder_option}--out OUT",
        "note": note,
        "evaluation": f"python -m ppl_diffusion.models.evaluate {name} {folder_option}"
        f"--times {result.times}",
        **({} if path is None else {"path": path}),
        **({"codec": sequences.codec} if sequences.codec else {}),
        "metrics": metrics,
    }
    text = json.dumps(card, indent=2)
    (folder / CARD_FILE).write_text(text + "\n", encoding="utf-8")
    text = _card_text(card, sequences.noun, sequences.unit)
    (folder / "card.md").write_text(text, encoding="utf-8")


def _card_text(card: dict[str, Any], noun: str, unit: str) -> str:
    metrics = card["metrics"]
    bound = f"{metrics['bound']:.4f} ± {metrics['bound_error']:.4f}"
    gain = f"{metrics['gain']:+.4f} ± {metrics['gain_error']:.4f}"
    verdict = "below" if metrics["gain"] > 0 else "above"
    independent = metrics["families"] == metrics["sequences"]
    errors = "with sequences as independent" if independent else "over families of near copies"
    where = f"\n- Path of the bound: {card['path']}" if "path" in card else ""
    codec = f"\n- Codec: {card['codec']}" if "codec" in card else ""
    given = (
        f"\n| given the label of a sequence | ≤ {metrics['given_label']:.4f} |"
        if "given_label" in metrics
        else ""
    )
    return f"""# {card["name"]}

A {card["family"]} diffusion prior over {noun}.

- Data: {card["data"]}
- Licence: {card["licence"]}
- Training: `{card["training"]}` {card["note"]}
- Evaluation: `{card["evaluation"]}`{where}{codec}

## Test split ({metrics["sequences"]} sequences, {metrics["families"]} families)

| | bits per {unit} |
| --- | ---: |
| bound, {metrics["times"]} times a sequence | ≤ {bound} |{given}
| order-{metrics["order"]} Markov chain, all {unit}s | {metrics["markov"]:.4f} |
| without the first {metrics["order"]} {unit}s | {metrics["markov_full_context"]:.4f} |
| gain, at least (paired) | {gain} |

Errors are one standard error {errors}. The bound is an upper bound on the code
length and lies {verdict} that of the Markov chain; {metrics["noise_error"]:.4f} of its error is due
to the finite number of stratified times. Were the rows independent, the error of the gain would be
{metrics["gain_error_rows"]:.4f}.
"""


def main(
    name: Annotated[str, typer.Argument(help="Shipped prior, or the recipe of --weights.")],
    data: Annotated[
        Path | None,
        typer.Option(envvar="PPL_DIFFUSION_DATA", help="Folder that holds dna/ and text/."),
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="Folder of a trained prior.")] = None,
    times: Annotated[int, typer.Option(min=2, help="Times per sequence.")] = MIN_TIMES,
    seed: Annotated[int, typer.Option(help="Seed of times and noise.")] = 0,
    note: Annotated[str, typer.Option(help="How it was trained, for the card.")] = "",
    ship: Annotated[
        bool, typer.Option("--ship", help="Put --weights, with a card, among the shipped priors.")
    ] = False,
) -> None:
    """Bound a prior on its test rows, in bits per token."""
    recipe = find_recipe(name)
    try:
        sequences = load_sequences(recipe.dataset, data)
        program = load(weights or name)
    except (FileNotFoundError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    result = evaluate(program, sequences, recipe, times=times, seed=seed)
    print_evaluation(name, result, unit=sequences.unit)
    if ship:
        program.save(WEIGHTS / name)
        path = describe_path(program)
        write_card(WEIGHTS / name, name, sequences, result, note=note, path=path)


if __name__ == "__main__":
    typer.run(main)
