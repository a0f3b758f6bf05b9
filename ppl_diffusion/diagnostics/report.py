"""One page about a particle posterior: what it estimates, how well, and at what cost."""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ppl_diffusion.diagnostics.chain_report import chain_summary
from ppl_diffusion.diagnostics.claims import (
    EVIDENCE,
    claim,
    evidence_figures,
    evidence_text,
    knows_ess,
    number_or_none,
)
from ppl_diffusion.smc.gibbs_posterior import GibbsPosterior
from ppl_diffusion.smc.khat import khat
from ppl_diffusion.smc.run_statistics import as_array, effective_distinct, genealogical_sd
from ppl_diffusion.smc.weights import Weights

if TYPE_CHECKING:
    from rich.table import Table

    from ppl_diffusion.smc import ParticlePosterior

NOT_KNOWN = "not available"


def summary(posterior: "ParticlePosterior | GibbsPosterior") -> dict[str, Any]:
    """Figures that say what a particle run found and how far to trust it; all JSON types.

    ``log_evidence`` (nats) is the log of the mean of ``Z`` over runs, dead runs counting as 0:
    the mean is unbiased, its log errs low. ``log_evidence_interval`` (nominal 95 %) is there
    where runs agree, and their agreement means something; where they do not,
    ``log_evidence_bound`` is what the log-evidence is no less than at 95 %. ``log_evidence_sd`` is
    the spread of the living runs.
    ``genealogical_sd`` is the relative standard deviation of a *single* run's ``Z``, from its
    family tree; None where that tells nothing (most runs: see ``evidence_variance``).

    ``ess`` and ``khat`` are those of all particles together, runs weighted by evidence; of refined
    results, whose states are correlated, no ``ess`` is known.
    ``num_unique_x0`` counts distinct sequences and ``num_eves`` distinct roots among particles of
    positive weight; ``root_ancestors`` weighs them: a run that lives on one has 1. ``warnings`` are
    the sentences of ``posterior.warnings``. What does not exist is None, never NaN.

    ArviZ's ``rhat`` and ``ess`` across the draws of one SMC run are meaningless: the particles
    share ancestors and stand in no order. Compare runs, and read
    ``root_ancestors``, instead.

    :param posterior: ``R`` runs of ``N`` particles.
    :returns: a flat dict; keys ending in ``_per_run`` hold lists of length ``R``. For draws of
        :class:`~ppl_diffusion.inference.ParticleGibbs`, what :func:`chain_summary` returns.
    """
    if isinstance(posterior, GibbsPosterior):
        return chain_summary(posterior)
    weights = as_array(posterior.log_weights)
    return {
        "target": posterior.target,
        "exact": posterior.exact,
        "num_runs": posterior.num_runs,
        "num_dead_runs": int((~np.isfinite(weights).any(-1)).sum()),
        "num_particles": posterior.num_particles,
        "num_steps": posterior.num_steps,
        **_evidence(posterior),
        **_weight_health(posterior),
        **_diversity(posterior),
        "num_evaluations": posterior.num_evaluations,
        "num_potential_calls": posterior.num_potential_calls,
        "seconds": number_or_none(posterior.seconds),
        "warnings": list(map(str, posterior.warnings)),
    }


def summary_table(posterior: "ParticlePosterior | GibbsPosterior") -> "Table":
    """The figures of :func:`summary` as a table for the terminal, what is wrong below them."""
    from rich.table import Table
    from rich.text import Text

    facts = summary(posterior)
    is_chains = isinstance(posterior, GibbsPosterior)
    table = Table("quantity", "value", title="Markov chains" if is_chains else "Particle posterior")
    plain = [(name.replace("_", " "), str(value)) for name, value in facts.items()]
    for quantity, value in plain if is_chains else _rows(facts):
        table.add_row(Text(quantity), Text(value))
    return table


def _evidence(posterior: "ParticlePosterior") -> dict[str, Any]:
    found = posterior.evidence
    if found is None:
        nothing = dict.fromkeys((*EVIDENCE, "genealogical_sd"))
        return {**nothing, "log_evidence_per_run": [None] * posterior.num_runs}
    log_evidence = as_array(posterior.log_evidence)
    tree = genealogical_sd(log_evidence, as_array(posterior.evidence_variance))
    return {
        **evidence_figures(found),
        "genealogical_sd": number_or_none(tree),
        "log_evidence_per_run": _numbers(log_evidence),
    }


