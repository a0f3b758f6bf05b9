"""The bodies of the commands."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ppl_diffusion.commands.complain import OK, NoAnswer, complain, note
from ppl_diffusion.commands.tables import (
    comparison_tables,
    table,
    warnings,
)
from ppl_diffusion.designs.report import fasta, not_drawn, save_comparison
from ppl_diffusion.jobs.backends import is_jax, jax_room
from ppl_diffusion.jobs.checks import InputError, at_least, usable_device, user_input
from ppl_diffusion.jobs.folder import check_file, write_whole
from ppl_diffusion.jobs.writing import json_text

if TYPE_CHECKING:
    from ppl_diffusion.distributions import ReverseChain
    from ppl_diffusion.models.program import DiffusionProgram
    from ppl_diffusion.models.samplers import SamplerSettings

STDOUT = Path("-")
PLOT_KINDS = (".png", ".pdf", ".svg")
ENDINGS = {
    ".fasta": "fasta",
    ".fa": "fasta",
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "lines",
    ".smi": "lines",
}
"""What files of sequences hold, by the ending of their name."""


def draw_samples(
    name: str,
    *,
    num: int,
    seed: int,
    sampler: str,
    settings: SamplerSettings,
    out: Path | None,
    device: str,
    backend: str = "torch",
    label: str | None = None,
    guidance: float | None = None,
    lengths: tuple[int, int] | None = None,
    replace: bool = False,
    as_json: bool = False,
) -> None:
    """Draw sequences from a prior and print them or write a file.

    Letters that only fill sequences up are left out.

    :param out: a file, whose ending says what it holds (:data:`ENDINGS`); standard output if None.
    :param label: a class, and ``guidance`` the weight of the guidance towards it.
    :param lengths: fewest and most tokens, of a prior over several lengths.
    :param replace: whether it may take the place of another file.
    :param as_json: print one JSON object instead.
    :raises InputError: if a name, a number or the place is wrong.
    """
    from ppl_diffusion.models import load
    from ppl_diffusion.models.datasets import PADDING, unpad
    from ppl_diffusion.models.samplers import make_chain

    numbers = (("num", num, 1), ("seed", seed, 0), ("steps", settings.num_steps, 1))
    own = (("latent-steps", settings.latent_steps, 1), ("token-steps", settings.token_steps, 1))
    for what, value, low in (*numbers, ("block", settings.block, 1), *own):
        if value is not None:
            at_least(what, value, low)
    if out is not None:
        _check_sample(out, replace=replace)
    with user_input():
        prior = load(name).to(usable_device(device))
        prior = prior if lengths is None else prior.between(*lengths)
        if label is not None:
            prior = prior.of_class(label, 1.0 if guidance is None else guidance)
        elif guidance is not None:
            raise InputError("Guidance leads towards a class: add --label, or drop --guidance.")
        chain = make_chain(prior, sampler, settings)
    sequences = list(prior.decode(_drawn(chain, num, seed, in_jax=is_jax(backend, device))))
    if prior.padding is None and PADDING in prior.vocabulary and prior.tokeniser is None:
        sequences = [unpad(text) for text in sequences]
    if out is not None:
        write_whole(out, _sequence_text(sequences, _kind(prior, out)))
    if as_json:
        place = None if out is None else str(out)
        told = {"prior": name, "sampler": sampler, "seed": seed, "num": num, "out": place}
        print(json_text({**told, "sequences": sequences}), end="")
    elif out is None:
        print(_sequence_text(sequences, _kind(prior)), end="")


def _drawn(chain: ReverseChain, num: int, seed: int, *, in_jax: bool) -> torch.Tensor:
    """Return clean sequences, int64 ``(num, L)``."""
    if not in_jax:
        generator = torch.Generator().manual_seed(seed)
        return chain.x0(chain.sample((num,), generator=generator))
    with user_input():
        twin = jax_room().from_torch(chain)
    import jax
    import numpy as np

    drawn = jax.jit(lambda key: twin.x0(twin.sample(key, (num,))))(jax.random.key(seed))
    return torch.from_numpy(np.array(drawn)).long()


def diagnose_run(folder: Path, *, plots: Path | None, as_json: bool = False) -> None:
    """Print the summary of a folder written by ``design``, or by ``ParticlePosterior.save``.

    :raises InputError: if it holds no run.
    :raises ParticleCollapse: if plots are asked for of a run without a living particle.
    :raises NoAnswer: if no plot could be drawn.
    """
    from ppl_diffusion.designs.contenders import load_particles
    from ppl_diffusion.diagnostics import summary
    from ppl_diffusion.diagnostics.claims import EVIDENCE, claim

    posterior = load_particles(folder)
    figures = summary(posterior)
    target = [claim(figures)]
    left_out = {"target", "exact", "warnings"}
    if not posterior.law.has_evidence:
        left_out |= {*EVIDENCE, "genealogical_sd", "log_evidence_per_run"}
    rows = [[key, _readable(value)] for key, value in figures.items() if key not in left_out]
    if as_json:
        print(json_text({**figures, "warnings": list(map(str, posterior.warnings))}), end="")
    else:
        table(f"Particles of {folder}", ["quantity", "value"], [*target, *rows])
        warnings(posterior.warnings)
    if plots is not None:
        from ppl_diffusion.designs.report import save_plots

        missing = save_plots(posterior, plots)
        if missing is not None and not any(plots.glob("*.png")):
            raise NoAnswer(missing)
        note(f"wrote {plots}", quiet=False) if as_json else print(f"wrote {plots}")
        if missing is not None:
            complain(missing, OK)


def compare_runs(folders: Sequence[Path], *, plot: Path | None, out: Path | None) -> None:
    """Print such folders side by side.

    :param out: a file for the figures as JSON; ``-`` prints them, and no tables.
    :raises InputError: if they cannot be compared, or a file cannot be written.
    :raises NoAnswer: if the plot could not be drawn; everything else is there.
    """
    from ppl_diffusion.designs.contenders import read_contenders
    from ppl_diffusion.diagnostics.comparison import compare

    told = out == STDOUT
    for place in filter(None, (plot, None if told else out)):
        check_file(place)
    if plot is not None:
        _check_plot(plot)
    contenders = read_contenders(folders)
    with user_input():
        comparison = compare(contenders)
    if told:
        print(json_text(comparison.to_json()), end="")
    else:
        comparison_tables(comparison)
    if out is not None and not told:
        write_whole(out, json_text(comparison.to_json()))
        print(f"wrote {out}")
    if plot is not None:
        try:
            save_comparison(comparison, plot)
        except (InputError, OSError):
            raise
        except Exception as error:
            raise NoAnswer(not_drawn([repr(str(plot))], error)) from error
        note(f"wrote {plot}", quiet=False) if told else print(f"wrote {plot}")


def _check_plot(path: Path) -> None:
    if find_spec("matplotlib") is None:
        raise InputError(
            "A plot is drawn with Matplotlib: install it with `pip install matplotlib`."
        )
    if path.suffix.lower() not in PLOT_KINDS:
        raise InputError(
            f"The plot {str(path)!r} is no kind of picture: end its name in "
            f"{' or '.join(PLOT_KINDS)}."
        )


def _check_sample(out: Path, *, replace: bool) -> None:
    check_file(out)
    if out.suffix.lower() not in ENDINGS:
        raise InputError(
            f"The ending of {str(out)!r} is none that is known: end it in one of "
            f"{', '.join(ENDINGS)}."
        )
    if out.exists() and not replace:
        raise InputError(
            f"The file {str(out)!r} is there already: choose another --out, or replace it with "
            "--force."
        )


def _kind(prior: DiffusionProgram, out: Path | None = None) -> str:
    """Return how sequences are written: as a file's name says, or best."""
    from ppl_diffusion.models.datasets import PADDING

    kind = "" if out is None else ENDINGS[out.suffix.lower()]
    if "\n" in prior.vocabulary and kind in ("", "lines"):
        return "text"
    filling = prior.padding or PADDING
    letters = all(symbol.isalpha() for symbol in prior.vocabulary if symbol != filling)
    return kind or ("fasta" if letters else "lines")


def _sequence_text(sequences: list[str], kind: str) -> str:
    if kind in ("csv", "tsv"):
        file = io.StringIO()
        comma = "," if kind == "csv" else "\t"
        writer = csv.writer(file, lineterminator="\n", delimiter=comma)
        writer.writerows([("sample", "sequence"), *enumerate(sequences, 1)])
        return file.getvalue()
    if kind == "lines":
        return "".join(f"{text}\n" for text in sequences)
    if kind == "text":
        return "".join(f"--- sample {i} ---\n{text}\n" for i, text in enumerate(sequences, 1))
    return fasta(sequences, [f"sample_{index}" for index in range(1, len(sequences) + 1)])


def _readable(value: Any) -> object:
    if isinstance(value, list | tuple):
        return ", ".join(f"{v:.4g}" if isinstance(v, float) else str(_readable(v)) for v in value)
    return "n/a" if value is None else value
