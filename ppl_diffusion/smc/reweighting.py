"""A finished run for another potential, temperature or observation.

Each particle's weight is multiplied by ``G'/G`` and the evidence by its weighted mean::

    log W' = log W + Delta,    log Z' = log Z + log sum_i W_i exp(Delta_i),    Delta = log(G' / G)

``exp(log Z')`` is unbiased for the new normalising constant, however the run was resampled, if
``G' > 0`` implies ``G > 0``: a particle filter's ``Z sum_i W_i phi(x_i)`` is unbiased for the
unnormalised integral of any ``phi``, here ``G'/G`` (Del Moral 2004, Feynman-Kac Formulae, theorem
7.4.2). What the old potential excluded cannot come back. The ratio of the two evidences shares the
run's error, so its error must come from the spread over runs.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ppl_diffusion.arrays import json_types
from ppl_diffusion.errors import CapabilityError, ParticleCollapse, PotentialError
from ppl_diffusion.potentials.base import AbstractPotential, Potential
from ppl_diffusion.smc.evaluated_potential import EvaluatedPotential
from ppl_diffusion.smc.feynman_kac import per_particle
from ppl_diffusion.smc.khat import khat
from ppl_diffusion.smc.law import Law, Tilt
from ppl_diffusion.smc.origin import Origin, Scored
from ppl_diffusion.smc.weights import Weights

MAX_KHAT = 0.7
"""Above this k-hat of all weights together, where their ESS is below half, means are not known."""
MIN_ESS, MIN_ESS_SHARE = 10.0, 0.02
"""Least effective sample size of a run, in particles and as a share of them."""
MIN_ROOTS = 2.0
"""Least effective number of root ancestors of a run that was resampled."""

# Known by its fields: naming the class, whose ``reweight`` this file is, would close a circle.
ParticlePosterior = Any


@dataclass(frozen=True)
class Target:
    """The new target on the particles of a run.

    :param log_g: its ``log G`` of each particle, ``(R, N)``.
    :param tilts: what it is called.
    :param num_calls: sequences or particles that were asked about.
    :param changes: other fields of the result that change.
    """

    log_g: Tensor
    tilts: tuple[Tilt, ...]
    num_calls: int = 0
    changes: Mapping[str, Any] | None = None


def reweight(
    posterior: ParticlePosterior,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    temperature: float,
    force: bool,
) -> ParticlePosterior:
    """Return a result for another potential (see :meth:`ParticlePosterior.reweight`)."""
    temperature = _positive(temperature)
    new = _new_target(posterior, args, kwargs, temperature)
    old_g, alive = posterior.log_potential, posterior.log_weights > -torch.inf
    excluded = (old_g == -torch.inf) & (new.log_g > -torch.inf)
    # A particle that both exclude is no 0 / 0: it had, and has, no weight.
    delta = torch.where(alive, new.log_g - torch.where(alive, old_g, 0.0), 0.0)
    weights = Weights(torch.where(alive, posterior.log_weights + delta, -torch.inf))
    changed = _with_weights(posterior, weights, new)
    reasons = _reasons(posterior, changed, int(excluded.sum()))
    if reasons and not force:
        raise CapabilityError(
            f"reweight: {'; '.join(reasons)}; run the inference again for the new target, or pass "
            "force=True to look at the numbers all the same."
        )
    return _described(posterior, changed, reasons, temperature, bool(excluded.any()))


def _positive(temperature: Any) -> float:
    # Below zero it would turn the question round: that is another potential, -log G.
    with contextlib.suppress(TypeError, ValueError, RuntimeError):
        if temperature is not True and math.isfinite(temperature) and temperature > 0:
            return float(temperature)
    raise ValueError(
        f"reweight: temperature must be a positive, finite number, got {temperature!r}."
    )


def _new_target(
    posterior: ParticlePosterior,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    temperature: float,
) -> Target:
    if posterior.is_program and args and isinstance(args[0], AbstractPotential):
        raise TypeError(
            "reweight: a program is its own potential; give it new arguments, such as other "
            "observations, or a temperature."
        )
    if not args and not kwargs:
        new = Target(posterior.log_potential, posterior.law.tilts)
    elif posterior.is_program:
        new = _of_program(posterior, args, kwargs)
    else:
        new = _of_potential(posterior, _only_potential(args, kwargs))
    if temperature == 1:
        return new
    tilts = [replace(tilt, of=f"({tilt.of}) / {temperature:g}") for tilt in new.tilts]
    return replace(new, log_g=new.log_g / temperature, tilts=tuple(tilts))


def _only_potential(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    given = [*args, *kwargs.values()]
    if len(given) == 1 and set(kwargs) <= {"potential"}:
        return given[0]
    names = [*(f"argument {i}" for i in range(1, len(args) + 1)), *kwargs]
    raise TypeError(
        "reweight: the result of a bare chain takes one new potential or a temperature, and has "
        f"no program whose arguments could change; it got {', '.join(names)}."
    )


def _of_potential(posterior: ParticlePosterior, potential: Any) -> Target:
    known = potential if isinstance(potential, AbstractPotential) else Potential(potential)
    asked = EvaluatedPotential(known)
    with torch.no_grad():
        log_g = per_particle(asked(posterior.x0)).to(posterior.x0.device)
    return Target(log_g, (Tilt.by(known),), asked.num_calls)


def _of_program(
    posterior: ParticlePosterior, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Target:
    old: Origin = posterior.require_origin("reweight")
    before = old.num_calls
    with _at_new_arguments(old.name):
        new = old.at(args, kwargs)
    _require_same_chains(old.law, new.law)
    sites = {name: value.flatten(0, 1) for name, value in posterior.program_sites().items()}
    was = old.score(sites)
    with _at_new_arguments(old.name):
        now = new.score(sites)
    _require_same_conditions(was, now)
    shape = posterior.log_weights.shape
    # The law r that latents were drawn from is in the old log G, and stays.
    change = now.log_density - was.log_density
    possible = was.log_density > -torch.inf
    log_g = posterior.log_potential + torch.where(possible, change, 0.0).reshape(shape)
    # Where the old density was 0 nothing is known of r; what matters is whether this one is, too.
    log_g = torch.where(possible.reshape(shape), log_g, now.log_density.reshape(shape))
    values = {n: v.reshape(*shape, *v.shape[1:]) for n, v in now.values.items()}
    changes = {
        "samples": {
            **posterior.samples,
            **{n: values[n] for n in values if n in posterior.samples},
        },
        "origin": new,
        "plates": new.plates,
    }
    calls = old.num_calls - before + new.num_calls
    return Target(log_g, new.law.tilts, calls, changes)


@contextlib.contextmanager
def _at_new_arguments(name: str) -> Iterator[None]:
    """Say of whatever a program fails with that it is the new arguments it fails at."""
    try:
        yield
    except CapabilityError:
        raise
    except Exception as error:
        kinds = (PotentialError, TypeError, ValueError)
        kind = next((kind for kind in kinds if isinstance(error, kind)), ValueError)
        reason = str(error).strip().partition("\n")[0].rstrip(".") or "no reason given"
        raise kind(
            f"reweight: {name} does not run at these arguments ({type(error).__name__}: {reason}); "
            "give all of its arguments, and data of a shape that it takes, without NaN."
        ) from error


def _require_same_chains(old: Law, new: Law) -> None:
    if (old.chains, old.latents) != (new.chains, new.latents):
        raise CapabilityError(
            "reweight: with these arguments the program has other chains, clamps or latents, which "
            "its particles were not drawn from; run the inference again."
        )


def _require_same_conditions(old: Scored, new: Scored) -> None:
    for name, value in new.conditions.items():
        if not torch.allclose(old.conditions[name].double(), value.double(), rtol=1e-4, atol=1e-5):
            chain, condition = name.split(":")[1:]
            raise CapabilityError(
                f"reweight: with these arguments the chain {chain!r} is given another "
                f"{condition!r}, under which its particles did not move; run the inference again."
            )


def _with_weights(posterior: ParticlePosterior, weights: Weights, new: Target) -> ParticlePosterior:
    log_z = posterior.log_evidence + weights.log_sum
    died = ~weights.alive & (posterior.died_at < 0)
    steps, ess = posterior.log_evidence_steps.clone(), posterior.ess.clone()
    steps[:, -1], ess[:, -1] = log_z, weights.ess
    last = torch.full_like(posterior.died_at, posterior.num_steps - 1)
    return replace(
        posterior,
        log_weights=weights.log_normalised,
        log_evidence=log_z,
        log_evidence_steps=steps,
        ess=ess,
        died_at=torch.where(died, last, posterior.died_at),
        log_potential=new.log_g,
        evidence_variance=torch.full_like(posterior.evidence_variance, torch.nan),
        num_potential_calls=posterior.num_potential_calls + new.num_calls,
        law=posterior.law.but(tilts=new.tilts),
        **(new.changes or {}),
    )


def _reasons(old: ParticlePosterior, new: ParticlePosterior, num_excluded: int) -> list[str]:
    """Return why the new weights are not to be used."""
    if not bool(new.alive.any()):
        raise ParticleCollapse(
            "reweight: no particle of the run meets the new potential; run the inference again."
        )
    reasons = []
    if not old.exact:
        reasons.append("the weights of this run are exact for no law, so none can follow from them")
    if num_excluded:
        reasons.append(
            f"{num_excluded} particles that the new potential allows were excluded by the old one, "
            "and others like them never got here"
        )
    # What is broken before cannot be mended by weights.
    broken = [v for v in getattr(old, "warnings", ()) if getattr(v, "level", "") == "broken"]
    reasons += [f"the run itself is not to be used ({verdict})" for verdict in broken]
    return reasons + _of_weights(new)


def _of_weights(new: ParticlePosterior) -> list[str]:
    reasons = []
    pooled = new.pooled_log_weights.reshape(1, -1)
    shape, ess = float(khat(pooled)[0]), float(Weights(pooled).ess)
    if shape > MAX_KHAT and ess < pooled.numel() / 2:
        reasons.append(f"k-hat of the new weights is {shape:.2f} (limit {MAX_KHAT})")
    least = max(MIN_ESS, MIN_ESS_SHARE * new.num_particles)
    worst = float(Weights(new.log_weights).ess[new.alive].min())
    if worst < least:
        reasons.append(
            f"the effective sample size of a run falls to {worst:.1f} of {new.num_particles} "
            f"particles (limit {least:g})"
        )
    resampled = new.alive & new.resampled.any(-1)
    roots = _effective_roots(new)[resampled]
    if len(roots) and float(roots.min()) < MIN_ROOTS:
        reasons.append(
            f"the particles of a run go back to {float(roots.min()):.1f} root ancestors "
            f"(limit {MIN_ROOTS:g})"
        )
    return reasons


def _effective_roots(posterior: ParticlePosterior) -> Tensor:
    """Return ``1 / sum over roots (their weight)^2``, one per run."""
    shares = torch.zeros_like(posterior.weights).scatter_add(1, posterior.eve, posterior.weights)
    total = (shares**2).sum(-1)
    return torch.where(total > 0, 1 / total.clamp_min(1e-300), 0.0)


def _described(
    old: ParticlePosterior,
    new: ParticlePosterior,
    reasons: list[str],
    temperature: float,
    is_loosened: bool,
) -> ParticlePosterior:
    """Return the result with what was done in its settings, and a law that says no more."""
    ratio = new.log_evidence - old.log_evidence
    pooled = new.pooled_log_evidence - old.pooled_log_evidence
    known: dict[str, Any] = {"target": old.target, "temperature": temperature, "forced": reasons}
    settings = {
        **old.settings,
        "reweighted_from": json_types(known),
        "log_evidence_ratio": ratio.tolist(),
        "log_evidence_ratio_pooled": pooled,
    }
    law = new.law
    if is_loosened:
        law = law.but(exact=False, why="sequences that the old potential excluded are missing")
    return replace(new, settings=settings, law=law)
