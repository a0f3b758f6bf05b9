"""Particles of a program with reverse chains: how they move, look ahead, and what weighs them.

All chains of a program go in lockstep. Latents are drawn once, before the chains, from their law
given a first guess; that law ``r`` is a part of what weighs them, so that a latent whose law
depends on the sequences is right, too. The look-ahead is that of
:class:`ppl_diffusion.smc.twists.Defensive`: the likeliest completion, some with noise that a
particle hands on to its children, and a floor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, Protocol

import equinox as eqx
import jax
import jax.numpy as jnp

from ppl_diffusion.arrays import Array
from ppl_diffusion.numpyro.engine import Size
from ppl_diffusion.numpyro.noise import FILL, MOVE, Noise
from ppl_diffusion.numpyro.reverse_chain import ReverseChain
from ppl_diffusion.numpyro.token_step import TokenStep
from ppl_diffusion.potentials.base import FORBIDDEN_GUESS
from ppl_diffusion.smc.twists import Defensive, floored, log_mean_exp, mean_lookahead

Values = Mapping[str, Array]
Look = Literal["defensive"] | Defensive | None
"""How particles look ahead; None does not."""


class Target(Protocol):
    """What sequences and latents are worth; a pytree."""

    def draw(self, noise: Noise, size: Size, guess: Callable[[], Values]) -> tuple[Values, Array]:
        """Return latents of ``(R, N)`` particles and the log-density ``log r`` of these.

        :param guess: returns a first guess of the sequences, ``(*plates, L)`` each.
        """
        ...

    def log_joint(self, latents: Values, x0: Values) -> Array:
        """Return ``log p(latents, y | x0)``, ``(*batch,)``.

        :param latents: ``(*batch, ...)``.
        :param x0: clean sequences by chain, ``(*batch, *plates, L)``.
        """
        ...


class ChainParticles(eqx.Module):
    """Particles that move by their chains: by their own steps, or by proposals that handlers gave.

    :param chains: the chains by site; the noise of each is a block of its own.
    :param target: what weighs them.
    :param twist: how to look ahead; None does not.
    """

    chains: dict[str, ReverseChain]
    target: Target
    twist: Defensive | None = eqx.field(static=True)

    @property
    def num_steps(self) -> int:
        """Number ``T`` of steps, the same of all chains."""
        return next(iter(self.chains.values())).num_steps

    def init(self, noise: Noise, size: Size) -> dict[str, Any]:
        """Draw noisiest states, noise of completions, and latents."""
        fills = 0 if self.twist is None else self.twist.num_persistent
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
        latents, log_r = self.target.draw(noise, size, partial(self._guess, tokens))
        return {"tokens": tokens, "fills": ahead, "latents": dict(latents), "log_r": log_r}

    def _guess(self, tokens: Values) -> dict[str, Array]:
        """Return the likeliest sequences, ``(*plates, L)``, as seen from one noisiest state."""
        first = {name: x[0, 0] for name, x in tokens.items()}
        log_c = self._predict(first, 0)
        ends = {name: self._ends(name, first, log_c, 0) for name in first}
        return {name: self.chains[name].kernel.complete(x) for name, x in ends.items()}

    @property
    def _width(self) -> int:
        return sum(math.prod((*c.batch_shape, c.length)) for c in self.chains.values())

    def _predict(self, tokens: Values, k: Array) -> dict[str, Array]:
        return {name: chain.kernel.predict(tokens[name], k) for name, chain in self.chains.items()}

    def move(
        self, carry: dict[str, Any], k: Array, noise: Noise, size: Size
    ) -> tuple[dict[str, Any], Array]:
        """Move as the chains do; the prediction was made when looking ahead."""
        u = noise.particles(MOVE, k + 1, (2, self._width), size)
        at, tokens, proposals = 0, {}, {}
        for name, chain in self.chains.items():
            state = carry["tokens"][name]
            columns = slice(at, at := at + math.prod(state.shape[2:]))
            step = chain.kernel.step(state, k, fixed=chain.fixed, log_c=carry["log_c"][name])
            own = jnp.moveaxis(u[..., columns], 2, 0).reshape(2, *state.shape)
            proposals[name] = step, chain.proposal(step, k)
            tokens[name] = proposals[name][1].draw(own)
        tokens = self.held(tokens, k + 1)
        return {**carry, "tokens": tokens}, _ratio(proposals, tokens, size)

    def held(self, tokens: dict[str, Array], k: Array) -> dict[str, Array]:
        """Return the states after ``k`` steps; a subclass knows some of them."""
        return tokens

    def look(self, carry: dict[str, Any], k: Array, base: Array) -> tuple[dict[str, Any], Array]:
        """Predict the clean tokens, for the next move, too, and weigh completions of them."""
        carry = {**carry, "log_c": self._predict(carry["tokens"], k)}
        if self.twist is None:
            return carry, jnp.zeros_like(base)
        fills = {name: self._filled(name, carry, k) for name in self.chains}
        # A forbidden guess is no forbidden state: it is worth next to nothing, and not dead.
        worth = self._worth(carry, fills)
        log_f = log_mean_exp(jnp.where(worth == -jnp.inf, FORBIDDEN_GUESS, worth), 2)
        if not self.twist.floor:
            return carry, log_f
        return carry, floored(log_f, mean_lookahead(log_f, base), self.twist.floor)

    def _ends(self, name: str, tokens: Values, log_c: Values, k: Array) -> Array:
        return self.chains[name].kernel.log_completions(tokens[name], k, log_c[name])

    def _filled(self, name: str, carry: dict[str, Any], k: Array) -> Array:
        """Return completions, ``(R, N, num_fills, *plates, L)``."""
        kernel = self.chains[name].kernel
        known = jnp.broadcast_to(self.chains[name].known, carry["tokens"][name].shape)[:, :, None]
        log_x0 = self._ends(name, carry["tokens"], carry["log_c"], k)
        filled = kernel.complete(log_x0)[:, :, None]
        u = carry["fills"][name]
        if u.shape[2]:
            wide = jnp.broadcast_to(log_x0[:, :, None], (*u.shape, log_x0.shape[-1]))
            filled = jnp.concatenate([filled, kernel.complete(wide, u)], 2)
        return jnp.where(known >= 0, known, filled)

    def _worth(self, carry: dict[str, Any], x0: Values) -> Array:
        """Return ``log p(latents, y | x0) - log r`` of completions, ``(R, N, num_fills)``."""
        fills = next(iter(x0.values())).shape[2]

        def repeated(x: Array) -> Array:
            return jnp.broadcast_to(x[:, :, None], (*x.shape[:2], fills, *x.shape[2:]))

        latents = jax.tree.map(repeated, carry["latents"])
        return self.target.log_joint(latents, x0) - carry["log_r"][:, :, None]

    def close(self, carry: dict[str, Any]) -> Array:
        """Return ``log p(latents, y | x0) - log r`` of finished sequences."""
        return self.target.log_joint(carry["latents"], carry["tokens"]) - carry["log_r"]

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


def look_ahead(twist: Look, owner: str) -> Defensive | None:
    """Return the look-ahead that is meant.

    :raises ValueError: if there is no such one here.
    """
    if twist == "defensive":
        return Defensive()
    if twist is None or (isinstance(twist, Defensive) and not twist.late):
        return twist
    raise ValueError(f"{owner}: twist must be 'defensive', a Defensive, or None, got {twist!r}.")
