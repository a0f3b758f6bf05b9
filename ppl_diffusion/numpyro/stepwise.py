"""Particles over a program written as one step with an explicit carry, as in NumPyro's ``scan``.

Resampling in the middle of a program is sound where everything that goes on sits in what is
resampled. Here that is the carry: a program hands it from step to step, and the engine of all other
methods moves, weighs and resamples it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from numpyro.handlers import block, trace
from numpyro.primitives import Messenger

from ppl_diffusion.arrays import Array
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.numpyro.engine import Carry, Size, check, run_particles
from ppl_diffusion.numpyro.noise import MOVE, KeyNoise, Noise
from ppl_diffusion.numpyro.program import require_whole_plates, total_log_prob
from ppl_diffusion.smc.resampling import Resampler, as_resampler

Step = Callable[[Carry, Any], tuple[Carry, Any]]
"""``(carry, x) -> (carry, y)`` of one particle."""


class ScanPosterior(NamedTuple):
    """``R`` runs of ``N`` weighted particles after the last step; arrays of JAX.

    :param carry: what each particle ends with, ``(R, N, ...)``.
    :param log_weights: normalised in each run, ``(R, N)``; all ``-inf`` in a dead run.
    :param log_evidence: ``(R,)``; ``exp`` of it is unbiased for the probability of what was
        observed, and ``-inf`` in a dead run.
    :param log_evidence_steps: the same of what was observed up to each step, ``(R, T)``.
    :param ess: effective sample size after each step, before resampling, ``(R, T)``.
    :param resampled: whether the run was resampled after each step, ``(R, T)``.
    :param ancestors: ``(T, R, N)``: the parent, in the population after the step before, of each
        particle of a step.
    :param ys: what each step returned beside its carry, before resampling, ``(T, R, N, ...)``.
    """

    carry: Carry
    log_weights: Array
    log_evidence: Array
    log_evidence_steps: Array
    ess: Array
    resampled: Array
    ancestors: Array
    ys: Any

    @property
    def paths(self) -> Any:
        """What the steps of each final particle's own lineage returned, ``(R, N, T, ...)``."""

        def back(slots: Array, parents: Array) -> tuple[Array, Array]:
            return jnp.take_along_axis(parents, slots, -1), slots

        last = jnp.broadcast_to(jnp.arange(self.ancestors.shape[-1]), self.ancestors.shape[1:])
        _, slots = lax.scan(back, last, self.ancestors, reverse=True)
        chosen = jax.vmap(jax.vmap(lambda y, row: y[row]))
        return jax.tree.map(lambda y: jnp.moveaxis(chosen(y, slots), 0, 2), self.ys)


def smc_scan(
    f: Step,
    init: Carry,
    xs: Any,
    length: int | None = None,
    *,
    key: Array,
    num_particles: int = 64,
    num_runs: int = 1,
    resampler: str | Resampler = "ssp",
    ess_threshold: float = 0.5,
) -> ScanPosterior:
    """Scan a program over the leading axis of ``xs`` with particles: ``scan``, resampled.

    ``f`` is what :func:`numpyro.contrib.control_flow.scan` takes: a step with sample sites. Those
    that have a value, and factors, weigh a particle; all others are drawn from their own law. A
    better proposal ``q`` is a site that is drawn from it, and a factor ``log p - log q``. Whatever
    one step tells the next must go through the carry. Pure JAX: it can be compiled, or mapped over
    keys, inside of a larger function.

    :param f: ``(carry, x) -> (carry, y)``. Compiled once for each function: one that is made anew
        is compiled anew.
    :param init: the carry of every particle before the first step, a pytree, as for one particle.
    :param xs: a pytree of arrays ``(T, ...)``, or None.
    :param length: number ``T`` of steps; needed where ``xs`` is None.
    :param key: a JAX random key. Particle ``n`` draws the same however many others there are.
    :param num_particles: particles ``N`` per run.
    :param num_runs: independent runs ``R``, side by side.
    :param resampler: a name, or a :class:`~ppl_diffusion.smc.Resampler`.
    :param ess_threshold: resample a run when its ESS falls below this fraction of ``N``.
    :raises CapabilityError: if a site that is drawn is scaled.
    :raises ValueError: if the settings are impossible, the step returns another carry than it
        takes, or a weight became NaN or ``+inf`` (not where it is compiled in a larger function).

    Example::

        def step(level, y):
            level = numpyro.sample("level", dist.Normal(level, 0.1))
            numpyro.sample("y", dist.Normal(level, 1.0), obs=y)
            return level, level

        smc_scan(step, 0.0, ys, key=jax.random.key(0)).log_evidence
    """
    steps = _num_steps(xs, length)
    if num_particles < 1 or num_runs < 1:
        raise ValueError(
            f"smc_scan: num_particles and num_runs must be >= 1, got {num_particles}, {num_runs}."
        )
    if not 0 <= ess_threshold < math.inf:
        raise ValueError(f"smc_scan: ess_threshold must be >= 0, got {ess_threshold}.")
    start = jax.tree.map(jnp.asarray, init)
    particles = StepParticles(f, start, xs, steps)
    scheme, size = as_resampler(resampler), (num_runs, num_particles)
    posterior: ScanPosterior = _compiled(particles, KeyNoise(key), size, scheme, ess_threshold)
    check(posterior.log_evidence_steps)
    return posterior


