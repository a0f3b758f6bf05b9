"""Chains that are drawn from a proposal, with a weight that makes up for it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import jax
import jax.numpy as jnp
from numpyro.distributions.util import validate_sample

from ppl_diffusion.arrays import Array
from ppl_diffusion.numpyro.conditional import picked
from ppl_diffusion.numpyro.engine import run_particles
from ppl_diffusion.numpyro.feynman_kac import ChainParticles, look_ahead
from ppl_diffusion.numpyro.noise import KeyNoise
from ppl_diffusion.numpyro.program import PotentialTarget
from ppl_diffusion.numpyro.reverse_chain import ReverseChain
from ppl_diffusion.numpyro.token_step import TokenStep
from ppl_diffusion.smc.resampling import Resampler, as_resampler
from ppl_diffusion.smc.twists import TwistLike

Psi = Callable[[Array, Array, Array], Array]


@dataclass(frozen=True)
class Steering:
    """How to propose one chain site by particles.

    :param potential: what to steer towards, ``x0 (*batch, L) -> log G (*batch,)`` in JAX.
    :param num_particles: particles of the run behind each draw.
    :param resampler: resampling scheme.
    :param ess_threshold: resample below this fraction of the particles.
    :param twist: ``"defensive"``, ``"persistent"``, ``"argmax"``, a twist, or None.
    """

    potential: Callable[[Array], Array]
    num_particles: int = 64
    resampler: str | Resampler = "systematic"
    ess_threshold: float = 0.5
    twist: TwistLike = "defensive"


class ProposedChain(ReverseChain):
    """A chain that handlers propose: its law is its own, its draws come from elsewhere.

    What is sampled is weighed: ``log_prob`` of a value with what sampling kept is the log of an
    importance weight ``p / q`` against the chain, so that ``numpyro.infer.util.log_density`` of a
    run of the program is a proper log-weight. ``log_prob`` of any other value is the density of the
    chain, ``-inf`` where known tokens are others.

    :param chain: the chain.
    """

    pytree_data_fields = ("held",)
    pytree_aux_fields = ("psi", "steering")

    held: Array
    psi: Psi | None
    steering: Steering | None

    @classmethod
    def of(cls, chain: ReverseChain) -> Self:
        """Return a chain that handlers can add to; one that has parts keeps them."""
        new = object.__new__(cls if not isinstance(chain, cls) else type(chain))
        parts = {"held": jnp.full_like(chain.prompt, -1), "psi": None, "steering": None}
        new.__dict__.update({**parts, **chain.__dict__})
        return new

    def holding(self, tokens: Array) -> Self:
        """Return the chain with more tokens of the clean sequence known.

        :param tokens: integers ``(L,)``, -1 where nothing is known.
        """
        new, known = copy.copy(self), jnp.asarray(tokens)
        held = jnp.where(known >= 0, known, self.held)
        new.held = jnp.broadcast_to(held, (*self.batch_shape, self.length))
        return new

    @property
    def known(self) -> Array:
        """Tokens of the clean sequence that are known."""
        return jnp.where(self.held >= 0, self.held, self.prompt)

    def proposal(self, step: TokenStep, k: Array) -> TokenStep:
        """Return the step that draws: known tokens are predicted for sure, others tilted."""
        size = self.kernel.process.vocab_size
        log_c = step.log_probs
        if self.psi is not None:
            log_c = jax.nn.log_softmax(log_c + self.psi(step.tokens, k, log_c), axis=-1)
        sure = jnp.where(jnp.arange(size) == self.held[..., None], 0.0, -jnp.inf)
        log_c = jnp.where(self.held[..., None] >= 0, sure, log_c)
        return step.predicting(log_c)

    def sample_with_intermediates(
        self, key: Array, sample_shape: tuple[int, ...] = ()
    ) -> tuple[Array, list[Any]]:
        """Draw paths from the proposal, and keep their importance weights."""
        if self.steering is not None:
            path, log_w = self._steered(key, (*sample_shape, *self.batch_shape))
            return path, [log_w]
        path, log_p, log_q = self._drawn(key, sample_shape)
        return path, [log_p - log_q]

    def _steered(self, key: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
        """Draw each path from the particles of a run of its own.

        The weight ``log Z_hat - log G(x0)`` is unbiased whatever the potential (particle-marginal
        argument: Andrieu, Doucet and Holenstein 2010, section 4.1).
        """
        assert self.steering is not None
        how, count = self.steering, math.prod(shape)
        fields = (jnp.broadcast_to(x, (*shape, self.length)) for x in (self.prompt, self.held))
        prompts, helds = (x.reshape(count, self.length) for x in fields)
        scheme, look = as_resampler(how.resampler), look_ahead(how.twist, "steer")

        def one(key: Array, prompt: Array, held: Array) -> tuple[Array, Array]:
            alone = copy.copy(self)
            alone.prompt, alone.held, alone._batch_shape = prompt, held, ()
            particles = ChainParticles({"x": alone}, PotentialTarget(how.potential, "x", 0), look)
            noise, size = KeyNoise(key), (1, how.num_particles)
            trace = run_particles(particles, noise, size, scheme, how.ess_threshold)
            states, slot = picked(trace, noise)
            log_z, log_g = trace.log_evidence_steps[0, -1], trace.log_potential[0, slot[0]]
            alive = log_z != -jnp.inf  # a dead run has log G = -inf as well: no inf - inf
            return states[0], jnp.where(alive, log_z - jnp.where(alive, log_g, 0.0), -jnp.inf)

        path, log_w = jax.vmap(one)(jax.random.split(key, count), prompts, helds)
        return path.reshape(*shape, *self.event_shape), log_w.reshape(shape)

    @validate_sample
    def log_prob(self, value: Array, intermediates: list[Any] | None = None) -> Array:
        """Return the weight of what was sampled, or the density of a value, see the class."""
        if intermediates:
            return intermediates[0]
        log_p = super().log_prob(value)
        held = (self.held < 0) | (self.x0(value) == self.held)
        return jnp.where(held.all(-1), log_p, -jnp.inf)

    def expand(self, batch_shape: tuple[int, ...]) -> ProposedChain:
        """Return the same law with larger batch dimensions (independent copies)."""
        new = copy.copy(super().expand(batch_shape))
        assert isinstance(new, ProposedChain)
        new.held = jnp.broadcast_to(self.held, (*new.batch_shape, self.length))
        return new


class UnscoredChain(ProposedChain):
    """A chain whose density is left out; its draws are weighed by nothing."""

    def log_prob(self, value: Array, intermediates: list[Any] | None = None) -> Array:
        """Return zeros, ``(*batch,)``."""
        return jnp.zeros(jnp.broadcast_shapes(jnp.shape(value)[:-2], self.batch_shape))
