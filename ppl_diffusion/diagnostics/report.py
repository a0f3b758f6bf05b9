"""One page about a particle posterior: what it estimates, how well, and at what cost."""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ppl_diffusion.diagnostics.chain_report import chain_summary
from ppl_diffusion.diagnostics.claims import number_or_none
from ppl_diffusion.smc.gibbs_posterior import GibbsPosterior
from ppl_diffusion.smc.khat import khat
from ppl_diffusion.smc.run_statistics import across_run_sd, as_array, genealogical_sd
from ppl_diffusion.smc.weights import Weights

if TYPE_CHECKING:
    from rich.table import Table

    from ppl_diffusion.smc import ParticlePosterior

KHAT_LIMIT = 0.7
"""Above this k-hat weighted means are not to be trusted (Vehtari et al. 2024)."""


def summary(posterior: "ParticlePosterior | GibbsPosterior") -> dict[str, Any]:
    """Figures that say what a particle run found and how far to trust it; all JSON types.

    ``log_evidence`` (nats) is the log of the mean of ``Z`` over runs, dead runs counting as 0:
    the mean is unbiased, its log errs low. Two errors go with it, both relative errors of ``Z``
    and so, by the delta method, of its log: ``log_evidence_se`` is the standard error of the
    mean, from the spread over runs (None for one run); ``genealogical_sd`` is the standard
    deviation of a *single* run, from its family tree, or ``"degenerate"`` when a living run
    descends from one root, where the tree says nothing.

    ``ess`` is that of all particles together, runs weighted by evidence; ``khat`` the worst of
    the runs that have one. ``num_unique_x0`` counts distinct sequences and ``num_eves`` distinct
    roots among particles of positive weight. What does not exist is None, never NaN.

    ArviZ's ``rhat`` and ``ess`` across the draws of one SMC run are meaningless: the particles
    share ancestors and stand in no order. Compare runs, and read ``num_eves``, instead.

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
    }


def summary_table(posterior: "ParticlePosterior | GibbsPosterior") -> "Table":
    """The figures of :func:`summary` as a table for the terminal."""
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
    if not posterior.law.has_evidence and bool(posterior.alive.any()):
        names = ("log_evidence", "log_evidence_se", "genealogical_sd")
        return {**dict.fromkeys(names), "log_evidence_per_run": [None] * posterior.num_runs}
    log_evidence = as_array(posterior.log_evidence)
    error = across_run_sd(log_evidence) / np.sqrt(posterior.num_runs)
    tree = number_or_none(genealogical_sd(log_evidence, as_array(posterior.evidence_variance)))
    return {
        "log_evidence": number_or_none(posterior.pooled_log_evidence),
        "log_evidence_se": number_or_none(error),
        "genealogical_sd": "degenerate" if tree is None else tree,
        "log_evidence_per_run": _numbers(log_evidence),
    }


def _weight_health(posterior: "ParticlePosterior") -> dict[str, Any]:
    shapes = khat(posterior.log_weights)
    fitted = shapes[np.isfinite(shapes)]
    dead = not bool(posterior.alive.any())
    pooled = 0.0 if dead else Weights(posterior.pooled_log_weights.reshape(1, -1)).ess
    return {
        "ess": float(pooled),
        "ess_per_run": _numbers(as_array(Weights(posterior.log_weights).ess)),
        "khat": float(fitted.max()) if len(fitted) else None,
        "khat_per_run": _numbers(shapes),
    }


def _diversity(posterior: "ParticlePosterior") -> dict[str, Any]:
    held = np.isfinite(as_array(posterior.log_weights))
    sequences = as_array(posterior.x0.flatten(2))[held]
    eves = as_array(posterior.eve)
    roots = [len(np.unique(run[keep])) for run, keep in zip(eves, held, strict=True)]
    return {"num_unique_x0": len(np.unique(sequences, axis=0)), "num_eves_per_run": roots}


def _rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    total = facts["num_runs"] * facts["num_particles"]
    return [
        ("target", facts["target"]),
        ("exact weights", "yes" if facts["exact"] else "no: read the target"),
        ("runs × particles × steps", _shape(facts)),
        ("log evidence (nats)", _evidence_text(facts)),
        ("  genealogical sd of one run", _text(facts["genealogical_sd"])),
        ("effective sample size", f"{facts['ess']:.1f} of {total}"),
        ("  per run, lowest to highest", _range(facts["ess_per_run"])),
        ("worst k-hat", _khat_text(facts["khat"])),
        ("distinct x0", f"{facts['num_unique_x0']} of {total}"),
        ("Eves per run", _range(facts["num_eves_per_run"])),
        ("network evaluations", f"{facts['num_evaluations']:,}"),
        ("potential calls", f"{facts['num_potential_calls']:,}"),
        ("seconds", _text(facts["seconds"])),
    ]


def _shape(facts: dict[str, Any]) -> str:
    text = f"{facts['num_runs']} × {facts['num_particles']} × {facts['num_steps']}"
    return text + (f" ({facts['num_dead_runs']} runs dead)" if facts["num_dead_runs"] else "")


def _evidence_text(facts: dict[str, Any]) -> str:
    if facts["log_evidence"] is None and facts["num_dead_runs"] < facts["num_runs"]:
        return "none to estimate: read the target"
    if facts["log_evidence"] is None:
        return "-inf (every run is dead)"
    error = facts["log_evidence_se"]
    spread = "one run, no spread" if error is None else f"± {error:.3f} over runs"
    return f"{facts['log_evidence']:.3f} ({spread})"


def _khat_text(shape: float | None) -> str:
    if shape is None:
        return "none (no tail to fit)"
    return f"{shape:.2f}" + (f" (above {KHAT_LIMIT}: means unreliable)" * (shape > KHAT_LIMIT))


def _range(values: list[float]) -> str:
    return f"{_text(min(values))} to {_text(max(values))}" if len(values) > 1 else _text(values[0])


def _text(value: float | str | None) -> str:
    if value is None:
        return "none"
    return value if isinstance(value, str) else f"{value:.4g}"


def _numbers(values: NDArray[np.float64]) -> list[float | None]:
    return list(map(number_or_none, values))