def _num_steps(xs: Any, length: int | None) -> int:
    lengths = {int(x.shape[0]) for x in jax.tree.leaves(xs)} | ({length} if length else set())
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(
            f"smc_scan: xs and length must agree on one number of steps, got {sorted(lengths)}."
        )
    return lengths.pop()


class StepParticles(eqx.Module):
    """Particles that move by a step of a program.

    :param step: the program.
    :param start: the carry of one particle before the first step.
    :param xs: what each step is given, ``(T, ...)``.
    :param num_steps: number ``T`` of steps.
    """

    step: Step
    start: Carry
    xs: Any
    num_steps: int = eqx.field(static=True)

    def init(self, noise: Noise, size: Size) -> tuple[Carry, Any]:
        """Return the start of all particles, and something of the shape of what steps return."""
        x = jax.tree.map(lambda x: x[0], self.xs)
        state, y, _ = jax.eval_shape(self._run, jax.random.key(0), self.start, x)
        _require_same(self.start, state)
        every = jax.tree.map(lambda x: jnp.broadcast_to(x, (*size, *x.shape)), self.start)
        return every, jax.tree.map(lambda y: jnp.zeros((*size, *y.shape), y.dtype), y)

    def move(
        self, carry: tuple[Carry, Any], k: Array, base: Array, noise: Noise, size: Size
    ) -> tuple[tuple[Carry, Any], Array]:
        """Run step ``k`` of all particles, and weigh them by what it observes."""
        x = jax.tree.map(lambda x: x[k], self.xs)
        every = jax.vmap(jax.vmap(partial(self._run, x=x)))
        state, y, log_g = every(noise.keys(MOVE, k, size), carry[0])
        return (state, y), log_g

    def _run(self, key: Array, state: Carry, x: Any) -> tuple[Carry, Any, Array]:
        """Run a step of one particle and return the log-density of what it observed."""
        with block(), trace() as sites, _Seeded(key):  # the sites are those of this step alone
            state, y = self.step(state, x)
        require_whole_plates(sites, "smc_scan")
        given = []
        for site in (site for site in sites.values() if site["type"] == "sample"):
            if site["is_observed"] or site["kwargs"]["rng_key"] is None:  # nobody drew it
                given.append(site)
            elif site["scale"] is not None:
                raise CapabilityError(
                    f"smc_scan: the site {site['name']!r} is scaled, so that its density is "
                    "another one than what it is drawn from; leave the scale out."
                )
        return *jax.tree.map(jnp.asarray, (state, y)), total_log_prob(given)

    def look(
        self, carry: tuple[Carry, Any], k: Array, base: Array
    ) -> tuple[tuple[Carry, Any], Array]:
        """Look at nothing: a factor of the program may."""
        return carry, jnp.zeros(())

    def close(self, carry: tuple[Carry, Any]) -> Array:
        """Return nothing: all was weighed step by step."""
        return jnp.zeros(())

    def record(self, carry: tuple[Carry, Any]) -> Any:
        """Return what the last step returned beside its carry."""
        return carry[1]


class _Seeded(Messenger):
    """Give each site a key, the first one the particle's own.

    NumPyro's ``seed`` splits it for each, which for many particles costs more than what is drawn.
    Later sites count down from the end of what may be folded in, where no draw of the first gets.
    """

    def __init__(self, key: Array) -> None:
        super().__init__(None)
        self.key, self.left = key, 2**32

    def process_message(self, msg: Any) -> None:
        """Give a site its key, see ``numpyro.handlers.seed``."""
        asks = msg["type"] in ("sample", "prng_key", "plate", "control_flow")
        if not asks or msg["kwargs"]["rng_key"] is not None or msg["value"] is not None:
            return
        first = self.left == 2**32
        self.left -= 1
        msg["kwargs"]["rng_key"] = self.key if first else jax.random.fold_in(self.key, self.left)


def _require_same(start: Carry, after: Carry) -> None:
    before = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), start)
    after = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), after)
    if before != after:
        raise ValueError(
            f"smc_scan: the step takes a carry of {before} and returns one of {after}; both must "
            "have the same structure, shapes and types (an init of 0.0, say, in place of 0)."
        )


@eqx.filter_jit
def _compiled(
    particles: StepParticles,
    noise: KeyNoise,
    size: Size,
    resampler: Resampler,
    ess_threshold: float,
) -> ScanPosterior:
    run = run_particles(particles, noise, size, resampler, ess_threshold)
    # What is left out here is not computed either.
    return ScanPosterior(
        carry=run.carry[0],
        log_weights=run.log_weights,
        log_evidence=run.log_evidence_steps[:, -1],
        log_evidence_steps=run.log_evidence_steps,
        ess=run.ess,
        resampled=run.resampled,
        ancestors=run.ancestors,
        ys=jax.tree.map(lambda y: y[1:], run.history),
    )
