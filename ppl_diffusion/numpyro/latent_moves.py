"""Moves of latents inside the scan, tuned by a scout run.

The twin of :mod:`ppl_diffusion.inference.latent_moves` and :mod:`~ppl_diffusion.inference.scout`,
which say why: kernels leave ``p(path) r(latents) h(path, latents)`` alone, ``h`` being the look-
ahead that is *carried*, and what they are tuned by is fixed before the run that is reported. Here a
scout is one more compiled run whose mover knows nothing; what each step found out is kept by the
scan, and is the next mover's :class:`Tuned`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

from ppl_diffusion.arrays import Array
from ppl_diffusion.inference.clouds import BLIND_MOVES, clinging, number_of, root_of
from ppl_diffusion.inference.latent_moves import JITTER, LEAPFROGS, MAX_ASKED, STEP
from ppl_diffusion.inference.scout import (
    CHEAP_SWEEP,
    CLING,
    FEW_COORDINATES,
    LEAST_SCALE,
    LOW,
    MOST_MOVES,
    LatentMoves,
)
from ppl_diffusion.numpyro.engine import Cloud, Size
from ppl_diffusion.numpyro.latent_sites import DiscreteSite, LatentSites
from ppl_diffusion.numpyro.noise import RENEW, Noise
from ppl_diffusion.processes.noise import draw_categorical

OWN = 8
"""Keys below this one are those of a move of continuous latents."""

Latents = Mapping[str, Array]
Rate = Callable[[Latents], tuple[Array, Array]]
"""Latents of all particles -> ``log h`` and ``log r``, ``(R, N)`` each."""


class Spot(NamedTuple):
    """Where particles stand.

    :param latents: values ``(R, N, ...)``.
    :param log_h: the carried look-ahead, ``(R, N)``.
    :param log_r: log of what latents are drawn with, ``(R, N)``.
    """

    latents: Latents
    log_h: Array
    log_r: Array

    @property
    def worth(self) -> Array:
        """What moves leave invariant."""
        return self.log_h + self.log_r


class _Learning(NamedTuple):
    """Where a step is that finds out what it takes."""

    spot: Spot
    scale: Array
    share: Array
    tried: Array
    made: Array
    wanted: Array


class Tuned(eqx.Module):
    """What is done after each number of steps made, 0 to ``T``.

    :param due: whether latents are moved, bool ``(T + 1,)``.
    :param number: how often, ``(T + 1,)``.
    :param scale: step in units of what is usual for the dimension, ``(T + 1,)``.
    :param root: roots of covariances, ``(T + 1, Q, d, d)`` of ``Q`` runs, or of one for all.
    :param level: log of the constants of the floor, ``(T + 1, Q)``.
    """

    due: Array
    number: Array
    scale: Array
    root: Array
    level: Array


class Mover(eqx.Module):
    """How latents are renewed.

    :param sites: what can be moved.
    :param options: what was asked for.
    :param tuned: what is done when; None finds out.
    """

    sites: LatentSites
    options: LatentMoves = eqx.field(static=True)
    tuned: Tuned | None = None

    @property
    def _walks(self) -> bool:
        kernel, few = self.options.kernel, self.sites.size <= FEW_COORDINATES
        return kernel == "random-walk" or (kernel == "auto" and few)

    @property
    def kernels(self) -> dict[str, str]:
        """The kernel of each latent."""
        real = "random-walk" if self._walks else "hmc"
        found = {site.name: real for site in self.sites.reals}
        return found | {site.name: "gibbs" for site in self.sites.discrete}

    @property
    def rows(self) -> int:
        """Rows that a sweep over continuous latents weighs, or one over discrete ones alone."""
        if self.sites.reals:
            return 1 if self._walks else 1 + LEAPFROGS
        return sum(_asked(site)[0] * _asked(site)[1] for site in self.sites.discrete)

    def power(self, k: Array, num_steps: int) -> Array:
        """Return the power of look-aheads after ``k`` steps, that they do not narrow down early."""
        return (k + 1) / (num_steps + 1) if self.options.tempering else 1.0

    def level(self, mean: Array, k: Array) -> Array:
        """Return the log of the floor's constant, ``(R, 1)``.

        :param mean: that of the particles at hand; constants that were found before do not depend
            on what is moved, and leave the evidence unbiased.
        """
        return mean if self.tuned is None else self.tuned.level[k][:, None]

    def renew(
        self,
        spot: Spot,
        rate: Rate,
        cloud: Cloud,
        k: Array,
        noise: Noise,
        size: Size,
        *,
        last: bool,
    ) -> tuple[Spot, dict[str, Array]]:
        """Move the latents where that is due.

        :param last: the sequences are finished: what costs no network is always done.
        :returns: where particles stand, and what was done.
        """
        keys = noise.keys(RENEW, k, size)
        if self.tuned is None:
            due = jnp.asarray(last) | cloud.resampled.any()
            act: Any = lambda spot: self._learned(spot, rate, cloud, keys)  # noqa: E731
        else:
            due = self.tuned.due[k]
            act = lambda spot: self._applied(spot, rate, k, keys)  # noqa: E731
        spot, kept = lax.cond(due, act, lambda spot: (spot, self._idle(spot)), spot)
        return spot, {**kept, "due": due}

    def _idle(self, spot: Spot) -> dict[str, Array]:
        """Return what is kept of a step at which nothing is moved."""
        d = self.sites.size
        root = jnp.zeros((len(spot.log_h), d, d), spot.log_h.dtype)
        zero = jnp.zeros((), spot.log_h.dtype)
        return {"number": zero, "scale": zero, "share": zero, "root": root}

    def _applied(self, spot: Spot, rate: Rate, k: Array, keys: Array) -> tuple[Spot, dict]:
        assert self.tuned is not None
        tuned = self.tuned
        root, scale, number = tuned.root[k], tuned.scale[k], tuned.number[k]

        def again(n: Array, state: tuple[Spot, Array]) -> tuple[Spot, Array]:
            spot, total = state
            spot, share = self._sweep(spot, rate, root, scale, n, keys)
            return spot, total + share

        start = (spot, jnp.zeros((), spot.log_h.dtype))
        spot, total = lax.fori_loop(0, number.astype(int), again, start)
        kept = {"number": number, "scale": scale, "share": total / number}
        return spot, {**kept, "root": jnp.broadcast_to(root, self._idle(spot)["root"].shape)}

    def _learned(self, spot: Spot, rate: Rate, cloud: Cloud, keys: Array) -> tuple[Spot, dict]:
        """Move until latents have left where they were, and note what that took."""
        real, zero = bool(self.sites.reals), jnp.zeros((), spot.log_h.dtype)
        weights = cloud.weights
        before = self.sites.flat(spot.latents) if real else None
        root = self._idle(spot)["root"]
        if real:
            root = root_of(before, weights).astype(root.dtype)

        wanted = zero + (self.options.number or (1 if real else BLIND_MOVES))

        def unfinished(state: _Learning) -> Array:
            clings: Any = False
            if real and not self.options.number:
                there = self.sites.flat(state.spot.latents)
                clings = (clinging(before, there, weights) > CLING) & (state.made < MOST_MOVES)
            return (state.made < state.wanted) | clings

        def go_on(state: _Learning) -> _Learning:
            spot, share = self._sweep(state.spot, rate, root, state.scale, state.tried, keys)
            first = state.made == 0
            # Steps are halved until some are accepted; what was tried until then does not count.
            far = first & real & (share < LOW) & (state.scale > LEAST_SCALE)
            wanted = state.wanted
            if real and not self.options.number:
                wanted = jnp.where(first, number_of(share), wanted).astype(zero.dtype)
            made = jnp.where(far, 0, state.made + 1)
            scale = jnp.where(far, state.scale / 2, state.scale)
            share = jnp.where(first, share, state.share)
            return _Learning(spot, scale, share, state.tried + 1, made, wanted)

        start = _Learning(spot, zero + 1, zero, jnp.zeros((), int), zero, wanted)
        done = lax.while_loop(unfinished, go_on, start)
        kept = {"number": done.made, "scale": done.scale, "share": done.share, "root": root}
        return done.spot, kept

    def _sweep(
        self, spot: Spot, rate: Rate, root: Array, scale: Array, n: Array, keys: Array
    ) -> tuple[Spot, Array]:
        """Move continuous latents together, and draw discrete ones anew; return what moved."""
        keys = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (0, None))(keys, n)
        share = jnp.ones((), spot.log_h.dtype)
        if self.sites.reals:
            move = random_walk if self._walks else hamiltonian
            spot, taken = move(spot, rate, self.sites, root, scale, keys)
            share = taken.mean(dtype=share.dtype)
        for i, site in enumerate(self.sites.discrete):
            own = jax.vmap(jax.vmap(lambda key, i=i: jax.random.fold_in(key, OWN + i)))(keys)
            if not self.sites.reals:
                spot, share = gibbs(spot, rate, site, own)
                continue
            # A sweep is dear where there are many values: some moves of the others go with each.
            due = n % max(1, math.ceil(math.prod(_asked(site)) / CHEAP_SWEEP)) == 0
            spot = lax.cond(
                due,
                lambda spot, site=site, own=own: gibbs(spot, rate, site, own)[0],
                lambda spot: spot,
                spot,
            )
        return spot, share


def random_walk(
    spot: Spot, rate: Rate, sites: LatentSites, root: Array, scale: Array, keys: Array
) -> tuple[Spot, Array]:
    """Propose a Gaussian step of all coordinates together (Metropolis)."""
    here = sites.flat(spot.latents)
    step = scale * 2.38 / math.sqrt(here.shape[-1])
    there = here + step * jnp.einsum("rij,rnj->rni", _of_runs(root, here), _normal(keys, here))
    proposed, volume = _at(there, spot, rate, sites)
    _, before = sites.back(here, spot.latents)
    return _accepted(spot, proposed, proposed.worth + volume - spot.worth - before, keys)


def hamiltonian(
    spot: Spot, rate: Rate, sites: LatentSites, root: Array, scale: Array, keys: Array
) -> tuple[Spot, Array]:
    """Follow the gradient of the program for some leapfrog steps (Duane et al. 1987; Neal 2011)."""
    place = sites.flat(spot.latents)
    root, start = _of_runs(root, place), _normal(keys, place)
    # A size for each particle: which one it is does not depend on where the particle stands.
    spread = _uniform(keys, 2)[..., None]
    step = scale * STEP * (1 - JITTER + 2 * JITTER * spread)

    def energy(flat: Array) -> tuple[Array, tuple[Spot, Array]]:
        new, volume = _at(flat, spot, rate, sites)
        # The sum over particles has each one's own gradient: no particle sees another.
        total = jnp.nan_to_num(new.worth + volume, nan=0.0, posinf=0.0, neginf=0.0)
        return total.sum(), (new, volume)

    def force(flat: Array) -> tuple[Array, tuple[Spot, Array]]:
        slope, seen = jax.grad(energy, has_aux=True)(flat)
        return jnp.einsum("rji,rnj->rni", root, jnp.nan_to_num(slope)), seen

    def leap(_: Array, state: tuple[Any, ...]) -> tuple[Any, ...]:
        place, speed, pull, _ = state
        speed = speed + step / 2 * pull
        place = place + step * jnp.einsum("rij,rnj->rni", root, speed)
        pull, seen = force(place)
        return place, speed + step / 2 * pull, pull, seen

    pull, seen = force(place)
    _, before = sites.back(place, spot.latents)
    begun = (place, start, pull, seen)
    _, speed, _, (proposed, volume) = lax.fori_loop(0, LEAPFROGS, leap, begun)
    kinetic = ((speed**2).sum(-1) - (start**2).sum(-1)) / 2
    log_ratio = proposed.worth + volume - spot.worth - before - kinetic
    return _accepted(spot, proposed, log_ratio, keys)


def gibbs(spot: Spot, rate: Rate, site: DiscreteSite, keys: Array) -> tuple[Spot, Array]:
    """Draw a discrete latent from its law given all else, one element of its plates at a time.

    All other values of an element are asked about side by side; of more than :data:`MAX_ASKED` a
    random subset is, and of elements likewise: whoever is in it, each would have met the others.

    :returns: where particles stand, and the share of elements that changed.
    """
    others, count = _asked(site)
    changed = jnp.zeros((), spot.log_h.dtype)
    if not others:
        return spot, changed

    def one(i: Array, state: tuple[Spot, Array]) -> tuple[Spot, Array]:
        spot, changed = state
        own = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (0, None))(keys, i)
        # Which elements, each particle chooses for itself.
        element = jax.vmap(jax.vmap(lambda key: jax.random.permutation(key, site.elements)))(
            _split(keys, count)
        )
        spot, moved = _drawn(spot, rate, site, element[..., i], others, own)
        return spot, changed + moved.mean(dtype=changed.dtype) / count

    return lax.fori_loop(0, count, one, (spot, changed))


def _asked(site: DiscreteSite) -> tuple[int, int]:
    """Return how many other values of how many elements a sweep asks about."""
    others = min(len(site.values) - 1, MAX_ASKED)
    return others, min(site.elements, max(1, MAX_ASKED // max(others, 1)))


def _drawn(
    spot: Spot, rate: Rate, site: DiscreteSite, element: Array, others: int, keys: Array
) -> tuple[Spot, Array]:
    total, value = len(site.values), spot.latents[site.name]
    here = jnp.take_along_axis(site.index(value), element[..., None], -1)[..., 0]  # (R, N)
    ahead = _split(keys, 3)
    by = jax.vmap(jax.vmap(lambda key: jax.random.permutation(key, total - 1)))(ahead)
    index = (here[..., None] + 1 + by[..., :others]) % total  # (R, N, others)
    each = jax.vmap(jax.vmap(site.with_element))

    def asked(index: Array) -> tuple[Array, Array]:
        return rate({**spot.latents, site.name: each(value, element, index)})

    log_h, log_r = jax.vmap(asked, -1, -1)(index)
    worth = jnp.where((log_r > -jnp.inf) & ~jnp.isnan(log_h + log_r), log_h + log_r, -jnp.inf)
    # The value that is held keeps the look-ahead that is carried.
    held = jnp.nan_to_num(spot.worth, nan=-jnp.inf, posinf=-jnp.inf)
    nowhere = jnp.maximum(held, worth.max(-1)) == -jnp.inf  # dead particles
    levels = jnp.concatenate([jnp.where(nowhere, 0.0, held)[..., None], worth], -1)
    taken = draw_categorical(levels - levels.max(-1, keepdims=True), _uniform(keys, 1))
    chosen = jnp.maximum(taken - 1, 0)[..., None]
    new = jnp.take_along_axis(index, chosen, -1)[..., 0]
    there = Spot(
        {**spot.latents, site.name: each(value, element, new)},
        *(jnp.take_along_axis(x, chosen, -1)[..., 0] for x in (log_h, log_r)),
    )
    return _where(taken > 0, there, spot), taken > 0


def _at(flat: Array, spot: Spot, rate: Rate, sites: LatentSites) -> tuple[Spot, Array]:
    latents, volume = sites.back(flat, spot.latents)
    return Spot(latents, *rate(latents)), volume


def _accepted(spot: Spot, proposed: Spot, log_ratio: Array, keys: Array) -> tuple[Spot, Array]:
    """Accept by the ratio; what has no density, or is no number, is never gone to."""
    taken = (jnp.log(_uniform(keys, 1)) < log_ratio) & (proposed.log_r > -jnp.inf)
    return _where(taken, proposed, spot), taken


def _where(chosen: Array, new: Spot, old: Spot) -> Spot:
    def pick(a: Array, b: Array) -> Array:
        return jnp.where(chosen.reshape(*chosen.shape, *[1] * (a.ndim - 2)), a, b)

    return Spot(*jax.tree.map(pick, tuple(new), tuple(old)))


def _of_runs(root: Array, like: Array) -> Array:
    return jnp.broadcast_to(root, (len(like), *root.shape[1:])).astype(like.dtype)


def _split(keys: Array, use: int) -> Array:
    return jax.vmap(jax.vmap(lambda key: jax.random.fold_in(key, use)))(keys)


def _normal(keys: Array, like: Array) -> Array:
    draw = jax.vmap(jax.vmap(lambda key: jax.random.normal(key, like.shape[2:], like.dtype)))
    return draw(_split(keys, 0))


def _uniform(keys: Array, use: int) -> Array:
    return jax.vmap(jax.vmap(jax.random.uniform))(_split(keys, use))
