"""Sequential Monte Carlo over reverse chains: the one engine under every door.

``R`` independent runs of ``N`` particles move side by side. Weights accumulate between
resampling steps, resampling happens inside a run when its effective sample size falls below a
threshold, and the evidence is the product of the mean weights at those steps and at the end:
unbiased for any number of particles, any scheme of :mod:`ppl_diffusion.smc.resampling`, any
threshold (Del Moral 2004; Chopin and Papaspiliopoulos 2020, ch. 10 and 16).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from numbers import Integral
from typing import Any, Protocol

import torch
from torch import Tensor

from ppl_diffusion.deferred import deferred_checks, refuse_if
from ppl_diffusion.kernels.blocks import compacted
from ppl_diffusion.potentials.failures import watch_failures
from ppl_diffusion.processes.noise import uniforms
from ppl_diffusion.smc.checkpoint import Stage
from ppl_diffusion.smc.feynman_kac import STATE, FeynmanKac, ends
from ppl_diffusion.smc.genealogy import degenerate, eve_indices, evidence_variance, trace_back
from ppl_diffusion.smc.late import PENDING, looking
from ppl_diffusion.smc.posterior import ParticlePosterior
from ppl_diffusion.smc.resampling import Multinomial, Resampler, as_resampler
from ppl_diffusion.smc.twists import LOG_BASE, Carry, log_mean_exp
from ppl_diffusion.smc.weights import Weights, log_base

Progress = Callable[[int, int], None]


class Engine(Protocol):
    """What the SMC loop needs from a bound Feynman-Kac model.

    An engine may have a method ``close(carry, generator, paths) -> (carry, log_twist)``, which then
    takes the place of the last ``log_twist``; ``paths()`` gives the whole paths recorded so far.
    It may have a method ``renew(carry, log_twist, k, generator) -> (carry, log_twist)``, called
    before each move: a kernel that leaves the law of the weighted states invariant, chosen before
    the run. Weights are left alone then, and the twist that is carried is replaced.
    A method ``foresee(carry, k, generator) -> (carry, k)`` prepares a carry for its next move and
    says which step that is: the last one, if nothing would be left to do after it.

    Nothing should be read back to the host inside; checks go through :mod:`ppl_diffusion.deferred`
    and are read with the decision to resample.

    Carries hold ``LOG_BASE``: what each particle stands for in the law of the moves alone.
    """

    def init(self, runs: int, particles: int, generator: Any) -> Carry: ...
    def move(self, carry: Carry, k: int, generator: Any) -> tuple[Carry, Tensor | float]: ...
    def log_twist(self, carry: Carry, k: int, generator: Any) -> Tensor | None: ...
    def gather(self, carry: Carry, ancestors: Tensor) -> Carry: ...


def run_smc(
    fk: FeynmanKac,
    num_particles: int,
    num_runs: int = 1,
    resampler: str | Resampler = "systematic",
    ess_threshold: float = 0.5,
    generator: torch.Generator | None = None,
    *,
    store_path: bool = True,
    max_rows: int | None = None,
    progress: Progress | None = None,
) -> ParticlePosterior:
    """Run SMC on a Feynman-Kac model.

    :param fk: the model.
    :param num_particles: particles ``N`` per run.
    :param num_runs: independent runs ``R``, vectorised.
    :param resampler: a name (multinomial, residual, stratified, systematic, ssp, killing) or a
        :class:`~ppl_diffusion.smc.Resampler`.
    :param ess_threshold: resample a run when its ESS falls below this fraction of ``N``; 0 never
        resamples (importance sampling), anything above 1 always does.
    :param generator: source of randomness (the global one by default).
    :param store_path: keep the states of all steps, so that paths can be read back.
    :param max_rows: largest number of rows sent to the network at once, None for what suits it.
    :param progress: called with ``(steps done, steps in all)``.
    :returns: the weighted particles. Runs in which every particle died have evidence zero and
        say at which step (``died_at``).
    :raises ValueError: on impossible settings.
    :raises PotentialError: if the potential returns NaN, ``+inf`` or a wrong shape.
    """
    fk.potential.keep_back(num_particles * num_runs)
    bound = fk.bind(max_rows=max_rows, on_events=True)
    scheme = as_resampler(resampler)
    started = time.perf_counter()
    with torch.no_grad(), watch_failures() as failures:
        trace = smc_loop(
            looking(bound),
            bound.num_steps,
            num_particles,
            num_runs,
            scheme,
            ess_threshold,
            generator,
            record=bound.record if store_path and not bound.knows_path else None,
            progress=progress,
        )
    path = bound.path(trace.carry) if store_path and bound.knows_path else trace.path()
    trace = trace.spread(fk.num_steps)
    settings = {
        **fk.settings,
        "resampler": scheme.name,
        "ess_threshold": ess_threshold,
        "num_steps": fk.num_steps,
        **({"num_rounds": bound.num_steps} if bound.knows_path else {}),
        **failures.settings(),
    }
    tokens = trace.carry["tokens"]
    posterior = ParticlePosterior(
        x0=tokens,
        times=torch.as_tensor(fk.chain.kernel.times, device="cpu"),
        samples=ends(bound.kernel, trace.carry),
        num_evaluations=bound.num_evaluations,
        num_potential_calls=bound.num_potential_calls,
        law=fk.law,
        settings=settings,
        seconds=time.perf_counter() - started,
        compact_path=path,
        **trace.posterior_fields(),
    )
    return posterior.to("cpu")  # where people look at results, whatever they ran on


@dataclass
class SMCTrace:
    """Everything a run leaves behind."""

    carry: Carry
    weights: Weights
    log_potential: Tensor
    log_evidence_steps: Tensor
    ess: Tensor
    resampled: Tensor
    ancestors: Tensor
    log_mass: Tensor
    died_at: Tensor
    multinomial: bool
    history: list[dict[str, Tensor]] = field(default_factory=list)
    eve: Tensor | None = None

    def paths(self) -> dict[str, Tensor]:
        """Return the surviving paths of what was recorded, in a compact integer type.

        :returns: ``(R, N, ..., T + 1, L)`` each.
        """
        return _paths(self.history, self.ancestors)

    def path(self, name: str = STATE) -> Tensor | None:
        """Return the surviving paths of one entry of the carry, or None if it was not recorded.

        :param name: the entry.
        """
        return self.paths().get(name)

    def posterior_fields(self) -> dict[str, Any]:
        """Return the fields of a :class:`ParticlePosterior` that the loop knows."""
        eve = eve_indices(self.ancestors) if self.eve is None else self.eve
        return {
            "log_weights": self.weights.log_normalised,
            "log_evidence": self.log_evidence_steps[:, -1],
            "log_evidence_steps": self.log_evidence_steps,
            "evidence_variance": self._evidence_variance(eve),
            "ancestors": self.ancestors,
            "eve": eve,
            "ess": self.ess,
            "resampled": self.resampled,
            "died_at": self.died_at,
            "log_mass": self.log_mass,
            "log_potential": self.log_potential,
        }

    def spread(self, num_steps: int) -> SMCTrace:
        """Return the trace with its steps spread evenly over more, between which nothing happens.

        Rounds of reveals are fewer than the steps of the grid that they stand for. States are not
        kept: whoever wants paths takes them before.

        :param num_steps: how many steps there are to be.
        """
        made = len(self.ancestors)
        if made == num_steps:
            return self
        device = self.ancestors.device
        shown = torch.arange(num_steps, device=device) * made // num_steps
        first = torch.zeros(num_steps, dtype=torch.bool, device=device)
        first[(torch.arange(made, device=device) * num_steps + made - 1) // made] = True
        stay = torch.arange(self.ancestors.shape[-1], device=device)
        died = (self.died_at.clamp_min(0) * num_steps + made - 1) // made
        return replace(
            self,
            ancestors=torch.where(first[:, None, None], self.ancestors[shown], stay),
            # A run resamples after a step, so that the population between two steps is the new one.
            resampled=self.resampled[:, shown] & torch.roll(first, -1),
            died_at=torch.where(self.died_at < 0, -1, died),
            log_evidence_steps=self.log_evidence_steps[:, shown],
            ess=self.ess[:, shown],
            log_mass=self.log_mass[:, shown],
            history=[],
            eve=eve_indices(self.ancestors),  # of the steps that were made: the others move nobody
        )

    def _evidence_variance(self, eve: Tensor) -> Tensor:
        """Return what the family tree tells, NaN where that is nothing."""
        weights = self.weights.normalised
        variance = evidence_variance(eve, weights, self.resampled)
        # Other schemes give less variance than the formula takes off: it may come out negative.
        known = ~self.resampled.any(-1) | self.multinomial
        return torch.where(known & (variance > 0) & ~degenerate(eve, weights), variance, torch.nan)


def smc_loop(
    engine: Engine,
    num_steps: int,
    num_particles: int,
    num_runs: int,
    resampler: Resampler,
    ess_threshold: float,
    generator: torch.Generator | None,
    *,
    record: str | Callable[[Carry], dict[str, Tensor]] | None = None,
    progress: Progress | None = None,
) -> SMCTrace:
    """Move, weigh, resample: the algorithm itself, over any bound model.

    :param ess_threshold: fraction of ``N`` below which a run is resampled.
    :param record: name of the carry entry whose history is kept, a function that returns what is
        kept of a carry by name, or None.
    """
    _check_settings(num_particles, num_runs, ess_threshold)
    shape = (num_runs, num_particles)
    stage = Stage(engine, generator, ("smc", num_steps, *shape))
    with deferred_checks() as checks:
        kept = stage.begun()
        if kept is None:
            kept = _start(engine, shape, generator, record)
        carry, parents, twist, k = (kept[name] for name in ("carry", "parents", "twist", "k"))
        weights, log_z, base = Weights(kept["log_w"]), kept["log_z"], kept["base"]
        log = _Log(record, **kept["log"])
        identity = torch.arange(num_particles, device=twist.device).expand(shape)

        def standing() -> dict[str, Any]:
            checks.read()
            # What was asked late has been answered by now.
            moved = {name: None if name == PENDING else x for name, x in carry.items()}
            here = {"carry": moved, "parents": parents, "twist": twist, "k": k}
            run = {"log_w": weights.log, "log_z": log_z, "base": base}
            return {**here, **run, "log": log.entries()}

        while k < num_steps:
            stage.boundary(standing)
            # What is carried was looked ahead from the future that copies still share: latents move
            # by it before each copy gets its own.
            if hasattr(engine, "renew"):
                carry, twist = engine.renew(carry, twist, k, generator)
                base, log.settled = log_base(weights, log_z, twist), False
            if hasattr(engine, "foresee"):
                carry, k = engine.foresee(carry, k, generator)
            before = base
            carry, log_ratio = engine.move({**carry, LOG_BASE: base}, k, generator)
            if isinstance(log_ratio, Tensor):
                base = base + log_ratio
            carry = {**carry, LOG_BASE: base}
            last = k + 1 == num_steps
            if last and hasattr(engine, "close"):
                so_far = partial(log.paths, carry, parents)
                carry, ahead = engine.close(carry, generator, so_far)
            else:
                ahead = engine.log_twist(carry, k + 1, generator)
            k += 1
            if progress is not None:
                progress(k, num_steps)
            if ahead is None and not isinstance(log_ratio, Tensor) and log.settled:
                log.repeat(carry, parents)
                parents = identity
                continue
            ahead = twist if ahead is None else ahead
            weights, twist = weights.add(log_ratio + ahead - twist), ahead
            _check_weights(weights, k - 1)
            due = weights.alive & (weights.ess < ess_threshold * num_particles) & (not last)
            log.add(carry, weights, log_z, parents, due, before)
            parents = identity
            (some,) = checks.read(due.any())
            if some:
                log_z = torch.where(due, log_z + weights.log_mean, log_z)
                chosen = _resample(resampler, weights, generator)
                parents = torch.where(due[:, None], chosen, identity)
                carry, twist = engine.gather(carry, parents), twist.gather(1, parents)
                weights = Weights(torch.where(due[:, None], 0.0, weights.log))
                log.settled = False
            base = log_base(weights, log_z, twist)
        stage.boundary(standing)
        return log.trace(carry, weights, twist, isinstance(resampler, Multinomial))


def _start(
    engine: Engine,
    shape: tuple[int, int],
    generator: torch.Generator | None,
    record: str | Callable[[Carry], dict[str, Tensor]] | None,
) -> dict[str, Any]:
    """Return where a loop stands before its first step."""
    carry = engine.init(*shape, generator)
    device = _device(carry)
    zeros = torch.zeros(shape, dtype=torch.float64, device=device)
    carry = {**carry, LOG_BASE: zeros}
    first = engine.log_twist(carry, 0, generator)
    twist = zeros if first is None else first
    weights, log_z = Weights(twist.clone()), twist.new_zeros(shape[0])
    base = log_base(weights, log_z, twist)
    parents = torch.arange(shape[1], device=device).expand(shape)
    run = {"log_w": weights.log, "log_z": log_z, "base": base}
    history = [] if record is None else [_kept(record, carry)]
    log = {"history": history, "ancestors": [], "steps": [], "settled": False}
    return {"carry": carry, "parents": parents, "twist": twist, "k": 0, **run, "log": log}


def _kept(record: str | Callable[[Carry], dict[str, Tensor]], carry: Carry) -> dict[str, Tensor]:
    kept = {record: carry[record]} if isinstance(record, str) else record(carry)
    return {name: compacted(tokens) for name, tokens in kept.items()}


class _Log:
    """What each step leaves behind.

    :ivar settled: whether nothing has changed the weights since the last step was noted.
    """

    def __init__(
        self,
        record: str | Callable[[Carry], dict[str, Tensor]] | None,
        history: list[dict[str, Tensor]],
        ancestors: list[Tensor],
        steps: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]],
        settled: bool,
    ) -> None:
        self.record, self.history, self.ancestors = record, history, ancestors
        self.steps, self.settled = steps, settled

    def entries(self) -> dict[str, Any]:
        """Return everything that was noted."""
        noted = {"history": self.history, "ancestors": self.ancestors, "steps": self.steps}
        return {**noted, "settled": self.settled}

    def repeat(self, carry: Carry, parents: Tensor) -> None:
        """Note a step that left all weights as they were."""
        self.ancestors.append(parents)
        self.steps.append(self.steps[-1])
        if self.record is not None:
            self.history.append(_kept(self.record, carry))

    def add(
        self,
        carry: Carry,
        weights: Weights,
        log_z: Tensor,
        parents: Tensor,
        due: Tensor,
        base: Tensor,
    ) -> None:
        """Note a step.

        :param base: what particles stood for before the move, without twists: after it the last
            one may have chosen ends by the potential itself, and rightly left out what is worth
            nothing.
        """
        self.ancestors.append(parents)
        self.settled = True
        mass = log_mean_exp(base, 1)
        self.steps.append((weights.ess, log_z + weights.log_mean, weights.alive, due, mass))
        if self.record is not None:
            self.history.append(_kept(self.record, carry))

    def paths(self, carry: Carry, parents: Tensor) -> dict[str, Tensor]:
        """Return the paths that end in a population whose step is not logged yet."""
        if self.record is None:
            return {}
        ancestors = torch.stack([*self.ancestors, parents])
        return _paths([*self.history, _kept(self.record, carry)], ancestors)

    def trace(
        self, carry: Carry, weights: Weights, log_potential: Tensor, multinomial: bool
    ) -> SMCTrace:
        columns = zip(*self.steps, strict=True)
        ess, log_evidence, alive, resampled, mass = (torch.stack(x, -1) for x in columns)
        steps_alive = alive.sum(-1)
        died = steps_alive < len(self.steps)  # the dead stay dead
        return SMCTrace(
            carry=carry,
            weights=weights,
            log_potential=log_potential,
            log_evidence_steps=log_evidence,
            ess=ess,
            resampled=resampled,
            ancestors=torch.stack(self.ancestors),
            log_mass=mass,
            died_at=torch.where(died, steps_alive, -1),
            multinomial=multinomial,
            history=self.history,
        )


def _paths(history: list[dict[str, Tensor]], ancestors: Tensor) -> dict[str, Tensor]:
    names = history[0] if history else {}
    return {name: trace_back([kept[name] for kept in history], ancestors) for name in names}


def _device(carry: Carry) -> torch.device:
    """Return where the particles are; a carry may be a dict of dicts."""
    parts = list(carry.values())
    for part in parts:  # grows by what is inside
        if isinstance(part, Tensor):
            return part.device
        parts += part.values() if isinstance(part, dict) else []
    return torch.device("cpu")


def _resample(resampler: Resampler, weights: Weights, generator: torch.Generator | None) -> Tensor:
    runs = weights.log.shape[:-1]
    shape = (*runs, resampler.num_uniforms(weights.num_particles))
    noise = uniforms(shape, generator=generator, device=weights.log.device)
    return _checked(resampler(noise, weights.log), resampler, weights)


def _checked(ancestors: Tensor, resampler: Resampler, weights: Weights) -> Tensor:
    """Refuse what names no particles: a scheme may be anybody's."""
    shape, num = tuple(weights.log.shape), weights.num_particles

    def complaint(got: str) -> ValueError:
        return ValueError(
            f"the resampler {type(resampler).__name__} returned {got}; return the index of a "
            f"particle, 0 to {num - 1}, for each new one: int64 {shape}."
        )

    if not isinstance(ancestors, Tensor):
        raise complaint(type(ancestors).__name__)
    if ancestors.dtype != torch.int64 or tuple(ancestors.shape) != shape:
        raise complaint(f"{ancestors.dtype} {tuple(ancestors.shape)}")
    outside = ((ancestors < 0) | (ancestors >= num)).any()
    refuse_if(outside, lambda: complaint("indices of no particle"))
    return ancestors.clamp(0, num - 1)  # so that the device lives until the check is read


def _check_settings(num_particles: int, num_runs: int, ess_threshold: float) -> None:
    whole = all(isinstance(n, Integral) for n in (num_particles, num_runs))
    if not whole or num_particles < 1 or num_runs < 1:
        raise ValueError(
            "num_particles and num_runs must be >= 1 and whole, "
            f"got {num_particles} and {num_runs}."
        )
    if not math.isfinite(ess_threshold) or ess_threshold < 0:
        raise ValueError(f"ess_threshold must be a number >= 0, got {ess_threshold}.")


def _check_weights(weights: Weights, k: int) -> None:
    refuse_if(
        (torch.isnan(weights.log) | (weights.log == math.inf)).any(),
        lambda: ValueError(
            f"a particle weight became NaN or +inf at step {k}: the proposal drew a state the "
            "model allows but the proposal's own density excludes, or returned NaN; check it."
        ),
    )
