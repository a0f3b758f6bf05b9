"""Reading NumPyro programs: their chains, their latents, and what weighs both.

A program is run twice to be read. Its chain sites are those whose law is a
:class:`~ppl_diffusion.numpyro.ReverseChain`; all other unobserved sample sites are latents;
observed sites and factors weigh. Afterwards it is run under ``vmap``, with values in place of its
sites, and its chains are never scored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from numpyro.handlers import seed, substitute, trace
from numpyro.primitives import Messenger

from ppl_diffusion.arrays import Array, int64_of
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.numpyro.dependence import depends
from ppl_diffusion.numpyro.engine import Size
from ppl_diffusion.numpyro.latent_sites import LatentSites, latent_sites
from ppl_diffusion.numpyro.noise import LATENT, Noise
from ppl_diffusion.numpyro.reverse_chain import ReverseChain

Values = Mapping[str, Array]

NOISE = "ppl_diffusion/noise"
"""What a particle draws its late latents by, two words of 32 bits, beside the latents."""


class PotentialTarget(eqx.Module):
    """The target ``p(path) G(x0)`` of one chain.

    :param log_g: ``x0 (*batch, L) -> log G (*batch,)`` in JAX; guesses are scored by its
        ``lookahead``, if it has one.
    :param name: of the chain site.
    :param plates: dimensions of plates, which are summed over.
    """

    log_g: Callable[[Array], Array] = eqx.field(static=True)
    name: str = eqx.field(static=True)
    plates: int = eqx.field(static=True)

    def draw(self, noise: Noise, size: Size) -> tuple[Values, Array]:
        """Return no latents."""
        return {}, jnp.zeros(size)

    def log_law(self, latents: Values) -> Array:
        """Return zero: there are no latents."""
        return jnp.zeros(())

    def log_joint(self, latents: Values, x0: Values) -> Array:
        """Return ``log G``."""
        return self._summed(self.log_g(x0[self.name]), x0[self.name])

    def log_guess(self, latents: Values, x0: Values) -> Array:
        """Return what guesses are worth."""
        score: Any = getattr(self.log_g, "lookahead", self.log_g)
        return self._summed(score(x0[self.name]), x0[self.name])

    def _summed(self, worth: Array, x0: Array) -> Array:
        if jnp.shape(worth) != x0.shape[:-1]:
            raise ValueError(
                f"the potential returned shape {jnp.shape(worth)} for sequences of shape "
                f"{x0.shape}; return one number for each, such as a sum over the last dimension."
            )
        return worth.sum(tuple(range(worth.ndim - self.plates, worth.ndim)))


class ProgramTarget(eqx.Module):
    """What a program makes of its sequences and latents.

    :param model: the program.
    :param args: its positional arguments, ``kwargs`` its keyword arguments: pytrees.
    :param chains: names and numbers of steps of the chain sites.
    :param latents: names of the latents that particles carry.
    :param late: names of latents whose law depends on a sequence. They are no part of what is
        carried: each particle has noise of its own that they are drawn by, whenever they are asked
        for, from their law given its sequence.
    :param shapes: shapes ``(*plates, L)`` of the sequences, by chain.
    """

    model: Callable[..., Any] = eqx.field(static=True)
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    chains: tuple[tuple[str, int], ...] = eqx.field(static=True)
    latents: tuple[str, ...] = eqx.field(static=True)
    late: tuple[str, ...] = eqx.field(static=True)
    shapes: tuple[tuple[str, tuple[int, ...]], ...] = eqx.field(static=True)

    def run(self, values: Values, key: Array | None = None) -> dict[str, Any]:
        """Run the program on one particle's values and return its trace.

        :param values: latents, ``x0`` of chains by their sites' names, and :data:`NOISE`.
        """
        given = dict(values)
        if NOISE in given:
            key = jax.random.wrap_key_data(given.pop(NOISE), impl="threefry2x32")
        for name, steps in self.chains:
            x0 = given[name]
            # Only the last state of a path is read: what a program may say about is x0.
            given[name] = jnp.broadcast_to(
                x0[..., None, :], (*x0.shape[:-1], steps + 1, x0.shape[-1])
            )
        key = jax.random.key(0) if key is None else key
        program = substitute(seed(self.model, key), data=given)
        found: dict[str, Any] = trace(program).get_trace(*self.args, **self.kwargs)
        return found

    @property
    def _any(self) -> Values:
        """Sequences, for what does not depend on them."""
        return {name: jnp.zeros(shape, int64_of(jnp)) for name, shape in self.shapes}

    def draw(self, noise: Noise, size: Size) -> tuple[Values, Array]:
        """Draw latents from their law, see :class:`Target`."""
        if not self.latents + self.late:
            return {}, jnp.zeros(size)

        def one(key: Array) -> tuple[Values, Array]:
            found = self.run(self._any, key)
            values = {name: found[name]["value"] for name in self.latents}
            if self.late:
                values[NOISE] = jax.random.bits(jax.random.fold_in(key, 1), (2,), jnp.uint32)
            return values, total_log_prob(found[name] for name in self.latents)

        return jax.vmap(jax.vmap(one))(noise.keys(LATENT, 0, size))

    def log_law(self, latents: Values) -> Array:
        """Return ``log r`` of latents, see :class:`Target`."""

        def one(values: Values) -> Array:
            found = self.run({**values, **self._any})
            return total_log_prob(found[name] for name in self.latents)

        for _ in range(2):
            one = jax.vmap(one)
        return one(latents)

    def log_joint(self, latents: Values, x0: Values) -> Array:
        """Return ``log p(latents, y | x0)``, given what was drawn late, see :class:`Target`."""
        return self._mapped(lambda values: self.weigh(self.run(values)), {**latents, **x0})

    def log_guess(self, latents: Values, x0: Values) -> Array:
        """Return the same of guesses."""
        return self.log_joint(latents, x0)

    def _mapped(self, one: Callable[[Values], Array], values: Values) -> Array:
        """Return a function of each particle's values."""
        name, own = self.shapes[0]
        for _ in range(values[name].ndim - len(own)):
            one = jax.vmap(one)
        return one(values)

    def weigh(self, found: Mapping[str, Any]) -> Array:
        """Return the log-density of all sites of a trace but chains and late latents."""
        return total_log_prob(self._weighing(found))

    def scores(self, values: Values) -> list[Array]:
        """Return the log-densities of these sites, of the shapes they have."""
        return [_score(site) for site in self._weighing(self.run(values))]

    def _weighing(self, found: Mapping[str, Any]) -> list[Any]:
        drawn = {*(name for name, _ in self.chains), *self.late}
        sites = (site for site in found.values() if site["type"] == "sample")
        return [site for site in sites if site["name"] not in drawn]

    def samples(self, latents: Values, x0: Values) -> dict[str, Array]:
        """Return the values of latents and deterministic sites, ``(R, N, ...)`` each."""

        def one(values: Values) -> dict[str, Array]:
            return {
                name: site["value"]
                for name, site in self.run(values).items()
                if site["type"] == "deterministic" or name in self.latents + self.late
            }

        return jax.vmap(jax.vmap(one))({**latents, **x0})


