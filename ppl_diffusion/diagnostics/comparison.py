"""Methods side by side: what runs found, how sure they are, and what it cost.

Results cost different numbers of network rows, and more rows make every method look better. Beside
the figures of each result as it is, :func:`compare` therefore gives those of as many of its *whole
independent runs* as come closest to the rows of the cheapest contender (at most 15 % above): the
particles of one run share ancestors and weights, so that a part of them is the result of no method.
Where not even one run fits, one is kept and its errors are scaled by the root of what it
overspends. Notes name every contender that ends up 10 % or more off the budget.

Evidences are comparable where the declared laws are one; rows say which of them share one.
"""

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ppl_diffusion.diagnostics.claims import (
    evidence_figures,
    evidence_range,
    knows_ess,
    number_or_none,
)
from ppl_diffusion.diagnostics.report import root_ancestors
from ppl_diffusion.smc.gibbs_posterior import require_particles
from ppl_diffusion.smc.khat import khat
from ppl_diffusion.smc.run_statistics import as_array
from ppl_diffusion.smc.verdict import SAID, Verdict

if TYPE_CHECKING:
    from ppl_diffusion.smc import ParticlePosterior

LOG_POTENTIAL = "log_potential"

WHOLE, SUBSAMPLED, SCALED = "whole", "subsampled", "scaled"
UNKNOWN = "unknown"
"""What stands for what was asked where nobody wrote it down; it is no two results' common part."""
TOLERANCE = 1.15
"""How far above the budget runs may end to come closer to it."""
OFF_BUDGET = 0.1
"""The share of the budget by which kept rows may miss it without a note."""


@dataclass(frozen=True, eq=False)
class Contender:
    """One result in a comparison.

    :param label: what tables call it.
    :param asked: what was asked beyond what the law of the posterior knows, by name.
    :param scores: further values of each particle, ``(R, N)``, by name.
    :param seconds: wall time, or None where it is not known.
    """

    label: str
    posterior: "ParticlePosterior"
    method: str = "smc"
    asked: Mapping[str, str] = field(default_factory=dict)
    scores: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    seconds: float | None = None

    @property
    def rows_per_run(self) -> float:
        """Network rows of one run, on average: equal states are evaluated once over all runs."""
        return self.posterior.num_evaluations / self.posterior.num_runs

    @property
    def target(self) -> Hashable:
        """What two results must share for their evidences to estimate one number."""
        law = self.posterior.law
        return tuple(self.asked.items()), law.base if law.has_evidence else str(law)

    @property
    def facts(self) -> Mapping[str, Hashable]:
        """What may make targets differ, by names that people know."""
        chains = self.posterior.law.chains
        still = tuple(replace(chain, steps=0) for chain in chains)
        return {
            "prior": tuple(chain.digest for chain in chains),
            **self.asked,
            "steps": tuple(chain.steps for chain in chains),
            "target": str(self.posterior.law.but(chains=still)),
        }


@dataclass(frozen=True)
class Comparison:
    """Contenders on common ground.

    :param rows: one flat-keyed mapping per contender, of JSON types; what does not exist is None.
        ``equal`` holds the figures of the runs that the budget pays for.
    :param evaluations: the budget: network rows of the cheapest contender.
    :param targets: the declared laws, by the letter rows call them.
    """

    rows: list[dict[str, Any]]
    evaluations: int
    targets: dict[str, str]
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        """Return everything in JSON types."""
        told = {name: getattr(self, name) for name in ("evaluations", "targets", "notes")}
        return {**told, "runs": self.rows}


def compare(contenders: Sequence[Contender]) -> Comparison:
    """Set two or more results side by side, as they are and at equal network evaluations.

    ``log_evidence`` (nats) is the log of the mean of ``Z`` over runs; its interval is that of the
    runs kept, with the spread of *all* runs of the contender, and missing where these disagree.
    Scores are means under the pooled weights, with the standard error over as many runs as these
    weights count. ``hamming`` is the expected number of positions at which two draws differ,
    ``root_ancestors`` the effective number in the worst living run, ``khat`` that of the pooled
    weights; ``warnings`` names what is wrong, and the notes say it: as verdicts, which begin with
    how bad it is.

    :raises CapabilityError: if one holds draws of Markov chains.
    :raises TypeError: if one is no :class:`Contender`.
    :raises ValueError: if there are fewer than two, two have one label, or one cost no rows.
    """
    for contender in contenders:
        _require_contender(contender)
    labels = [contender.label for contender in contenders]
    if len(labels) < 2 or len(set(labels)) < len(labels):
        raise ValueError(
            f"compare: give at least two results with labels of their own, got {labels}."
        )
    free = [c.label for c in contenders if c.posterior.num_evaluations <= 0]
    if free:
        raise ValueError(
            f"compare: {', '.join(free)} evaluated no network row, so that there is no cost to "
            "make equal: leave it out."
        )
    budget = min(contender.posterior.num_evaluations for contender in contenders)
    letters = _letters(contenders)
    pairs = list(zip(contenders, letters, strict=True))
    rows = [_row(contender, letter, budget) for contender, letter in pairs]
    # Reversed: of results with one letter the first has the last word.
    targets = {letter: c.posterior.target for c, letter in reversed(pairs)}
    notes = list(_notes(contenders, rows, budget))
    return Comparison(rows, budget, dict(sorted(targets.items())), notes)


