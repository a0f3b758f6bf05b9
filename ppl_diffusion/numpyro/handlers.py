"""Handlers of NumPyro programs with chains: how sites are proposed, held, written out.

All of them take the program or are context managers, as NumPyro's do, and work inside and outside
of ``seed``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro.primitives import Messenger

from ppl_diffusion.arrays import Array
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.numpyro.proposed import ProposedChain, Psi, Steering, UnscoredChain
from ppl_diffusion.numpyro.reverse_chain import ReverseChain
from ppl_diffusion.numpyro.token_step import TokenStep

Program = Callable[..., Any]
Sites = Collection[str] | None


Change = Callable[[str, ReverseChain], ReverseChain]


class _Chains(Messenger):
    """Change the law of chain sites before they are drawn.

    :param handler: the name of the handler, for messages.
    :param change: ``(site name, chain) -> chain``.
    """

    def __init__(self, handler: str, change: Change, fn: Program | None, sites: Sites) -> None:
        super().__init__(fn)
        self.handler, self.change = handler, change
        self.sites, self._met = sites, False

    def __exit__(self, exc_type: Any, exc_value: Any, traceback: Any) -> None:
        super().__exit__(exc_type, exc_value, traceback)
        met, self._met = self._met, False
        if exc_type is None and not met:
            where = "chain site" if self.sites is None else f"site of {sorted(self.sites)}"
            raise ValueError(f"{self.handler}: the program has no {where}; check the names.")

    def process_message(self, msg: Any) -> None:
        """Replace the law of a chain site."""
        if _is_chosen(msg, self.sites):
            self._met = True
            msg["fn"] = self.change(msg["name"], msg["fn"])


def _is_chosen(msg: Any, sites: Sites) -> bool:
    chain = msg["type"] == "sample" and isinstance(msg["fn"], ReverseChain)
    return chain and (sites is None or msg["name"] in sites)


def clamp(fn: Program | None = None, *, tokens: Array, sites: Sites = None) -> Any:
    """Observe some tokens of the clean sequences of a program's chains.

    The target becomes ``p(path | x0[known] = tokens[known])`` times the rest of the program, and
    the evidence includes the probability of the tokens: sites are drawn with the tokens in place,
    and weighed.

    :param fn: the program; without it a context manager.
    :param tokens: integers ``(L,)``, -1 where nothing is known.
    :param sites: names of the chain sites (all by default).
    :raises TypeError: if the tokens are no integers.
    :raises ValueError: if a chain has another length, a token is none, or another one is known at
        its position, or no chain site is met.
    :raises CapabilityError: if the chain may mask again what it has revealed.
    """
    known = jnp.asarray(tokens)
    if not jnp.issubdtype(known.dtype, jnp.integer):
        raise TypeError(f"clamp: tokens must hold integer ids, got {known.dtype}.")

    def hold(name: str, chain: ReverseChain) -> ReverseChain:
        if known.shape[-1:] != (chain.length,):
            raise ValueError(
                f"clamp: {known.shape[-1]} tokens for the chain {name!r} of {chain.length}; "
                "give one for each position, -1 where it is free."
            )
        held = ProposedChain.of(chain)
        _require_clampable(name, held, known)
        return held.holding(known)

    return _Chains("clamp", hold, fn, sites)


def _require_clampable(name: str, chain: ProposedChain, known: Array) -> None:
    process, kappa = chain.kernel.process, np.asarray(chain.kernel.kappa)
    if process.absorbing and (kappa < 1).any():
        raise CapabilityError(
            f"clamp: the chain {name!r} may reveal a wrong token and mask it again (kappa below "
            "1), which nothing that holds the tokens proposes; take kappa=1, or condition by a "
            "factor of the program."
        )
    if any(isinstance(x, jax.core.Tracer) for x in (known, chain.known)):
        return
    if known.max() >= process.vocab_size or known.min() < -1:
        raise ValueError("clamp: tokens must hold clean token ids, and -1 where nothing is known.")
    if ((known >= 0) & (chain.known >= 0) & (known != chain.known)).any():
        raise ValueError(
            f"clamp: another token of the chain {name!r} is known already where one is given; the "
            "prompt and all clamps have to agree."
        )


def twist(fn: Program | None = None, *, logits: Psi, sites: Sites = None) -> Any:
    """Propose chain sites by tilted predictions; the model stays as it is.

    A site is drawn step by step from ``q ∝ d exp(psi)`` in place of the prediction ``d`` and
    carries the weight ``prod p / q``. Any finite ``psi`` is valid and a bad one only adds variance.

    :param fn: the program; without it a context manager.
    :param logits: ``(tokens (*batch, L), k, log_probs (*batch, L, V)) -> psi (*batch, L, V)``.
    :param sites: names of the chain sites (all by default).
    :raises CapabilityError: if a site is twisted already.
    :raises ValueError: if no chain site is met.
    """

    def tilt(name: str, chain: ReverseChain) -> ReverseChain:
        new = ProposedChain.of(chain)
        if new.psi is not None:
            raise CapabilityError(f"twist: the site {name!r} is twisted already; join both.")
        new.psi = logits
        return new

    return _Chains("twist", tilt, fn, sites)


def steer(
    fn: Program | None = None,
    *,
    potential: Callable[[Array], Array],
    num_particles: int = 64,
    sites: Sites = None,
    **settings: Any,
) -> Any:
    """Draw chain sites from the particles of runs of their own; the model stays as it is.

    The weight of a site is ``log Z_hat - log G(x0)``: unbiased whatever the potential, which only
    aims. :class:`~ppl_diffusion.numpyro.SMC` has particles of its own and refuses such a site.

    :param fn: the program; without it a context manager.
    :param potential: ``x0 (*batch, L) -> log G (*batch,)`` in JAX.
    :param num_particles: particles of each run.
    :param sites: names of the chain sites (all by default).
    :param settings: other fields of :class:`~ppl_diffusion.numpyro.Steering`.
    :raises CapabilityError: if a site is steered already.
    :raises ValueError: if no chain site is met.
    """
    steering = Steering(potential, num_particles, **settings)

    def run(name: str, chain: ReverseChain) -> ReverseChain:
        new = ProposedChain.of(chain)
        if new.steering is not None:
            raise CapabilityError(f"steer: the site {name!r} is steered already; join both.")
        new.steering = steering
        return new

    return _Chains("steer", run, fn, sites)


def constant(fn: Program | None = None, *, sites: Sites = None) -> Any:
    """Leave the density of chains out, which is a constant while they are held.

    Beside particle Gibbs every gradient of NUTS would score a path that it cannot move, by ``T``
    calls of the network. Where the law of a chain depends on no latent that density is the same
    number throughout: give both blocks ``constant(model)``. It is wrong where it does depend.

    :param fn: the program; without it a context manager.
    :param sites: names of the chain sites (all by default).
    :raises ValueError: if no chain site is met.
    """
    return _Chains("constant", lambda name, chain: UnscoredChain.of(chain), fn, sites)


def unroll(fn: Program | None = None, *, sites: Sites = None) -> Any:
    """Write a chain site ``x`` as the sites ``x_0`` (noisiest) to ``x_T`` (clean).

    The joint density is the same number, factor by factor; ``x`` stays as a deterministic path.
    With an observed path the steps are observed.

    :param fn: the program; without it a context manager.
    :param sites: names of the chain sites (all by default).
    """
    return _Unrolled(fn, sites)


class _Unrolled(Messenger):
    """Sample the steps of a chain in place of its path."""

    def __init__(self, fn: Program | None, sites: Sites) -> None:
        super().__init__(fn)
        self.sites = sites

    def process_message(self, msg: Any) -> None:
        """Sample the steps, and leave the path."""
        if not _is_chosen(msg, self.sites):
            return
        if isinstance(msg["fn"], ProposedChain):
            raise CapabilityError(
                f"unroll: the site {msg['name']!r} is clamped, twisted or steered, which its steps "
                "would forget; unroll first, and condition its last step."
            )
        name, path = msg["name"], msg["value"]
        # One key of the site, whichever handler was first, so that the order does not matter.
        key = msg["kwargs"].get("rng_key")
        if key is None and path is None:
            key = numpyro.prng_key()
        path = _steps(name, msg["fn"], path, key)
        plates = msg["cond_indep_stack"]
        msg.clear()
        msg.update(type="deterministic", name=name, value=path, cond_indep_stack=plates)


def _steps(name: str, chain: ReverseChain, path: Array | None, key: Array | None) -> Array:
    count = chain.num_steps + 1
    known = [None] * count if path is None else list(jnp.moveaxis(path, -2, 0))
    keys = [None] * count if key is None else list(jax.random.split(key, count))
    states = [numpyro.sample(f"{name}_0", _start(chain), obs=known[0], rng_key=keys[0])]
    for k in range(chain.num_steps):
        step = chain.kernel.step(states[-1], k, fixed=chain.fixed)
        site = f"{name}_{k + 1}"
        states.append(numpyro.sample(site, step, obs=known[k + 1], rng_key=keys[k + 1]))
    return jnp.stack(states, -2)


def _start(chain: ReverseChain) -> Any:
    """Return the law of the noisiest state as a step: at ``alpha = 0`` a draw from the prior."""
    process = chain.kernel.process
    shape = (*chain.batch_shape, chain.length)
    flat = jnp.full((*shape, process.vocab_size), -math.log(process.vocab_size))
    tokens = jnp.broadcast_to(jnp.maximum(chain.prompt, 0), shape)
    return TokenStep(process, tokens, flat, 0.0, 0.0, 0.0, fixed=chain.fixed, validate_args=False)
