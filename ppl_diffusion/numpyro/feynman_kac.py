"""Particles of a program with reverse chains: how they move, look ahead, and what weighs them.

All chains of a program go in lockstep. Latents are drawn once, before the chains, from their law
``r``; those whose law depends on a sequence are drawn from it whenever they are asked for, by noise
that a particle keeps. They look ahead by completions
(:mod:`ppl_diffusion.smc.twists`): the likeliest one, some with noise that a particle hands on to
its children, and a floor under both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

import equinox as eqx
import jax
import jax.numpy as jnp

from ppl_diffusion.arrays import Array
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.numpyro.engine import Cloud, Size
from ppl_diffusion.numpyro.latent_moves import Mover, Spot
from ppl_diffusion.numpyro.noise import FILL, MOVE, Noise
from ppl_diffusion.numpyro.reverse_chain import ReverseChain
from ppl_diffusion.numpyro.sharding import Shards
from ppl_diffusion.numpyro.token_step import TokenStep
from ppl_diffusion.potentials.base import FORBIDDEN_GUESS
from ppl_diffusion.smc.twists import (
    ArgmaxFill,
    Defensive,
    FillTwist,
    PersistentFill,
    TwistLike,
    as_twist,
    floored,
    log_mean_exp,
    mean_lookahead,
)

Values = Mapping[str, Array]


class Target(Protocol):
    """What sequences and latents are worth; a pytree."""

    def draw(self, noise: Noise, size: Size) -> tuple[Values, Array]:
        """Return latents of ``(R, N)`` particles and the log-density ``log r`` of these."""
        ...

    def log_law(self, latents: Values) -> Array:
        """Return ``log r`` of latents, ``(R, N)``."""
        ...

    def log_joint(self, latents: Values, x0: Values) -> Array:
        """Return ``log p(latents, y | x0)``, ``(*batch,)``.

        :param latents: ``(*batch, ...)``.
        :param x0: clean sequences by chain, ``(*batch, *plates, L)``.
        """
        ...

    def log_guess(self, latents: Values, x0: Values) -> Array:
        """Return the same of guesses of the sequences, or a finite surrogate, ``(*batch,)``."""
        ...


class ChainParticles(eqx.Module):
    """Particles that move by their chains: by their own steps, or by proposals that handlers gave.

    :param chains: the chains by site; the noise of each is a block of its own.
    :param target: what weighs them.
    :param twist: how to look ahead; None does not.
    :param mover: how latents are renewed; None leaves them as they were drawn.
    :param shards: how particles lie on devices.
    """

    chains: dict[str, ReverseChain]
    target: Target
    twist: FillTwist | None = eqx.field(static=True)
    mover: Mover | None = eqx.field(default=None, kw_only=True)
    shards: Shards = eqx.field(static=True, kw_only=True, default=Shards())

    @property
    def num_steps(self) -> int:
        """Number ``T`` of steps, the same of all chains."""
        return next(iter(self.chains.values())).num_steps

    def init(self, noise: Noise, size: Size) -> dict[str, Any]:
        """Draw noisiest states, noise of completions, and latents."""
        fills = 0 if self.twist is None else self.twist.num_fills - _likeliest(self.twist)
        tokens, ahead, at = {}, {}, 0
        shape = {name: (*chain.batch_shape, chain.length) for name, chain in self.chains.items()}
        whole = self._width
        starts = noise.particles(MOVE, 0, (2, whole), size)[..., 0, :]
        own = noise.particles(FILL, 0, (fills, whole), size)
        for name, chain in self.chains.items():
            columns = slice(at, at := at + math.prod(shape[name]))
            tokens[name] = chain.start(starts[..., columns].reshape(*size, *shape[name]))
            ahead[name] = own[..., columns].reshape(*size, fills, *shape[name])
        tokens = self.held(tokens, 0)
        latents, log_r = self.target.draw(noise, size)
        carry = {"tokens": tokens, "fills": ahead, "latents": dict(latents), "log_r": log_r}
        if self.mover is not None:
            carry["level"] = jnp.zeros(size)
        return carry

    @property
    def _width(self) -> int:
        return sum(math.prod((*c.batch_shape, c.length)) for c in self.chains.values())

    def _predict(self, tokens: Values, k: Array) -> dict[str, Array]:
        return {name: chain.kernel.predict(tokens[name], k) for name, chain in self.chains.items()}

    def move(
        self, carry: dict[str, Any], k: Array, base: Array, noise: Noise, size: Size
    ) -> tuple[dict[str, Any], Array]:
        """Move as the chains do; the prediction was made when looking ahead."""
        u = noise.particles(MOVE, k + 1, (2, self._width), size)
        at, tokens, proposals = 0, {}, {}
        for name, chain in self.chains.items():
            state = carry["tokens"][name]
            columns = slice(at, at := at + math.prod(state.shape[2:]))
            step = chain.kernel.step(state, k, fixed=chain.fixed, log_c=carry["log_c"][name])
            own = jnp.moveaxis(u[..., columns], 2, 0).reshape(2, *state.shape)
            proposals[name] = step, chain.proposal(self.tilted(name, step, carry, k), k)
            tokens[name] = proposals[name][1].draw(own)
        tokens = self.held(tokens, k + 1)
        return {**carry, "tokens": tokens}, _ratio(proposals, tokens, size)

    def tilted(self, name: str, step: TokenStep, carry: dict[str, Any], k: Array) -> TokenStep:
        """Return how particles move where nothing holds them; by default as the chain does."""
        return step

    def held(self, tokens: dict[str, Array], k: Array) -> dict[str, Array]:
        """Return the states after ``k`` steps; a subclass knows some of them."""
        return tokens

    def look(self, carry: dict[str, Any], k: Array, base: Array) -> tuple[dict[str, Any], Array]:
        """Predict the clean tokens, for the next move, too, and weigh completions of them."""
        carry = self.predicted(carry, k)
        if self.twist is None:
            return carry, jnp.zeros_like(base)
        return self.rated(carry, self.worth(carry, k)[1], k, base)

    def predicted(self, carry: dict[str, Any], k: Array) -> dict[str, Any]:
        """Return particles with the prediction at their states."""
        return {**carry, "log_c": self.shards.each(lambda x: self._predict(x, k), carry["tokens"])}

    def rated(
        self, carry: dict[str, Any], log_f: Array, k: Array, base: Array
    ) -> tuple[dict[str, Any], Array]:
        """Return what states are worth by their completions, ``(R, N)``.

        :param log_f: the log-mean of the worth of completions, ``(R, N)``.
        """
        log_f, floor = self._tempered(log_f, k), _floor(self.twist)
        if not floor:
            return carry, log_f
        # Of all particles on each device: arrays of another size may round differently.
        log_f, base = self.shards.whole((log_f, base))
        level = mean_lookahead(log_f, base)
        if self.mover is not None:
            level = self.mover.level(level, k)
            own = self.shards.own(jnp.broadcast_to(level, base.shape))
            carry = {**carry, "level": own}
        return carry, self.shards.own(floored(log_f, level, floor))

    def _tempered(self, log_f: Array, k: Array) -> Array:
        return log_f if self.mover is None else self.mover.power(k, self.num_steps) * log_f

    def _ends(self, name: str, tokens: Values, log_c: Values, k: Array) -> Array:
        return self.chains[name].kernel.log_completions(tokens[name], k, log_c[name])

    def _filled(self, name: str, carry: dict[str, Any], k: Array) -> Array:
        """Return completions, ``(R, N, num_fills, *plates, L)``."""
        kernel = self.chains[name].kernel
        known = jnp.broadcast_to(self.chains[name].known, carry["tokens"][name].shape)[:, :, None]
        log_x0 = self._ends(name, carry["tokens"], carry["log_c"], k)
        parts = [kernel.complete(log_x0)[:, :, None]] if _likeliest(self.twist) else []
        u = carry["fills"][name]
        if u.shape[2]:
            wide = jnp.broadcast_to(log_x0[:, :, None], (*u.shape, log_x0.shape[-1]))
            parts.append(kernel.complete(wide, u))
        return jnp.where(known >= 0, known, jnp.concatenate(parts, 2))

    def completions(self, carry: dict[str, Any], k: Array) -> dict[str, Array]:
        """Return the completions of all chains, ``(R, N, num_fills, *plates, L)``."""
        return {name: self._filled(name, carry, k) for name in self.chains}

    def worth(
        self, carry: dict[str, Any], k: Array, x0: Values | None = None
    ) -> tuple[Array, Array]:
        """Return ``log p(latents, y | x0) - log r`` of completions, and its log-mean.

        :param x0: the completions, where they are known.
        :returns: ``(R, N, num_fills)``, and ``(R, N)``.
        """
        x0 = self.completions(carry, k) if x0 is None else x0
        fills = next(iter(x0.values())).shape[2]

        def repeated(x: Array) -> Array:
            return jnp.broadcast_to(x[:, :, None], (*x.shape[:2], fills, *x.shape[2:]))

        def promised(latents: Values, x0: Values, log_r: Array) -> tuple[Array, Array]:
            worth = self.target.log_guess(latents, x0) - log_r
            # A forbidden guess is no forbidden state: it is worth next to nothing, and not dead.
            worth = jnp.where(worth == -jnp.inf, FORBIDDEN_GUESS, worth)
            return worth, log_mean_exp(worth, -1)

        latents, log_r = jax.tree.map(repeated, (carry["latents"], carry["log_r"]))
        return self.shards.each(promised, latents, x0, log_r)

    def renew(
        self, noise: Noise, size: Size, carry: dict[str, Any], log_h: Array, cloud: Cloud, k: Array
    ) -> tuple[dict[str, Any], Array, Any]:
        """Move latents, each particle's given its sequence and the completions behind its twist."""
        assert self.mover is not None
        last = isinstance(k, int) and k == self.num_steps
        # Blocks go by a loop that nothing can be differentiated through.
        plain = replace(self, shards=replace(self.shards, block=None))
        x0 = None if last or self.twist is None else self.completions(carry, k)

        def rate(latents: Values) -> tuple[Array, Array]:
            log_r = self.target.log_law(latents)
            new = {**carry, "latents": latents, "log_r": log_r}
            if last:
                return plain.close(new), log_r
            if x0 is None:
                return jnp.zeros_like(log_r), log_r
            log_f, floor = self._tempered(plain.worth(new, k, x0)[1], k), _floor(self.twist)
            return (floored(log_f, carry["level"], floor) if floor else log_f), log_r

        spot = Spot(carry["latents"], log_h, carry["log_r"])
        spot, kept = self.mover.renew(spot, rate, cloud, k, noise, size, last=last)
        carry = {**carry, "latents": spot.latents, "log_r": spot.log_r}
        share = self.shards.whole(jnp.full(size, kept["share"])).mean()
        kept = {**kept, "share": share, "level": carry["level"][:, 0]}
        return self.renewed(carry, spot.log_h), spot.log_h, kept

    def renewed(self, carry: dict[str, Any], log_h: Array) -> dict[str, Any]:
        """Return the carry of particles of another twist."""
        return carry

    def close(self, carry: dict[str, Any]) -> Array:
        """Return ``log p(latents, y | x0) - log r`` of finished sequences."""
        log_joint = self.shards.each(self.target.log_joint, carry["latents"], carry["tokens"])
        return log_joint - carry["log_r"]

    def record(self, carry: dict[str, Any]) -> Array:
        """Return the tokens of all chains side by side, ``(R, N, W)``."""
        parts = [x.reshape(*x.shape[:2], -1) for x in carry["tokens"].values()]
        return jnp.concatenate(parts, -1)


def _ratio(
    proposals: Mapping[str, tuple[TokenStep, TokenStep]], tokens: Values, size: Size
) -> Array:
    """Return ``log K - log M`` of a move, ``(R, N)``, summed over chains and plates."""
    total = jnp.zeros(size)
    for name, (step, moves) in proposals.items():
        if moves is not step:
            ratio = step.log_prob(tokens[name]) - moves.log_prob(tokens[name])
            total = total + ratio.reshape(*size, -1).sum(-1)
    return total


def look_ahead(twist: TwistLike, owner: str) -> FillTwist | None:
    """Return the look-ahead that is meant.

    :raises CapabilityError: if the JAX engine does not have it.
    """
    made = as_twist(twist)
    if made is None:
        return None
    if isinstance(made, Defensive | PersistentFill | ArgmaxFill) and not made.late:
        return made
    raise CapabilityError(
        f"{owner}: the JAX engine looks ahead by 'defensive', 'persistent' or 'argmax' "
        f"completions, or by None, got {made.name!r}."
    )


def _likeliest(twist: FillTwist | None) -> bool:
    return isinstance(twist, Defensive | ArgmaxFill)


def _floor(twist: FillTwist | None) -> float:
    return 0.0 if twist is None else twist.floor
