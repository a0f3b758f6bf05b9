"""The methods of inference on the JAX engine, by the same small objects that torch has.

What a method *is*, its options and their defaults, is :mod:`ppl_diffusion.inference`; here is how
its particles move and what they carry. Every one of them is exact for the law that is targeted:
forms of a method that are not stay with torch, and are refused by name, as are methods whose moves
need kernels, networks or gradients that exist in torch alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

from ppl_diffusion.arrays import Array
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.inference import (
    Bootstrap,
    FKSteering,
    ImportanceSampling,
    Method,
    SoftValueGuidance,
    TwistedSampler,
)
from ppl_diffusion.inference.steering import RULES
from ppl_diffusion.inference.twisted import REWEIGHTED, paid_over_all
from ppl_diffusion.numpyro.engine import Size
from ppl_diffusion.numpyro.feynman_kac import ChainParticles, Target, look_ahead
from ppl_diffusion.numpyro.latent_moves import Mover
from ppl_diffusion.numpyro.noise import PICK, Noise
from ppl_diffusion.numpyro.reverse_chain import ReverseChain
from ppl_diffusion.numpyro.sharding import Shards
from ppl_diffusion.numpyro.token_step import TokenStep
from ppl_diffusion.processes.noise import draw_categorical
from ppl_diffusion.smc.twists import FillTwist, log_mean_exp

Carry = dict[str, Any]


class SteeredParticles(ChainParticles):
    """Particles of :class:`~ppl_diffusion.inference.FKSteering`.

    :param kind: how scores become weights.
    :param scored: whether states are scored after each number of steps, ``T`` of them.
    """

    kind: str = eqx.field(static=True, kw_only=True)
    scored: tuple[bool, ...] = eqx.field(static=True, kw_only=True)

    def init(self, noise: Noise, size: Size) -> Carry:
        """Nothing is scored yet; before the first score a maximum is ``-inf``."""
        start = jnp.full(size, -jnp.inf if self.kind == "max" else 0.0)
        return {**super().init(noise, size), "running": start, "log_h": jnp.zeros(size)}

    def look(self, carry: Carry, k: Array, base: Array) -> tuple[Carry, Array]:
        """Score states where it is due, and weigh by the product of potentials so far."""
        carry = self.predicted(carry, k)

        def score(carry: Carry) -> Carry:
            carry, score = self.rated(carry, self.worth(carry, k)[1], k, base)
            running, log_h = RULES[self.kind](carry["running"], carry["log_h"], score)
            return {**carry, "running": running, "log_h": log_h}

        carry = lax.cond(jnp.asarray(self.scored)[k], score, lambda same: same, carry)
        return carry, carry["log_h"]

    def renewed(self, carry: Carry, log_h: Array) -> Carry:
        """Return particles of another score."""
        return {**carry, "running": log_h, "log_h": log_h}


class TwistedParticles(ChainParticles):
    """Particles of :class:`~ppl_diffusion.inference.TwistedSampler` with reweighted predictions.

    :param kappa: completions of average worth that are added.
    """

    kappa: float = eqx.field(static=True, kw_only=True)

    def look(self, carry: Carry, k: Array, base: Array) -> tuple[Carry, Array]:
        """Look ahead, and remember what each completion is worth."""
        carry = self.predicted(carry, k)
        worth, log_f = self.worth(carry, k)
        # After a move of latents this is what completions were worth before: a proposal may be any.
        return self.rated({**carry, "worth": worth}, log_f, k, base)

    def tilted(self, name: str, step: TokenStep, carry: Carry, k: Array) -> TokenStep:
        """Tilt the prediction by what completions with each token pay, over what all of them do."""
        own = self._filled(name, carry, k)  # (R, N, F, *plates, L)
        worth = carry["worth"]
        pay = jax.nn.softmax(worth, -1) * worth.shape[-1]  # mean one
        size = step.process.vocab_size
        zero = jnp.zeros((*own.shape[:2], *own.shape[3:], size), pay.dtype)

        def count(total: tuple[Array, Array], one: tuple[Array, Array]) -> tuple[Any, None]:
            filled, paid = one
            found = (filled[..., None] == jnp.arange(size)).astype(pay.dtype)
            wide = paid.reshape(*paid.shape, *[1] * (found.ndim - 2))
            return (total[0] + wide * found, total[1] + found), None

        each = jnp.moveaxis(own, 2, 0), jnp.moveaxis(pay, 2, 0)
        (paid, counted), _ = lax.scan(count, (zero, zero), each)
        tilt = paid_over_all(paid, counted, self.kappa)
        return step.predicting(jax.nn.log_softmax(step.log_probs + tilt, -1))


class SoftValueParticles(ChainParticles):
    """Particles of :class:`~ppl_diffusion.inference.SoftValueGuidance`: one of ``M`` children each.

    :param num_children: children ``M``.
    :param alpha: temperature of the choice.
    """

    num_children: int = eqx.field(static=True, kw_only=True)
    alpha: float = eqx.field(static=True, kw_only=True)

    def init(self, noise: Noise, size: Size) -> Carry:
        """The value of the noisiest states is taken to be constant."""
        return self.predicted({**super().init(noise, size), "log_h": jnp.zeros(size)}, 0)

    def move(
        self, carry: Carry, k: Array, base: Array, noise: Noise, size: Size
    ) -> tuple[Carry, Array]:
        """Draw children, choose one of each family, and return what the choice costs."""
        count = self.num_children
        wide = size[0], size[1] * count
        children, ratio = super().move(jax.tree.map(self._repeated, carry), k, base, noise, wide)
        base = self._repeated(base) + ratio
        if isinstance(k, int) and k + 1 == self.num_steps:
            log_h = self.close(children)
        else:
            children, log_h = super().look(children, k + 1, base)
        gain = (log_h + ratio).reshape(*size, count)
        log_score = gain / self.alpha
        top = log_score.max(-1, keepdims=True)
        level = jnp.where(top == -jnp.inf, 0.0, log_score - top)
        chosen = draw_categorical(level, noise.particles(PICK, k + 1, (), size))
        index = jnp.arange(size[1]) * count + chosen
        kept = jax.tree.map(lambda x: jax.vmap(lambda row, i: row[i])(x, index), children)
        taken = jnp.take_along_axis(log_score, chosen[..., None], -1)[..., 0]
        # A family without a child of positive value is dead, which its value will say.
        paid = jnp.where(taken == -jnp.inf, 0.0, log_mean_exp(log_score, 2) - taken)
        paid = paid + jnp.take_along_axis(ratio, index, 1)
        return {**kept, "log_h": jnp.take_along_axis(log_h, index, 1)}, paid

    def _repeated(self, x: Array) -> Array:
        return jnp.repeat(x, self.num_children, 1)

    def look(self, carry: Carry, k: Array, base: Array) -> tuple[Carry, Array]:
        """Return the value of each lineage: that of the child that was chosen."""
        return carry, carry["log_h"]

    def renewed(self, carry: Carry, log_h: Array) -> Carry:
        """Return lineages of another value."""
        return {**carry, "log_h": log_h}


Chains = Mapping[str, ReverseChain]


def particles_of(
    method: Method,
    chains: Chains,
    target: Target,
    mover: Mover | None = None,
    shards: Shards = Shards(),  # noqa: B008 (frozen)
) -> ChainParticles:
    """Return the particles of a method.

    :param mover: how latents are renewed.
    :param shards: how particles lie on devices.
    :raises CapabilityError: if the JAX engine does not have the method, or this form of it.
    """
    require_method(method)
    if getattr(method, "proposal", None) not in (None, "reweighted"):
        raise CapabilityError(
            "SMC: on the JAX engine particles move by their chains; propose by "
            "ppl_diffusion.numpyro.handlers.twist, or use ppl_diffusion.inference.SMC."
        )
    cls, twist, options = _MADE[type(method)](method, next(iter(chains.values())).num_steps)
    ahead = look_ahead(twist, "SMC")
    return cls(dict(chains), target, ahead, mover=mover, shards=shards, **options)


def require_method(method: Method) -> None:
    """Refuse a method that stays with torch.

    :raises CapabilityError: if it does.
    """
    if type(method) not in _MADE:
        known = ", ".join(cls.name for cls in _MADE)
        raise CapabilityError(
            f"SMC: the JAX engine has the methods {known}, and not {method.name}, which torch has; "
            "choose another method or backend."
        )


def moves_latents(method: Method, num_steps: int) -> bool:
    """Whether what particles carry is always a look-ahead that latents can be moved under."""
    if not isinstance(method, FKSteering):
        return True
    always = list(range(1, num_steps))
    return method.kind == "difference" and method.scored_steps(num_steps) == always


def rows_per_step(method: Method) -> int:
    """Return how many states of each particle the networks see at a step."""
    return method.num_children if isinstance(method, SoftValueGuidance) else 1


def options_of(method: Method) -> dict[str, Any]:
    """Return what was chosen, in JSON types."""
    named = {f.name: getattr(method, f.name) for f in fields(method) if f.name != "twist"}
    return {k: v for k, v in named.items() if isinstance(v, bool | int | float | str | tuple)}


Made = tuple[type[ChainParticles], Any, dict[str, Any]]


def _bootstrap(method: Any, num_steps: int) -> Made:
    if getattr(method, "twist_every", 1) != 1:
        raise _only_torch("twist_every > 1")
    return ChainParticles, method.twist, {}


def _steering(method: Any, num_steps: int) -> Made:
    if method.published:
        raise _only_torch("closing='published', which is not exact")
    due = method.scored_steps(num_steps)
    scored = tuple(k in due for k in range(num_steps + 1))
    return SteeredParticles, method.twist, {"kind": method.kind, "scored": scored}


def _soft_value(method: Any, num_steps: int) -> Made:
    if not method.weighted:
        raise _only_torch("weighted=False, which nothing pays for")
    if method.alpha < 1:
        raise _only_torch("alpha < 1, whose greed has to be watched while it runs")
    options = {"num_children": method.num_children, "alpha": float(method.alpha)}
    return SoftValueParticles, method.twist, options


def _twisted(method: Any, num_steps: int) -> Made:
    twist = REWEIGHTED if method.twist == "auto" else method.twist
    if not isinstance(twist, FillTwist) or method.top is not None:
        raise _only_torch("tokens that are asked about one by one, or twists that are functions")
    return TwistedParticles, twist, {"kappa": float(method.kappa)}


def _only_torch(what: str) -> CapabilityError:
    return CapabilityError(
        f"SMC: the JAX engine does not have {what}; use ppl_diffusion.inference.SMC."
    )


_MADE: dict[type[Method], Callable[[Any, int], Made]] = {
    Bootstrap: _bootstrap,
    ImportanceSampling: _bootstrap,
    TwistedSampler: _twisted,
    FKSteering: _steering,
    SoftValueGuidance: _soft_value,
}
