"""Rules about the particles of a result: how many are left, of what, and how they agree.

Each looks at the whole posterior and returns one verdict or none: the worst run is named, others
are counted. Limits were chosen on problems with enumerated answers, such that good results stay
silent; what each one is worth stands in the documentation (``howto/verdicts``).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ppl_diffusion.rows import hash_rows
from ppl_diffusion.smc.evidence import Evidence
from ppl_diffusion.smc.khat import khat
from ppl_diffusion.smc.run_statistics import as_array, effective_distinct
from ppl_diffusion.smc.verdict import Verdict

# Known by its fields: naming the class, whose ``warnings`` come from here, would close a circle.
ParticlePosterior = Any
Floats = NDArray[np.float64]

MASS, MASS_LOST, ONE_HOLDS = 0.7, 0.1, 0.9
ROOTS, COPIES = 2.0, 5.0
KHAT, KHAT_BROKEN = 0.7, 1.0
ESS_END, ESS_PATH, ESS_SHARE = 5.0, 3.0, 0.02
APART, APART_BROKEN = 1.0, 3.0


def living(posterior: ParticlePosterior) -> NDArray[np.int64]:
    """Return the numbers of the living runs."""
    return np.flatnonzero(as_array(posterior.alive))


def worst(values: Floats, runs: NDArray[np.int64], bad: NDArray[np.bool_]) -> tuple[int, str, str]:
    """Return the index of the smallest value, its run in words, and how many others are bad."""
    at = int(np.argmin(np.where(bad, values, np.inf)))
    others = int(bad.sum()) - 1
    return at, f"run {runs[at]}", f" (and in {others} of {len(runs) - 1} others)" if others else ""


# ----------------------------------------------------------------------------------------------
# what is left of the prior, and of the particles


def dead(posterior: ParticlePosterior) -> Verdict | None:
    """Judge whether all weights of a run became zero."""
    died = as_array(posterior.died_at)
    runs = np.flatnonzero(died >= 0)
    if not len(runs):
        return None
    whole = len(runs) == len(died)
    what = "every run" if whole else f"{len(runs)} of {len(died)} runs"
    return Verdict(
        f"{what} died, run {runs[0]} after {died[runs[0]] + 1} of {posterior.num_steps} steps: no "
        "particle of positive weight was left, which counts as evidence zero (limit 0 dead runs); "
        "use more particles, look ahead by what grades the way to G > 0, or relax the constraint.",
        kind="dead",
        level="broken" if whole else "weak",
        where=f"run {runs[0]}",
        value=len(runs),
        limit=0,
    )


def mass(posterior: ParticlePosterior) -> Verdict | None:
    """Judge which share of the chain's own law the particles still stand for."""
    # Of a product or a power it is no share: what such a law is normalised by is in it.
    if posterior.log_mass is None or posterior.law.product != "p(path)":
        return None
    # Moments guess no completion, and a good look-ahead at data that say much stands for next to
    # nothing of the prior: the mean share is one by draws as rare as those of a harmonic mean.
    if posterior.settings.get("twist") == "moments" or not len(living(posterior)):
        return None
    share = np.exp(as_array(posterior.log_mass)[:, -1])
    # One run in many makes up for what the others lost, and says nothing about them.
    pooled = np.median(share) if share.max() > ONE_HOLDS * share.sum() else share.mean()
    if pooled >= MASS:
        return None
    twist = posterior.settings.get("twist")
    return Verdict(
        f"only {pooled:.0%} of the prior's mass is left in the particles (limit {MASS:.0%}): "
        f"{_by_what(twist)} or the data left the rest behind; if sequences could have been guessed "
        f"wrong, {_instead(twist)}, else it is as it must be.",
        kind="mass",
        level="broken" if pooled < MASS_LOST else "weak",
        where="all runs",
        value=pooled,
        limit=MASS,
    )


def _by_what(twist: Any) -> str:
    return f"the look-ahead {twist!r}" if isinstance(twist, str) else "resampling"


def _instead(twist: Any) -> str:
    guarded = isinstance(twist, str) and "defensive" in twist
    return "use more particles" if guarded else "use twist='defensive', or more particles"


def roots(posterior: ParticlePosterior) -> Verdict | None:
    """Judge from how many of the first particles the last ones descend."""
    runs = living(posterior)
    resampled: NDArray[np.bool_] = np.any(as_array(posterior.resampled)[runs], axis=-1)
    found = effective_distinct(as_array(posterior.eve)[runs], as_array(posterior.weights)[runs])
    bad = resampled & (found < ROOTS)
    if not bad.any():
        return None
    at, where, others = worst(found, runs, bad)
    return Verdict(
        f"{found[at]:.3g} effective root ancestors in {where}{others} (limit {ROOTS:g}): what was "
        "drawn first is a single guess there, and its family tree tells no error; use more "
        "particles, a milder potential, or more runs.",
        kind="roots",
        level="weak",
        where=where,
        value=found[at],
        limit=ROOTS,
    )