def _require_contender(contender: Any) -> None:
    if not isinstance(contender, Contender):
        raise TypeError(
            f"compare: give results with labels, Contender(label, posterior), got "
            f"{type(contender).__name__}."
        )
    require_particles(contender.posterior, f"compare, {contender.label!r}")


# ----------------------------------------------------------------------------------------------
# rows


def _row(contender: Contender, letter: str, budget: int) -> dict[str, Any]:
    posterior = contender.posterior
    how, kept, overspent = _kept(contender, budget)
    return {
        "label": contender.label,
        "method": contender.method,
        "exact": posterior.exact,
        "target": letter,
        "num_particles": posterior.num_particles,
        "num_steps": posterior.num_steps,
        "num_dead_runs": int((~as_array(posterior.alive)).sum()),
        "potential_calls": posterior.num_potential_calls,
        "seconds": contender.seconds,
        "log_evidence_per_run": _runs(posterior),
        **_trust(posterior),
        **_figures(contender, posterior.num_runs, 1.0),
        "equal": {"how": how, **_figures(contender, kept, overspent)},
    }


def _runs(posterior: "ParticlePosterior") -> list[float | None]:
    if not posterior.law.has_evidence:
        return []
    return [number_or_none(value) for value in as_array(posterior.log_evidence)]


def _trust(posterior: "ParticlePosterior") -> dict[str, Any]:
    alive = as_array(posterior.alive)
    living = [size for size, lives in zip(root_ancestors(posterior), alive, strict=True) if lives]
    shape = khat(posterior.pooled_log_weights.reshape(1, -1))[0] if living else math.nan
    return {
        "root_ancestors": min(living, default=None),
        "khat": number_or_none(shape),
        "warnings": [verdict.kind for verdict in posterior.warnings],
    }


def _kept(contender: Contender, budget: int) -> tuple[str, int, float]:
    """Return how many whole runs a budget pays for, and how far one run alone overspends it."""
    runs = contender.posterior.num_runs
    exact = budget / contender.rows_per_run
    closest = math.floor(exact)
    if closest + 1 <= TOLERANCE * exact and closest + 1 - exact < exact - closest:
        closest += 1
    if closest >= runs:
        return WHOLE, runs, 1.0
    if closest == 0:
        return SCALED, 1, 1 / exact
    return SUBSAMPLED, closest, 1.0


def _figures(contender: Contender, kept: int, overspent: float) -> dict[str, Any]:
    """Return the figures of the first runs, errors scaled by the root of what they overspend."""
    posterior = contender.posterior
    weights = _pooled_weights(posterior, kept)
    values = {LOG_POTENTIAL: as_array(posterior.log_potential), **contender.scores}
    # Runs count by their evidence, so that one that holds all of it is one run.
    share = math.sqrt(overspent * float((weights.sum(-1) ** 2).sum()))
    return {
        "num_runs": kept,
        "evaluations": round(contender.rows_per_run * kept),
        **_evidence(posterior, kept, overspent),
        "ess": _ess(posterior, weights),
        **_diversity(posterior, weights),
        "scores": {name: _score(posterior, of, weights, share) for name, of in values.items()},
    }


def _pooled_weights(posterior: "ParticlePosterior", kept: int) -> NDArray[np.float64]:
    """Return weights over the first runs, each run in proportion to its evidence, ``(kept, N)``."""
    log_evidence = as_array(posterior.log_evidence)[:kept, None]
    log_w = as_array(posterior.log_weights)[:kept]
    log_w = log_w + np.where(np.isnan(log_evidence), 0.0, log_evidence)
    from scipy.special import logsumexp  # slow to import

    total = logsumexp(log_w)
    return np.exp(log_w - total) if np.isfinite(total) else np.zeros_like(log_w)


def _evidence(posterior: "ParticlePosterior", kept: int, overspent: float) -> dict[str, Any]:
    found = posterior.evidence_of(kept, overspent=overspent)
    ends = None if found is None else evidence_range(posterior.log_evidence[:kept])
    return {**evidence_figures(found), "log_evidence_range": ends}


