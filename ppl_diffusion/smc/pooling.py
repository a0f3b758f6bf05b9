"""Results of independent runs, made apart, as one result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch

from ppl_diffusion.potentials.failures import REWARDS
from ppl_diffusion.smc.posterior import ParticlePosterior

_STEPS_FIRST = ("ancestors",)
_SUMS = ("num_evaluations", "num_potential_calls", "num_move_rows", "num_move_gradients",
         "num_scout_rows", "seconds")  # fmt: skip
_BY_RUN = ("x0", "log_weights", "log_evidence", "log_evidence_steps", "evidence_variance", "eve",
           "ess", "resampled", "died_at", "log_potential", "compact_path", "log_mass")  # fmt: skip


def pooled(posteriors: Sequence[ParticlePosterior]) -> ParticlePosterior:
    """Return runs of one target that were made apart, as the runs of one result.

    Costs are added; settings are those of the first, but for what rewards cost.

    :param posteriors: results with as many particles each, one law and one grid.
    :raises ValueError: if there are none, or they are not of one target.
    """
    if not posteriors:
        raise ValueError("pooled: there are no runs; give one or more.")
    first = posteriors[0]
    for other in posteriors[1:]:
        same = (first.num_particles, first.num_steps) == (other.num_particles, other.num_steps)
        if first.law != other.law or not same or not torch.equal(first.times, other.times):
            raise ValueError(
                "pooled: the runs are not of one target, with as many particles and steps each; "
                "pool runs that differ in their seeds alone."
            )
    changes: dict[str, Any] = {}
    for name in (f.name for f in fields(ParticlePosterior)):
        values = [getattr(posterior, name) for posterior in posteriors]
        if name in _SUMS:
            changes[name] = sum(values)
        elif name in (*_BY_RUN, *_STEPS_FIRST):
            known = all(value is not None for value in values)
            axis = int(name in _STEPS_FIRST)
            changes[name] = torch.cat(values, axis) if known else None
    changes["samples"] = {
        name: torch.cat([posterior.samples[name] for posterior in posteriors])
        for name in first.samples
    }
    changes["settings"] = {**first.settings, **_rewards(posteriors)}
    return replace(first, **changes)


def _rewards(posteriors: Sequence[ParticlePosterior]) -> dict[str, Any]:
    """Return the ledger of all runs together; shares of time mean nothing across processes."""
    ledgers = [p.settings[REWARDS] for p in posteriors if REWARDS in p.settings]
    if not ledgers:
        return {}
    names = dict.fromkeys(name for ledger in ledgers for name in ledger)
    return {REWARDS: {name: _added([x[name] for x in ledgers if name in x]) for name in names}}


def _added(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    total: dict[str, Any] = {}
    for key, value in parts[0].items():
        values = [part.get(key) for part in parts]
        if isinstance(value, dict):
            total[key] = _added([part for part in values if isinstance(part, dict)])
        elif key in ("utilisation", "overlap"):
            total[key] = None
        elif isinstance(value, int | float) and not isinstance(value, bool):
            total[key] = sum(x for x in values if x is not None)
        else:
            total[key] = value
    missing = {key for part in parts for key in part} - total.keys()
    for key in sorted(missing):
        total[key] = _added([{key: part[key]} for part in parts if key in part])[key]
    return total
