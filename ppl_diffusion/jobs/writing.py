"""What every run folder holds. Same seed, same bytes, except the seconds in ``summary.json``."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppl_diffusion.diagnostics.claims import evidence_figures, evidence_range, number_or_none
from ppl_diffusion.potentials.failures import REWARDS

if TYPE_CHECKING:
    from ppl_diffusion.smc import ParticlePosterior

_POOLED = ("pooled", "interval", "sd", "bound", "range")


def json_text(content: Mapping[str, Any]) -> str:
    """Write strict JSON: numbers that are not finite become null."""
    return json.dumps(_finite(content), indent=2, allow_nan=False) + "\n"


def save_netcdf(data: Any, path: Path) -> None:
    """Write ArviZ data without its time stamp, so that the same seed gives the same bytes."""
    groups = data.groups() if callable(data.groups) else data.groups
    for node in (data, *(data[name] for name in groups if name != "/")):
        node.attrs.pop("created_at", None)
    data.to_netcdf(str(path))


def save_arviz(posterior: ParticlePosterior, folder: Path, vocabulary: Sequence[str]) -> str | None:
    """Write ``posterior.nc`` into a folder; ArviZ, and what it imports, decides nothing.

    :param vocabulary: one symbol per token.
    :returns: a sentence that says why it was left out, None if it was not.
    """
    place = folder / "posterior.nc"
    try:
        save_netcdf(posterior.to_arviz(vocabulary=list(vocabulary)), place)
    except Exception as error:
        place.unlink(missing_ok=True)
        return f"The ArviZ file {place.name} could not be written ({reason(error)})."
    return None


def evidence_entries(posterior: ParticlePosterior, method: str) -> dict[str, Any]:
    """Return what a run folder says about its evidence, in JSON types."""
    if not posterior.law.has_evidence:
        nothing = [None] * posterior.num_runs
        missing = dict.fromkeys(f"log_evidence_{name}" for name in _POOLED)
        told = {"evidence_relative_variance": nothing, "evidence_note": no_evidence(method)}
        return {"log_evidence": nothing, **missing, **told}
    return {
        **evidence_figures(posterior.evidence),
        "log_evidence": posterior.log_evidence.tolist(),
        "log_evidence_pooled": posterior.pooled_log_evidence,
        "log_evidence_range": evidence_range(posterior.log_evidence),
        "evidence_relative_variance": list(
            map(number_or_none, posterior.evidence_variance.tolist())
        ),
    }


def no_evidence(method: str) -> str:
    """Say in a sentence why a result has no evidence."""
    return f"{method} declares no law here, so that there is no evidence to estimate."


def timeless(posterior: ParticlePosterior) -> ParticlePosterior:
    """Return a result without what differs from one run of a seed to the next."""
    settings = {name: value for name, value in posterior.settings.items() if name != REWARDS}
    return dataclasses.replace(posterior, seconds=math.nan, settings=settings)


def reason(error: Exception) -> str:
    """Return what an error says, on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