def _ess(posterior: "ParticlePosterior", weights: NDArray[np.float64]) -> float | None:
    if not knows_ess(posterior.settings):
        return None
    return float(1 / (weights**2).sum()) if weights.any() else 0.0


def _diversity(posterior: "ParticlePosterior", weights: NDArray[np.float64]) -> dict[str, Any]:
    held = weights > 0
    if not held.any():
        return {"unique": 0, "hamming": None}
    tokens = as_array(posterior.x0.flatten(2))[: len(weights)][held]
    kinds, index = np.unique(tokens, return_inverse=True)
    is_kind = index.reshape(tokens.shape)[..., None] == np.arange(len(kinds))
    mass = np.einsum("m,mlv->lv", weights[held], is_kind)
    return {
        "unique": len(np.unique(tokens, axis=0)),
        "hamming": float((1.0 - (mass**2).sum(-1)).sum()),
    }


def _score(
    posterior: "ParticlePosterior",
    values: NDArray[np.float64],
    weights: NDArray[np.float64],
    share: float,
) -> dict[str, float | None]:
    if not weights.any():
        return {"mean": None, "se": None}
    alive = as_array(posterior.alive)
    per_run = _mean(as_array(posterior.weights)[alive], values[alive])
    with np.errstate(invalid="ignore"):  # infinite scores have no spread
        spread = per_run.std(ddof=1) if len(per_run) > 1 else math.nan
    mean = _mean(weights, values[: len(weights)]).sum()
    return {"mean": number_or_none(mean), "se": number_or_none(spread * share)}


def _mean(weights: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    # A particle of weight zero may have an infinite value, or none.
    total: NDArray[np.float64] = (weights * np.where(weights > 0, values, 0.0)).sum(-1)
    return total


# ----------------------------------------------------------------------------------------------
# what may be compared with what


def _letters(contenders: Iterable[Contender]) -> list[str]:
    targets = [contender.target for contender in contenders]
    found = list(dict.fromkeys(targets))
    names = [chr(ord("A") + n % 26) + str(n // 26 or "") for n in range(len(found))]
    return [names[found.index(target)] for target in targets]


def _notes(
    contenders: Sequence[Contender], rows: Sequence[Mapping[str, Any]], budget: int
) -> Iterable[str]:
    claims = {
        str(row["target"]): c.facts
        for c, row in zip(contenders, rows, strict=True)
        if c.posterior.law.has_evidence
    }
    if len(claims) > 1:
        yield (
            f"The targets {', '.join(claims)} {_differences(list(claims.values()))}: "
            "compare evidences of one letter only."
        )
    asked = [c.asked for c in contenders]
    if any(one != asked[0] or UNKNOWN in one.values() for one in asked):
        yield f"The results {_differences(asked)}: a higher score of one proves nothing."
    for contender in contenders:
        yield from (_of(contender.label, one) for one in contender.posterior.warnings)
    lawless = [c.label for c in contenders if not c.posterior.law.has_evidence]
    if lawless:
        yield (
            f"No law is declared for {', '.join(lawless)}: there is no evidence, and scores are "
            "those of what was found, no posterior mean."
        )
    yield from _off_budget(rows, budget)
    scaled = [str(row["label"]) for row in rows if row["equal"]["how"] == SCALED]
    if scaled:
        yield (
            f"One run of {', '.join(scaled)} costs more than the budget: that run is kept whole "
            "and its errors are scaled up as if it were the share that fits."
        )


def _of(label: str, verdict: Verdict) -> Verdict:
    """Return a verdict that says what it is about, and how bad it is."""
    return Verdict(f"{SAID[verdict.level]}: {label}: {verdict}", **vars(verdict))


def _off_budget(rows: Sequence[Mapping[str, Any]], budget: int) -> Iterable[str]:
    for row in rows:
        equal = row["equal"]
        share = equal["evaluations"] / budget
        if equal["how"] != SCALED and abs(share - 1) > OFF_BUDGET:
            yield (
                f"{row['label']} kept {equal['evaluations']} rows where the budget is {budget} "
                f"({share:.0%}): whole runs only."
            )


def _differences(targets: Sequence[Mapping[str, Hashable]]) -> str:
    """Say in what targets differ, and in what they may."""
    names = dict.fromkeys(name for target in targets for name in target)
    found = {name: {target.get(name) for target in targets} for name in names}
    known = ", ".join(name for name in names if len(found[name] - {UNKNOWN}) > 1)
    unknown = ", ".join(name for name in names if UNKNOWN in found[name])
    if not unknown:  # kernels may differ where no sentence says how
        return f"differ in {known or 'the kernels of their chains'}"
    doubt = f"{unknown}, unknown for some"
    return f"differ in {known}, and perhaps in {doubt}" if known else f"may differ in {doubt}"
