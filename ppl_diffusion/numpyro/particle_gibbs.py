"""Particle Gibbs for NumPyro: token sequences beside parameters in one MCMC.

Conditional SMC moves the chains of a program while everything else is held; NUTS moves the rest
while the chains are held::

    kernel = Gibbs([(ParticleGibbs(model), ["path"]), (NUTS(model), None)])   # NumPyro 0.22

Both leave the posterior of the program invariant (Andrieu, Doucet and Holenstein 2010, section
2.4.3), whatever the number of particles; few of them move the sequences rarely.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from numpyro.handlers import condition, substitute
from numpyro.infer.mcmc import MCMCKernel

from ppl_diffusion.arrays import Array
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.numpyro.conditional import RetainedParticles, sweep
from ppl_diffusion.numpyro.feynman_kac import look_ahead
from ppl_diffusion.numpyro.noise import KeyNoise
from ppl_diffusion.numpyro.plates import Elements
from ppl_diffusion.numpyro.program import read
from ppl_diffusion.smc.twists import TwistLike

Model = Callable[..., Any]


class ParticleGibbsState(NamedTuple):
    """State of :class:`ParticleGibbs`.

    :param z: the paths, ``(*plates, T + 1, L)`` by site.
    :param rng_key: random key of the next sweep.
    :param moved: share of the sequences that are not what they were, in ``[0, 1]``.
    :param ess: smallest effective sample size along the sweep, as a share of the particles.
    """

    z: dict[str, Array]
    rng_key: Array
    moved: Array
    ess: Array


class ParticleGibbs(MCMCKernel):
    """Move the chain sites of a program by conditional SMC; everything else is held.

    Alone in ``MCMC`` it serves programs whose only latents are chains; as a block of
    :class:`numpyro.infer.gibbs.Gibbs` it owns the chain sites, and other kernels the rest. With
    older versions :func:`particle_gibbs_fn` goes into ``HMCGibbs``.

    :param model: the program.
    :param num_particles: particles ``N`` of a sweep, at least 2, the retained one included.
    :param num_sweeps: sweeps per step.
    :param twist: ``"defensive"``, ``"persistent"``, ``"argmax"``, a twist, or None.
    :param ess_threshold: resample below this fraction of ``N``.
    :raises ValueError: if the settings are impossible.
    """

    sample_field = "z"

    def __init__(
        self,
        model: Model,
        *,
        num_particles: int = 32,
        num_sweeps: int = 1,
        twist: TwistLike = "defensive",
        ess_threshold: float = 0.5,
    ) -> None:
        if num_particles < 2 or num_sweeps < 1:
            raise ValueError(
                "ParticleGibbs: num_particles must be >= 2 (one of them is retained) and "
                f"num_sweeps >= 1, got {num_particles} and {num_sweeps}."
            )
        if not 0 <= ess_threshold < math.inf:
            raise ValueError(f"ParticleGibbs: ess_threshold must be >= 0, got {ess_threshold}.")
        self.model, self.twist = model, look_ahead(twist, "ParticleGibbs")
        self.num_particles, self.num_sweeps = num_particles, num_sweeps
        self.ess_threshold = ess_threshold

    @property
    def default_fields(self) -> tuple[str, ...]:
        """What ``MCMC`` collects."""
        return ("z",)

    def init(
        self,
        rng_key: Array,
        num_warmup: int,
        init_params: Mapping[str, Array] | None,
        model_args: Sequence[Any],
        model_kwargs: Mapping[str, Any] | None,
    ) -> ParticleGibbsState:
        """Start from given paths, or from draws of the chains, which the first sweep forgets.

        :raises CapabilityError: if the program has no chain, or latents that are not its chains.
        """
        if rng_key.ndim > (0 if jnp.issubdtype(rng_key.dtype, jax.dtypes.prng_key) else 1):
            raise ValueError(
                "ParticleGibbs: it takes a single random key; for several chains use "
                'chain_method="sequential" or "parallel".'
            )
        key, first = jax.random.split(rng_key)
        chains, target = read(self.model, model_args, model_kwargs or {}, first, fixed=True)
        if target.latents:
            raise CapabilityError(
                f"ParticleGibbs: it moves chains and not {', '.join(target.latents)}; make it a "
                "block of numpyro.infer.gibbs.Gibbs, with NUTS for the rest."
            )
        given = dict(init_params or {})
        for name, path in given.items():
            shape = (*chains[name].batch_shape, *chains[name].event_shape) if name in chains else ()
            if name not in chains or jnp.shape(path) != shape:
                raise ValueError(
                    f"ParticleGibbs: init_params has {name!r} of shape {jnp.shape(path)}; give "
                    f"paths of {', '.join(chains)}, as the chain draws them."
                )
        keys = dict(zip(chains, jax.random.split(first, len(chains)), strict=True))
        paths = {n: given[n] if n in given else c.sample(keys[n]) for n, c in chains.items()}
        z = {name: jnp.asarray(path) for name, path in paths.items()}
        return ParticleGibbsState(z, key, jnp.ones(()), jnp.ones(()))

    def sample(
        self,
        state: ParticleGibbsState,
        model_args: Sequence[Any],
        model_kwargs: Mapping[str, Any] | None,
    ) -> ParticleGibbsState:
        """Make the sweeps of one step."""
        key, *keys = jax.random.split(state.rng_key, 1 + self.num_sweeps)
        z, ess = state.z, []
        for one in keys:
            z, lowest = self._sweep(one, z, model_args, model_kwargs or {})
            ess.append(lowest)
        new = [(z[n][..., -1, :] != state.z[n][..., -1, :]).any(-1).astype(float) for n in z]
        moved = jnp.stack([each.mean() for each in new]).mean()
        return ParticleGibbsState(z, key, moved, jnp.stack(ess).min())

    def _sweep(
        self, key: Array, paths: Mapping[str, Array], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[dict[str, Array], Array]:
        chains, target = read(self.model, args, kwargs, key, fixed=True)
        elements = Elements.of(chains, target)
        retained = {name: elements.split(paths[name]) for name in chains}
        particles = RetainedParticles(elements.each(chains), elements, self.twist, retained)
        size = elements.count, self.num_particles
        done = sweep(particles, KeyNoise(key), size, self.ess_threshold)
        new = {name: elements.join(done.paths[name]).astype(x.dtype) for name, x in paths.items()}
        return new, done.ess.min()

    def refresh(
        self,
        state: ParticleGibbsState,
        model_args: Sequence[Any],
        model_kwargs: Mapping[str, Any] | None,
    ) -> ParticleGibbsState:
        """Return the state as it is: nothing that depends on other sites is kept."""
        return state

    def wrap_model(self, wrapper: Callable[[Model], Model]) -> Self:
        """Return a copy around the wrapped program."""
        new = copy.copy(self)
        new.model = wrapper(self.model)
        return new

    def get_constrain_fn(self, model_args: Any, model_kwargs: Any) -> Callable[[Any], Any]:
        """Return the identity: paths are what other blocks are conditioned on."""
        return lambda z: z

    def postprocess_fn(self, model_args: Any, model_kwargs: Any) -> Callable[[Any], Any]:
        """Return a function that adds the deterministic sites of the program."""

        def added(z: Mapping[str, Array]) -> dict[str, Array]:
            _, target = read(
                self.model, model_args, model_kwargs or {}, jax.random.key(0), fixed=True
            )
            x0 = {name: path[..., -1, :] for name, path in z.items()}
            found = target.run(x0)
            more = {n: s["value"] for n, s in found.items() if s["type"] == "deterministic"}
            return {**z, **more}

        return added

    def get_diagnostics_str(self, state: ParticleGibbsState) -> str:
        """Return what the progress bar shows."""
        return f"moved {float(state.moved):.2f}, ess {float(state.ess):.2f}"


def particle_gibbs_fn(
    model: Model,
    model_args: Sequence[Any] = (),
    model_kwargs: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Callable[..., dict[str, Array]]:
    """Return a ``gibbs_fn`` that moves chain sites, for :class:`numpyro.infer.HMCGibbs`.

    :param model: the program.
    :param model_args: the arguments it is run with, which ``HMCGibbs`` does not hand on.
    :param settings: those of :class:`ParticleGibbs`.

    Example::

        gibbs_fn = particle_gibbs_fn(model, (y,), num_particles=32)
        kernel = HMCGibbs(NUTS(model), gibbs_fn=gibbs_fn, gibbs_sites=["path"])
    """
    kernel = ParticleGibbs(model, **settings)

    def gibbs_fn(
        *, rng_key: Array, gibbs_sites: Mapping[str, Array], hmc_sites: Mapping[str, Array]
    ) -> dict[str, Array]:
        held = condition(substitute(model, data=dict(hmc_sites)), data=dict(hmc_sites))
        state = ParticleGibbsState(dict(gibbs_sites), rng_key, jnp.ones(()), jnp.ones(()))
        return kernel.wrap_model(lambda _: held).sample(state, model_args, model_kwargs).z

    return gibbs_fn