def read(
    model: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    key: Array,
    *,
    fixed: bool = False,
) -> tuple[dict[str, ReverseChain], ProgramTarget]:
    """Read a program.

    :param key: a JAX random key; what is drawn is not used.
    :param fixed: nothing is drawn before the chains, whose law may then depend on anything.
    :raises CapabilityError: if it has no chain, or one that this engine does not move: a chain
        whose law depends on what was drawn before it, that is scaled or steered, or chains of
        different lengths in time; if the program reads other states of a path than the last.
    """
    found = _traced(model, args, kwargs, key)
    sites = {n: s for n, s in found.items() if s["type"] == "sample" and not s["is_observed"]}
    chains = {name: s["fn"] for name, s in sites.items() if isinstance(s["fn"], ReverseChain)}
    if not chains:
        raise CapabilityError(
            "SMC: the program has no unobserved ReverseChain site; sample one, as in "
            'numpyro.sample("path", chain).'
        )
    require_whole_plates(found, "SMC")
    for name, chain in chains.items():
        _require_plain(name, chain, sites[name]["scale"])
    if len({chain.num_steps for chain in chains.values()}) > 1:
        raise CapabilityError("SMC: the chains have different numbers of steps; give them one.")
    latents = tuple(name for name in sites if name not in chains)
    for name in latents:
        if sites[name]["scale"] is not None:
            raise CapabilityError(
                f"SMC: the latent {name!r} is scaled, but particles draw it from its own law; "
                "scale what is observed only."
            )
    target = ProgramTarget(
        model,
        tuple(args),
        dict(kwargs),
        tuple((name, chain.num_steps) for name, chain in chains.items()),
        latents,
        (),
        tuple((name, (*c.batch_shape, c.length)) for name, c in chains.items()),
    )
    if not fixed:
        target = _apart(target, found)
    # A path may hide by chance that a state of it is read.
    for seen in (found, _traced(model, args, kwargs, jax.random.split(key)[0])):
        _require_ends(target, seen)
    return chains, target


def _apart(target: ProgramTarget, found: Mapping[str, Any]) -> ProgramTarget:
    """Tell latents whose law depends on a sequence, and refuse chains whose law depends on any."""
    latents = {name: found[name]["value"] for name in target.latents}
    x0 = {name: found[name]["value"][..., -1, :] for name, _ in target.chains}
    for name in x0:

        def law(values: Values, name: str = name) -> Any:
            return jax.tree.leaves(target.run(values)[name]["fn"])

        if depends(law, {**latents, **x0}):
            raise CapabilityError(
                f"SMC: the law of the chain {name!r} depends on what is drawn before it, which the "
                "JAX engine does not carry; make it a program of the torch engine, or a separate "
                "inference for each value."
            )
    late: set[str] = set()
    while True:
        moving = {**x0, **{name: latents[name] for name in late}}

        def score(values: Values, name: str) -> Array:
            return _score(target.run({**latents, **values})[name])

        new = {n for n in latents.keys() - late if depends(partial(score, name=n), moving)}
        if not new:
            break
        late |= new
    early = tuple(name for name in target.latents if name not in late)
    return replace(target, latents=early, late=tuple(n for n in target.latents if n in late))


