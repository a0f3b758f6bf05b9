"""The body of ``restore``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppl_diffusion.commands.complain import OK, complain
from ppl_diffusion.commands.progress import progress_bar
from ppl_diffusion.commands.tables import table, warnings
from ppl_diffusion.jobs.folder import check_target
from ppl_diffusion.restoration.question import Job

if TYPE_CHECKING:
    from ppl_diffusion.restoration.run import Result

_NAMES = {"psnr": "PSNR (dB)", "ssim": "SSIM", "perceptual": "feature distance"}
_IMAGES = {
    "mean": "mean of the draws",
    "pseudo_inverse": "without a prior",
    "codec": "the truth through the codec",
}


def run_restore(job: Job, out: Path, *, replace: bool, quiet: bool) -> None:
    """Restore an image, write the run folder, print its tables.

    :raises InputError: if something asked for cannot be done.
    """
    check_target(out, replace=replace)
    # Here, not above: a place that is taken is told at once.
    from ppl_diffusion.restoration.report import write_run
    from ppl_diffusion.restoration.run import restore
    from ppl_diffusion.restoration.target import build_target

    target = build_target(job)
    with progress_bar(f"restore {job.question.image}", quiet=quiet) as advance:
        result = restore(target, progress=advance)
    left_out = write_run(result, out, replace=replace)
    if not quiet:
        _tables(result)
        print(f"wrote {out}")
    if left_out is not None:
        complain(f"{left_out} Every other file of the run was written.", OK)


def _tables(result: Result) -> None:
    from ppl_diffusion.diagnostics.claims import claim

    summary = result.summary
    figures: dict[str, dict[str, float]] = summary["metrics"]
    known = list(figures["restored"])
    header = ["image", *(_NAMES.get(name, name) for name in known)]
    names = {"restored": f"restored ({result.images.kind})", **_IMAGES}
    rows = [[names[name], *(_said(row.get(key)) for key in known)] for name, row in figures.items()]
    table("Images", header, rows)
    ess = summary["ess_pooled"]
    cost = [
        ["method", summary["method"]],
        *([name.replace("_", " "), value] for name, value in summary["posterior"].items()),
        ["effective sample size", "n/a" if ess is None else _of(ess, summary["num_particles"])],
        ["distinct images", summary["unique"]],
        ["denoiser rows", summary["denoiser_rows"]],
        ["decoder rows", summary["decoder_calls"]],
        ["seconds", f"{summary['seconds']:.1f}"],
        list(claim(summary)),
    ]
    table("Trust and cost", ["quantity", "value"], cost)
    warnings(result.posterior.warnings)
    for note in result.target.notes:
        print(f"Note: {note}")


def _of(ess: float, total: int) -> str:
    return f"{ess:.1f} of {total}"


def _said(value: Any) -> object:
    return "n/a" if value is None else float(value)
