"""Sequential Monte Carlo in one scan: runs times particles, compiled once per shape.

The algorithm of :func:`ppl_diffusion.smc.engine.smc_loop`, step for step: weights accumulate
between resamplings, a run is resampled where its effective sample size falls below a threshold, and
the evidence is the product of the mean weights at these steps and at the end. Nothing calls the
host. Where 64-bit numbers are switched off the log-evidence is a compensated sum of float32
numbers (Neumaier 1974), so that its error does not grow with the number of steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from ppl_diffusion.arrays import Array
from ppl_diffusion.numpyro.noise import RESAMPLE, Noise
from ppl_diffusion.numpyro.sharding import Shards, Size
from ppl_diffusion.smc.resampling import Resampler
from ppl_diffusion.smc.twists import log_mean_exp
from ppl_diffusion.smc.weights import Weights, log_base

Carry = Any


class Particles(Protocol):
    """How particles move and what they are worth; a pytree. Arrays of a carry are ``(R, N, ...)``.

    Where particles lie on several devices, each method sees those of one.

    The weight increments are those of :mod:`ppl_diffusion.smc.feynman_kac`.
    """

    @property
    def num_steps(self) -> int:
        """Number ``T`` of steps."""
        ...

    def init(self, noise: Noise, size: Size) -> Carry:
        """Return the carry of the noisiest states."""
        ...

    def move(
        self, carry: Carry, k: Array, base: Array, noise: Noise, size: Size
    ) -> tuple[Carry, Array]:
        """Return the carry after step ``k``, and ``log K - log M``, ``(R, N)`` or 0.

        :param base: as in :meth:`look`, before the move.
        """
        ...

    def look(self, carry: Carry, k: Array, base: Array) -> tuple[Carry, Array]:
        """Return the carry and ``log h_k``, ``(R, N)``, after ``k < T`` steps.

        :param base: what each particle stands for in the law of the moves alone, ``(R, N)``.
        """
        ...

    def close(self, carry: Carry) -> Array:
        """Return ``log G`` of finished states, ``(R, N)``."""
        ...

    def record(self, carry: Carry) -> Any:
        """Return what is kept of a carry at every step, a pytree."""
        ...


class Cloud(NamedTuple):
    """What a population is worth before its particles are renewed.

    :param weights: normalised, ``(R, N)``.
    :param resampled: whether a run was resampled just now, bool ``(R,)``.
    """

    weights: Array
    resampled: Array


Renewal = Callable[[Carry, Array, Cloud, Array], tuple[Carry, Array, Any]]
"""``(carry, log h, cloud, k) -> (carry, log h, what is kept)`` after ``k`` steps, of the particles
of one device: moves what resampling has only copied, by a kernel that leaves the target alone. At
the end ``log h`` is ``log G``."""


class Trace(NamedTuple):
    """What a run leaves behind; see :class:`ppl_diffusion.smc.ParticlePosterior` for the fields.

    :param history: what was recorded, ``(T + 1, R, N, ...)`` each.
    :param renewals: what was kept of renewals after each of the ``T`` steps.
    """

    carry: Carry
    log_weights: Array
    log_potential: Array
    log_evidence_steps: Array
    ess: Array
    resampled: Array
    log_mass: Array
    ancestors: Array
    history: Any
    renewals: Any

    @classmethod
    def layout(cls, axis: str | None) -> Trace:
        """Return what is cut along an axis of a mesh, and where; all else is everywhere."""
        everywhere = dict.fromkeys(cls._fields, PartitionSpec())
        parts = {"carry": PartitionSpec(None, axis), "history": PartitionSpec(None, None, axis)}
        return cls(**{**everywhere, **parts})


class _State(NamedTuple):
    """A population between two steps."""

    carry: Carry
    log: Array
    twist: Array
    log_z: tuple[Array, Array]
    parents: Array


def run_particles(
    particles: Particles,
    noise: Noise,
    size: Size,
    resampler: Resampler,
    ess_threshold: float,
    *,
    store_path: bool = True,
    renew: Renewal = lambda carry, log_h, cloud, k: (carry, log_h, ()),
    shards: Shards = Shards(),  # noqa: B008 (frozen)
) -> Trace:
    """Move, weigh, resample. Pure: to be compiled.

    :param size: runs ``R`` and particles ``N`` of each.
    :param ess_threshold: fraction of ``N`` below which a run is resampled; 0 never does.
    :param store_path: keep what is recorded at every step, or at none.
    :param renew: renews particles after every step; by default nothing is.
    :param shards: how particles lie on devices.
    """
    last = particles.num_steps - 1
    part, whole = shards.part(size), shards.whole
    identity = jnp.broadcast_to(jnp.arange(size[1]), size)
    zero = jnp.zeros(size)
    carry, twist = particles.look(particles.init(noise, part), 0, jnp.zeros(part))
    twist = zero + whole(twist)
    start = _State(carry, twist, twist, (jnp.zeros(size[0]), jnp.zeros(size[0])), identity)
    keep = particles.record if store_path else lambda carry: jnp.zeros((0, 0))

    def weigh(state: _State, k: Array, moved: Any, ahead: Any) -> tuple[_State, Array, dict]:
        (carry, ratio, before), ahead = moved, whole(ahead)
        weights = Weights(state.log).add(whole(ratio) + ahead - state.twist)
        ess, log_z = weights.ess, _total(state.log_z)
        due = weights.alive & (ess < ess_threshold * size[1])
        out = {
            "parents": state.parents,
            "ess": ess,
            "log_z": log_z + weights.log_mean,
            "mass": log_mean_exp(before, 1),
            "kept": keep(carry),
        }
        new = _State(carry, weights.log, zero + ahead, state.log_z, identity)
        return new, due, out

    def renewed(state: _State, due: Array, k: Array) -> tuple[_State, Any]:
        # Where all are dead they count alike, as nobody is told from another.
        weights = jnp.nan_to_num(jnp.exp(Weights(state.log).log_normalised), nan=1 / size[1])
        cloud = Cloud(weights, due)
        carry, twist, kept = renew(state.carry, shards.own(state.twist), cloud, k)
        return state._replace(carry=carry, twist=whole(twist)), kept

    def step(state: _State, k: Array) -> tuple[_State, dict[str, Array]]:
        before = log_base(Weights(state.log), _total(state.log_z), state.twist)
        carry, ratio = particles.move(state.carry, k, shards.own(before), noise, part)
        carry, ahead = particles.look(carry, k + 1, shards.own(before) + ratio)
        new, due, out = weigh(state, k, (carry, ratio, before), ahead)
        new, kept = renewed(_resampled(new, due, k, noise, resampler, shards), due, k + 1)
        return new, {**out, "due": due, "renewals": kept}

    state, steps = lax.scan(step, start, jnp.arange(last))
    before = log_base(Weights(state.log), _total(state.log_z), state.twist)
    carry, ratio = particles.move(state.carry, last, shards.own(before), noise, part)
    state, due, out = weigh(state, last, (carry, ratio, before), particles.close(carry))
    state, kept_last = renewed(state, jnp.zeros_like(due), last + 1)
    final = {**out, "due": jnp.zeros_like(due), "renewals": kept_last}
    columns = jax.tree.map(lambda many, one: jnp.concatenate([many, one[None]]), steps, final)
    history = jax.tree.map(
        lambda first, rest: jnp.concatenate([first[None], rest]), keep(start.carry), columns["kept"]
    )
    return Trace(
        state.carry,
        Weights(state.log).log_normalised,
        state.twist,
        columns["log_z"].T,
        columns["ess"].T,
        columns["due"].T,
        columns["mass"].T,
        columns["parents"],
        history,
        columns["renewals"],
    )


def _resampled(
    state: _State, due: Array, k: Array, noise: Noise, scheme: Resampler, shards: Shards
) -> _State:
    """Resample the runs that are due; where none is, nothing is moved."""
    runs, particles = state.log.shape

    def resample(state: _State) -> _State:
        weights = Weights(state.log)
        u = noise.runs(RESAMPLE, k, (scheme.num_uniforms(particles),), runs)
        chosen = scheme(u, weights.log).astype(state.parents.dtype)
        parents = jnp.where(due[:, None], chosen, state.parents)
        carry = gather(shards.whole(state.carry), shards.own(parents))
        twist = gather(state.twist, parents)
        gained = jnp.where(due, weights.log_mean, 0.0)
        log = jnp.where(due[:, None], 0.0, weights.log)
        return _State(carry, log, twist, _added(state.log_z, gained), parents)

    return lax.cond(due.any(), resample, lambda same: same, state)


def gather(carry: Carry, ancestors: Array) -> Carry:
    """Return the carry of the chosen ancestors, ``(R, N)``."""
    return jax.tree.map(lambda x: jax.vmap(lambda row, a: row[a])(x, ancestors), carry)


def _added(total: tuple[Array, Array], x: Array) -> tuple[Array, Array]:
    """Add to a compensated sum; a run that is dead has a sum of -inf, and no error of it."""
    high, low = total
    new = high + x
    lost = jnp.where(abs(high) >= abs(x), (high - new) + x, (x - new) + high)
    return new, low + jnp.where(jnp.isfinite(new), lost, 0.0)


def _total(total: tuple[Array, Array]) -> Array:
    return total[0] + total[1]


def check(log_evidence_steps: Array) -> None:
    """Refuse weights that are no numbers; while a scan runs, or is compiled, nobody can.

    :param log_evidence_steps: running log-evidence, ``(R, T)``.
    :raises ValueError: if one is NaN or ``+inf``.
    """
    if isinstance(log_evidence_steps, jax.core.Tracer):
        return
    found = np.asarray(log_evidence_steps)
    worst = np.isnan(found) | (found == math.inf)
    if worst.any():
        run, step = (int(i) for i in np.argwhere(worst)[0])
        raise ValueError(
            f"a particle weight became NaN or +inf at step {step} of run {run}: the potential or a "
            "site of the program returned it; check what it does with tokens that are rare."
        )