def copies(posterior: ParticlePosterior) -> Verdict | None:
    """Judge how many distinct paths are left; latents, which moves make different, do not count."""
    runs, labels = living(posterior), _path_labels(posterior)
    if labels is None or not len(runs):
        return None
    limit = min(COPIES, posterior.num_particles / 4)
    found = effective_distinct(labels[runs], as_array(posterior.weights)[runs])
    bad = found < limit
    if not bad.any():
        return None
    at, where, others = worst(found, runs, bad)
    return Verdict(
        f"{found[at]:.3g} effective distinct paths among {posterior.num_particles} particles of "
        f"{where}{others} (limit {limit:g}): the population is one guess, copied; use more "
        "particles, a milder potential, or resample less often.",
        kind="copies",
        level="weak",
        where=where,
        value=found[at],
        limit=limit,
    )


def _path_labels(posterior: ParticlePosterior) -> NDArray[np.int64] | None:
    """Return a number per particle that is equal where whole paths are, ``(R, N)``."""
    sites = [base.site for base in posterior.law.chains]
    paths = [posterior.samples[site] for site in sites if site in posterior.samples]
    if not paths and posterior.compact_path is not None:
        paths = [posterior.compact_path]
    if not paths:
        return None
    shape = posterior.log_weights.shape
    steps = [s.reshape(shape.numel(), -1) for path in paths for s in path.unbind(-2)]
    hashes = torch.stack([hash_rows(step.to(torch.int64)) for step in steps], -1)
    return as_array(hash_rows(hashes).reshape(shape))


# ----------------------------------------------------------------------------------------------
# weights


def khat_of_weights(posterior: ParticlePosterior) -> Verdict | None:
    """Judge the tail of the pooled weights; small alphabets tie them, which a high ESS excuses."""
    if not len(living(posterior)):
        return None
    log_w = posterior.pooled_log_weights.reshape(1, -1)
    ess = 1 / float(log_w.exp().square().sum())
    shape = float(khat(log_w)[0])
    if not (shape > KHAT and ess < log_w.numel() / 2):
        return None
    return Verdict(
        f"k-hat of the pooled weights is {shape:.2f} (limit {KHAT:g}) at an effective sample size "
        f"of {ess:.1f} of {log_w.numel()}: means rest on the heaviest particles; use more "
        "particles, or a method that looks ahead.",
        kind="khat",
        level="broken" if shape > KHAT_BROKEN else "weak",
        where="all runs",
        value=shape,
        limit=KHAT,
    )


def ess_end(posterior: ParticlePosterior) -> Verdict | None:
    """Judge the effective sample size of every run at the end."""
    runs = living(posterior)
    squares = (as_array(posterior.weights)[runs] ** 2).sum(-1)
    limit = max(ESS_END, ESS_SHARE * posterior.num_particles)
    return _small_ess(posterior, 1 / squares, runs, limit, "ess end", "at the end")


def ess_path(posterior: ParticlePosterior) -> Verdict | None:
    """Judge the effective sample size before every resampling."""
    runs = living(posterior)
    due = as_array(posterior.resampled)[runs]
    if not due.any():
        return None
    lowest = np.where(due, as_array(posterior.ess)[runs], np.inf)
    step = int(lowest.min(0).argmin())
    limit = max(ESS_PATH, ESS_SHARE * posterior.num_particles)
    when = f"after {step + 1} of {posterior.num_steps} steps"
    return _small_ess(posterior, lowest.min(-1), runs, limit, "ess path", when)


def _small_ess(
    posterior: ParticlePosterior,
    ess: Floats,
    runs: NDArray[np.int64],
    limit: float,
    kind: str,
    when: str,
) -> Verdict | None:
    bad = ess < limit
    if not bad.any():
        return None
    at, where, others = worst(ess, runs, bad)
    return Verdict(
        f"effective sample size {ess[at]:.3g} of {posterior.num_particles} {when} in "
        f"{where}{others} (limit {limit:g}): one step asked too much of the particles; use more "
        "steps or particles, a milder potential, or tempering.",
        kind=kind,
        level="weak",
        where=where,
        value=ess[at],
        limit=limit,
    )


def apart(posterior: ParticlePosterior) -> Verdict | None:
    """Judge how far apart the log-evidences of the living runs are."""
    found = Evidence.of(posterior.log_evidence)
    if not found.sd > APART or found.ends is None:
        return None
    low, high = found.ends
    return Verdict(
        f"runs disagree: log evidence from {low:.1f} to {high:.1f} nats over "
        f"{found.num_runs - found.num_dead} living runs (standard deviation {found.sd:.1f}, limit "
        f"{APART:g}); no error can be given, log Z >= {found.bound:.1f} at 95 %; use more "
        "particles or steps, or ParticleGibbs.",
        kind="apart",
        level="broken" if found.sd > APART_BROKEN else "weak",
        where="all runs",
        value=found.sd,
        limit=APART,
    )