def require_whole_plates(found: Mapping[str, Any], owner: str) -> None:
    """Refuse plates of which a random part is seen: a run of the program is not its density.

    :param found: a trace.
    :param owner: what errors call the method.
    :raises CapabilityError: if there is such a plate.
    """
    for site in found.values():
        if site["type"] == "plate" and site["args"][1] not in (None, site["args"][0]):
            raise CapabilityError(
                f"{owner}: the plate {site['name']!r} shows a random part of what it holds; drop "
                "subsample_size, as particles have to be weighed by all of it."
            )


def sites_of(target: ProgramTarget) -> LatentSites:
    """Return how the latents of a program can be moved."""
    found = _traced(target.model, target.args, target.kwargs, jax.random.key(0))
    latents = {name: found[name]["value"] for name in target.latents}

    def bounded(name: str) -> bool:
        def support(values: Values) -> Any:
            given = {**target._any, **values}
            return jax.tree.leaves(target.run(given)[name]["fn"].support)

        return depends(support, latents)

    left = {n: "its support depends on other sites" for n in latents if bounded(n)}
    late = dict.fromkeys(target.late, "its law depends on the sequences")
    return latent_sites(found, [*target.latents, *target.late], {**left, **late})


def _require_plain(name: str, chain: ReverseChain, scale: Any) -> None:
    if scale is not None:
        raise CapabilityError(
            f"SMC: the chain {name!r} is scaled, so that its density is another one than that of "
            "its steps; leave the scale, or the subsampling of its plate, out."
        )
    if getattr(chain, "steering", None) is not None:
        raise CapabilityError(
            f"SMC: the chain {name!r} is steered by particles of its own; leave steer out here."
        )


def _require_ends(target: ProgramTarget, found: Mapping[str, Any]) -> None:
    """Refuse a program that reads noisy states; while something is compiled nobody can tell."""
    values = {name: found[name]["value"] for name in target.latents + target.late}
    x0 = {name: found[name]["value"][..., -1, :] for name, _ in target.chains}
    again = target.run({**values, **x0})
    shown = [name for name, site in found.items() if site["type"] == "deterministic"]
    whole = [target.weigh(found), *(found[name]["value"] for name in shown)]
    ends = [target.weigh(again), *(again[name]["value"] for name in shown)]
    if any(isinstance(x, jax.core.Tracer) for x in (*whole, *ends)):
        return
    for a, b in zip(whole, ends, strict=True):
        if not np.allclose(a, b, rtol=1e-4, atol=1e-4, equal_nan=True):
            raise CapabilityError(
                "SMC: what the program observes, or a deterministic site, depends on other states "
                "of a path than the last one; let it read the clean sequence, chain.x0(path)."
            )


def _traced(
    model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], key: Array
) -> dict[str, Any]:
    first, second = jax.random.split(key)
    # Innermost, so that values of handlers outside are known by then, and those of seed are not.
    program = trace(seed(_AnyPaths(model, second), first))
    found: dict[str, Any] = program.get_trace(*args, **kwargs)
    return found


class _AnyPaths(Messenger):
    """Give unobserved chains any paths: what a program is made of does not take their networks."""

    def __init__(self, fn: Any, key: Array) -> None:
        super().__init__(fn)
        self.key = key

    def process_message(self, msg: dict[str, Any]) -> None:
        """Draw each state of a path by itself, with the prompt in place."""
        chain = msg.get("fn")
        if (
            msg["type"] != "sample"
            or msg["value"] is not None
            or not isinstance(chain, ReverseChain)
        ):
            return
        self.key, own = jax.random.split(self.key)
        shape = (*chain.batch_shape, *chain.event_shape)
        process, kind = chain.kernel.process, int64_of(jnp)
        path = jax.random.randint(own, shape, 0, process.num_states, kind)
        path = path.at[..., -1, :].set(path[..., -1, :] % process.vocab_size)  # clean at the end
        msg["value"] = jnp.where(chain.fixed[..., None, :], chain.prompt[..., None, :], path)


def total_log_prob(sites: Iterable[Mapping[str, Any]]) -> Array:
    """Return the sum of the log-densities of sites, scaled and masked, ``()``.

    :param sites: sample sites of a trace.
    """
    return sum((jnp.sum(_score(site)) for site in sites), jnp.zeros(()))


def _score(site: Mapping[str, Any]) -> Array:
    """Return the log-density of a site, scaled and masked."""
    log_p = site["fn"].log_prob(site["value"])
    return log_p if site["scale"] is None else site["scale"] * log_p
