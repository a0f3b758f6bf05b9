"""Rules about what was asked: constraints, rewards, and how chains and latents move."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ppl_diffusion.smc.run_statistics import as_array
from ppl_diffusion.smc.verdict import Verdict

# Known by its fields: naming the class, whose ``warnings`` come from here, would close a circle.
ParticlePosterior = Any

FORBIDDEN, SURVIVORS = 0.9, 25
FAILED = 0.5
FAR = 2.0
REVEALS = 4.0
ACCEPTED = 0.02
COST = 5.0


def constraint(posterior: ParticlePosterior) -> Verdict | None:
    """Judge how many particles the potential forbids in the end."""
    forbidden = np.isneginf(as_array(posterior.log_potential))
    share, alive = forbidden.mean(), int((~forbidden).sum())
    if not (share > FORBIDDEN or (forbidden.any() and alive < SURVIVORS)):
        return None
    rare = share > FORBIDDEN
    return Verdict(
        f"{share:.0%} of {forbidden.size} particles ended where G = 0, {alive} did not (limits "
        f"{FORBIDDEN:.0%} and {SURVIVORS}): the error of the evidence is about "
        f"1 / sqrt({alive}); check that the constraints can be met together, look ahead by what "
        "grades the way to them, or use more particles.",
        kind="constraint",
        level="weak" if alive else "broken",
        where="all runs",
        value=share if rare else alive,
        limit=FORBIDDEN if rare else SURVIVORS,
    )


def reward(posterior: ParticlePosterior) -> Verdict | None:
    """Judge how often a function of sequences failed and was passed over."""
    known: Mapping[str, Mapping[str, Any]] = posterior.settings.get("failures", {})
    shares = {name: told["failed"] / told["asked"] for name, told in known.items()}
    worst = max(shares, key=lambda name: shares[name], default=None)
    if worst is None or shares[worst] <= FAILED:
        return None
    told = known[worst]
    return Verdict(
        f"{worst!r} failed for {told['failed']} of {told['asked']} sequences (limit {FAILED:.0%}; "
        f"first: {told['first']}): what is rejected is a constraint that nobody wrote; mend the "
        "function, or say with a constraint which sequences it cannot answer for.",
        kind="reward",
        level="broken" if told["failed"] == told["asked"] else "weak",
        where=worst,
        value=shares[worst],
        limit=FAILED,
    )


def steps(posterior: ParticlePosterior) -> Verdict | None:
    """Judge how many positions a masked chain reveals at once."""
    base = max(posterior.law.chains, key=lambda chain: chain.reveals, default=None)
    if base is None or base.reveals <= REVEALS:
        return None
    return Verdict(
        f"chain {base.site!r} reveals {base.reveals:.1f} positions per step (limit {REVEALS:g}), "
        f"each without seeing the others: its {base.steps}-step law is another one than that of "
        "more steps, and no weight can tell; compare with twice as many steps.",
        kind="steps",
        level="note",
        where=base.site,
        value=base.reveals,
        limit=REVEALS,
    )


def stuck(posterior: ParticlePosterior) -> Verdict | None:
    """Judge whether moves of latents were ever accepted."""
    told = posterior.settings.get("latent_moves") or {}
    both = [list(_numbers(t.get("acceptance", ()))) for t in (told, told.get("along_paths") or {})]
    rates = next((found for found in both if found and max(found) < ACCEPTED), None)
    dead = bool(np.isneginf(as_array(posterior.log_evidence)).all())
    if rates is None or dead:  # nothing can be accepted where nothing is possible
        return None
    return Verdict(
        f"moves of latents were accepted at most {max(rates):.1%} of the time at any step (limit "
        f"{ACCEPTED:.0%}): latents are only inherited; use ParticleGibbs, or another "
        "parametrisation.",
        kind="stuck",
        level="weak",
        where="latents",
        value=max(rates),
        limit=ACCEPTED,
    )


def lookahead(posterior: ParticlePosterior) -> Verdict | None:
    """Judge what draws that nothing dropped say of the look-ahead, where there were any."""
    told = posterior.settings.get("lookahead") or {}
    cost = told.get("cost", 0.0)
    if cost <= COST * (1 + 1e-6):  # a floor of .2 bounds it by 5 up to rounding
        return None
    return Verdict(
        f"resampling by the look-ahead {posterior.settings.get('twist')!r} costs {cost:.2g} times "
        f"the variance of none (limit {COST:g}), as {told['sentinels']} draws that it could not "
        "drop say: it guesses some of what pays wrong; use twist='defensive' or twist=None.",
        kind="lookahead",
        level="weak",
        where="all runs",
        value=cost,
        limit=COST,
    )


def reweighted(posterior: ParticlePosterior) -> Verdict | None:
    """Judge whether a reweighted run went far from what its resampling followed."""
    ratio = posterior.settings.get("log_evidence_ratio_pooled")
    was_resampled = bool(posterior.resampled.any())
    if ratio is None or not was_resampled or not abs(ratio) > FAR:
        return None
    return Verdict(
        f"reweighting changed the log evidence by {ratio:+.1f} nats (limit {FAR:g}), and earlier "
        "resampling followed the old potential; run again to confirm.",
        kind="reweighted",
        level="note",
        where="the evidence",
        value=ratio,
        limit=FAR,
    )


def _numbers(value: Any) -> Iterable[float]:
    """Yield the finite numbers of nested lists."""
    if isinstance(value, Sequence):
        for item in value:
            yield from _numbers(item)
    elif value is not None and math.isfinite(value):
        yield float(value)
