"""The files of a run folder. Same seed, same bytes, except the seconds in ``summary.json``."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppl_diffusion.diagnostics import nearest_distance
from ppl_diffusion.errors import ParticleCollapse
from ppl_diffusion.jobs.folder import whole_file
from ppl_diffusion.jobs.writing import no_evidence, reason
from ppl_diffusion.tokenisers import MOLECULES

if TYPE_CHECKING:
    from ppl_diffusion.designs.alphabet import Alphabet
    from ppl_diffusion.designs.ranking import Designs
    from ppl_diffusion.designs.scores import Columns
    from ppl_diffusion.diagnostics.comparison import Comparison
    from ppl_diffusion.smc import ParticlePosterior

PLOTS = ("ess", "evidence", "weights", "ancestry", "token_entropy")


def designs_csv(designs: Designs, columns: Columns, sequences: Sequence[str]) -> str:
    rows = designs_table(designs, columns, sequences)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*rows[0]] if rows else ["rank", "sequence"])
    for row in rows:
        rank, sequence, *numbers = row.values()
        writer.writerow([rank, sequence, *map(_cell, numbers)])
    return out.getvalue()


def designs_table(
    designs: Designs, columns: Columns, sequences: Sequence[str]
) -> list[dict[str, Any]]:
    """Return the ranked designs, a row each, by the names of the columns."""
    numbers = {
        "weight": designs.weight,
        "copies": designs.copies,
        "run": designs.run,
        "log_potential": designs.log_potential,
        "nearest": nearest_distance(designs.tokens),
        **columns,
    }
    rows = zip(*(column.tolist() for column in numbers.values()), strict=True)
    ranked = enumerate(zip(sequences, rows, strict=True), 1)
    return [
        {"rank": rank, "sequence": text, **dict(zip(numbers, row, strict=True))}
        for rank, (text, row) in ranked
    ]


def fasta(sequences: Sequence[str], headers: Sequence[str]) -> str:
    """Write sequences in FASTA format, one line each; headers come without ``>``."""
    pairs = zip(headers, sequences, strict=True)
    return "".join(f">{header}\n{sequence}\n" for header, sequence in pairs)


def sequence_file(
    alphabet: Alphabet, sequences: Sequence[str], designs: Designs
) -> tuple[str, str]:
    """Return the name and the text of the file of the designs alone, of a format that suits them.

    FASTA where tokens are letters, a line each where they are more, as SMILES are.
    """
    kind = getattr(alphabet.tokeniser, "name", "")
    if kind in MOLECULES:
        names = design_headers(designs)
        pairs = zip(sequences, names, strict=True)
        return "designs.smi", "".join(f"{text} {name}\n" for text, name in pairs)
    if all(len(symbol) == 1 and symbol.isalpha() for symbol in alphabet.symbols):
        return "designs.fasta", fasta(sequences, design_headers(designs))
    return "designs.txt", "".join(f"{text}\n" for text in sequences)


def design_headers(designs: Designs) -> list[str]:
    """Name designs by rank, with weight and log-potential."""
    pairs = zip(designs.weight.tolist(), designs.log_potential.tolist(), strict=True)
    return [
        f"design_{rank} weight={weight:.6g} log_potential={potential:.6g}"
        for rank, (weight, potential) in enumerate(pairs, 1)
    ]


def save_plots(posterior: ParticlePosterior, folder: Path) -> str | None:
    """Draw every diagnostic plot into a folder.

    A plot decides nothing: one that cannot be drawn is left out.

    :returns: a sentence about what was left out, None if nothing was.
    :raises ParticleCollapse: if every run is dead; then nothing is written.
    """
    if not bool(posterior.alive.any()):
        raise ParticleCollapse(
            f"No plots were drawn into {folder}, because every particle of every run has weight "
            f"zero since step {int(posterior.died_at.max())}: make a run with more particles, a "
            "better twist or a weaker constraint."
        )
    folder.mkdir(parents=True, exist_ok=True)
    failed: dict[str, Exception] = {}
    for name in PLOTS:
        place = folder / f"{name}.png"
        try:
            _save_plot(posterior, name, place)
        except Exception as error:
            place.unlink(missing_ok=True)
            failed[name] = error
    return not_drawn(list(failed), next(iter(failed.values()))) if failed else None


def _save_plot(posterior: ParticlePosterior, name: str, place: Path) -> None:
    from matplotlib.figure import Figure

    from ppl_diffusion.diagnostics import plots

    figure = Figure(figsize=(7, 4.5), layout="constrained")  # without a window
    ax = figure.subplots()
    if name == "evidence" and not posterior.law.has_evidence:
        ax.set_axis_off()
        note = no_evidence(str(posterior.settings["method"]))
        ax.text(0.5, 0.5, note, ha="center", va="center", wrap=True)
    else:
        getattr(plots, f"plot_{name}")(posterior, ax=ax)
    figure.savefig(place, dpi=120)


def not_drawn(names: Sequence[str], error: Exception) -> str:
    """Say in a sentence which plots could not be drawn, and why the first one could not."""
    plural = "s" * (len(names) > 1)
    return f"The plot{plural} {', '.join(names)} could not be drawn ({reason(error)})."


def save_comparison(comparison: Comparison, path: Path) -> None:
    """Draw a comparison into a file, whose ending says which kind of picture."""
    from matplotlib.figure import Figure

    from ppl_diffusion.diagnostics import plot_comparison

    panels = 2 + max(1, len(comparison.targets))
    figure = Figure(figsize=(4.0 * panels, 4.6), layout="constrained")
    plot_comparison(comparison, ax=figure.subplots())
    with whole_file(path) as scratch:
        figure.savefig(scratch, dpi=120)


def _cell(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.6g}"