def _weight_health(posterior: "ParticlePosterior") -> dict[str, Any]:
    dead = not bool(posterior.alive.any())
    pooled = None if dead else posterior.pooled_log_weights.reshape(1, -1)
    found = {
        "ess": 0.0 if pooled is None else float(Weights(pooled).ess),
        "ess_per_run": _numbers(as_array(Weights(posterior.log_weights).ess)),
    }
    if not knows_ess(posterior.settings):
        found = {"ess": None, "ess_per_run": [None] * posterior.num_runs}
    return {
        **found,
        "khat": None if pooled is None else number_or_none(khat(pooled)[0]),
        "khat_per_run": _numbers(khat(posterior.log_weights)),
    }


def _diversity(posterior: "ParticlePosterior") -> dict[str, Any]:
    held = np.isfinite(as_array(posterior.log_weights))
    sequences = as_array(posterior.x0.flatten(2))[held]
    eves = as_array(posterior.eve)
    roots = [len(np.unique(run[keep])) for run, keep in zip(eves, held, strict=True)]
    return {
        "num_unique_x0": len(np.unique(sequences, axis=0)),
        "num_eves_per_run": roots,
        "root_ancestors_per_run": root_ancestors(posterior),
    }


def root_ancestors(posterior: "ParticlePosterior") -> list[float]:
    """Effective number of roots of each run, 0 for a dead one."""
    weights, alive = as_array(posterior.weights), as_array(posterior.alive)
    found = np.zeros(len(alive))
    found[alive] = effective_distinct(as_array(posterior.eve)[alive], weights[alive])
    return found.tolist()


def pooled_root_ancestors(posterior: "ParticlePosterior") -> float:
    """Effective number of roots of all runs together, runs weighted by evidence; 0 if all died."""
    if not bool(posterior.alive.any()):
        return 0.0
    eve = as_array(posterior.eve)
    roots = eve + posterior.num_particles * np.arange(len(eve))[:, None]
    weights = as_array(posterior.pooled_log_weights.exp())
    return float(effective_distinct(roots.reshape(1, -1), weights.reshape(1, -1))[0])


def _rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    total = facts["num_runs"] * facts["num_particles"]
    alive = facts["num_dead_runs"] < facts["num_runs"]
    return [
        claim(facts),
        ("runs × particles × steps", _shape(facts)),
        ("log evidence (nats)", evidence_text(facts, alive=alive)),
        ("  genealogical sd of one run", _text(facts["genealogical_sd"], NOT_KNOWN)),
        ("effective sample size", _ess(facts["ess"], total)),
        ("  per run, lowest to highest", _range(facts["ess_per_run"])),
        ("k-hat of all particles", _text(facts["khat"], NOT_KNOWN)),
        ("distinct x0", f"{facts['num_unique_x0']} of {total}"),
        ("effective root ancestors per run", _range(facts["root_ancestors_per_run"])),
        ("network evaluations", f"{facts['num_evaluations']:,}"),
        ("potential calls", f"{facts['num_potential_calls']:,}"),
        ("seconds", _text(facts["seconds"])),
        *[("warning", text) for text in facts["warnings"] or ["none"]],
    ]


def _shape(facts: dict[str, Any]) -> str:
    text = f"{facts['num_runs']} × {facts['num_particles']} × {facts['num_steps']}"
    return text + (f" ({facts['num_dead_runs']} runs dead)" if facts["num_dead_runs"] else "")


def _ess(value: float | None, total: int) -> str:
    return NOT_KNOWN if value is None else f"{value:.1f} of {total}"


def _range(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return NOT_KNOWN
    return f"{_text(min(known))} to {_text(max(known))}" if len(known) > 1 else _text(known[0])


def _text(value: float | None, missing: str = "none") -> str:
    return missing if value is None else f"{value:.4g}"


def _numbers(values: NDArray[np.float64]) -> list[float | None]:
    return list(map(number_or_none, values))
