"""Which sequences of a plate are independent given everything else, read off the program.

What weighs a program is traced to its operations, and the dimension of a plate is followed through
them, as ``vmap`` follows a batch. A site whose log-density arrives with that dimension weighs each
sequence by itself; one that has mixed it couples them, whatever plate it was written in. An
operation that is not known here counts as mixing: it costs speed and never correctness.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from ppl_diffusion.arrays import Array
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.numpyro.program import ProgramTarget, Values
from ppl_diffusion.numpyro.reverse_chain import ReverseChain

MIXED = -1
"""Some entry depends on several elements; None: no entry depends on any."""
Mark = int | None
Rule = Callable[[Any, list[Mark]], Mark]


class Elements(ProgramTarget):
    """A program whose plates are taken apart: each element ``E`` is a run of its own.

    :param plates: the plates of its chains.
    :param apart: dimensions of the plates that are independent elements.
    :param axes: for each site that weighs, where its log-density has these dimensions; None of a
        site that the chains do not matter to.
    """

    plates: tuple[int, ...] = eqx.field(static=True)
    apart: tuple[int, ...] = eqx.field(static=True)
    axes: tuple[tuple[int, ...] | None, ...] = eqx.field(static=True)

    @classmethod
    def of(cls, chains: Mapping[str, ReverseChain], target: ProgramTarget) -> Elements:
        """Find the elements of a program without latents; where all is coupled there is one.

        :raises CapabilityError: if the law of a chain depends on another chain.
        """
        parts = {name: getattr(target, name) for name in target.__dataclass_fields__}
        plates = {tuple(chain.batch_shape) for chain in chains.values()}
        shape = plates.pop() if len(plates) == 1 else ()
        free = all(c.added.ndim == 0 and getattr(c, "psi", None) is None for c in chains.values())
        wide = [d for d, size in enumerate(shape) if size > 1] if free else []
        x0 = {name: jnp.zeros(own, int) for name, own in target.shapes}
        _require_apart(target, x0)
        followed = {d: follow(target.scores, x0, d) for d in wide}
        apart = tuple(d for d, marks in followed.items() if MIXED not in marks)
        marks = zip(*(followed[d] for d in apart), strict=True)
        axes = tuple(None if None in site else site for site in marks) if apart else ()
        return cls(**parts, plates=shape, apart=apart, axes=axes)

    def each(self, chains: Mapping[str, ReverseChain]) -> dict[str, ReverseChain]:
        """Return the chains of one element; what differs between elements is broadcast."""
        return {name: self._one(chain) for name, chain in chains.items()}

    def _one(self, chain: ReverseChain) -> ReverseChain:
        new = copy.copy(chain)
        new._batch_shape = self._rest(chain.batch_shape)
        for name in {"prompt", "held"} & set(vars(chain)):
            whole = jnp.broadcast_to(getattr(chain, name), (*chain.batch_shape, chain.length))
            setattr(new, name, self.split(whole)[:, None])
        return new

    def _rest(self, plates: Sequence[int]) -> tuple[int, ...]:
        return tuple(size for d, size in enumerate(plates) if d not in self.apart)

    @property
    def count(self) -> int:
        """Number ``E`` of elements."""
        return math.prod(self._sizes)

    @property
    def _sizes(self) -> tuple[int, ...]:
        return tuple(self.plates[d] for d in self.apart)

    def split(self, x: Array) -> Array:
        """Put elements first: ``(*plates, ...)`` to ``(E, *rest, ...)``."""
        front = jnp.moveaxis(x, self.apart, range(len(self.apart)))
        return front.reshape(self.count, *front.shape[len(self.apart) :])

    def join(self, x: Array, at: int = 0) -> Array:
        """Put elements back in their plates, the first of which is dimension ``at``."""
        front = x.reshape(*self._sizes, *x.shape[1:])
        return jnp.moveaxis(front, range(len(self.apart)), [at + d for d in self.apart])

    def log_joint(self, latents: Values, x0: Values) -> Array:
        """Return ``log p(y | x0)`` of each element, up to a constant, ``(E, *batch)``.

        :param x0: clean sequences by chain, ``(E, *batch, *rest, L)``.
        """
        name, own = self.shapes[0]
        batch = x0[name].ndim - 1 - len(self._rest(own))
        scored = self._scored
        for _ in range(batch):
            scored = jax.vmap(scored)
        values = {name: self.join(x, batch) for name, x in x0.items()}
        return jnp.moveaxis(scored(values), -1, 0)

    def _scored(self, values: Values) -> Array:
        """Return what each element is worth in one state of the plates, ``(E,)``."""
        scores, total = self.scores(values), jnp.zeros(self.count)
        where = self.axes if self.apart else ((),) * len(scores)
        for score, axes in zip(scores, where, strict=True):
            if axes is not None:
                front = jnp.moveaxis(score, axes, range(len(axes)))
                total = total + front.reshape(self.count, -1).sum(-1)
        return total


def _require_apart(target: ProgramTarget, x0: Values) -> None:
    """Refuse chains given chains, of which only the first would be seen to move."""
    for name in x0 if len(x0) > 1 else ():
        marks = follow(lambda x0, name=name: jax.tree.leaves(target.run(x0)[name]["fn"]), x0, 0)
        if any(mark is not None for mark in marks):
            raise CapabilityError(
                f"ParticleGibbs: the law of the chain {name!r} depends on another chain; give each "
                "of them a ParticleGibbs block of its own in numpyro.infer.gibbs.Gibbs."
            )


def follow(fn: Callable[..., Any], values: Any, axis: int) -> list[Mark]:
    """Follow a dimension of arrays through a function of them.

    :param fn: a function of ``values`` that returns arrays.
    :param axis: the dimension of each array among ``values``, counted from the front.
    :returns: where each array that it returns has the dimension: entry ``i`` along it depends on
        the entries ``i`` of the values only. None: it depends on none; :data:`MIXED`: on several.
    """
    traced = jax.make_jaxpr(fn)(values)
    return _followed(traced.jaxpr, [axis] * len(traced.jaxpr.invars))


def _followed(jaxpr: Any, marks: Sequence[Mark]) -> list[Mark]:
    known: dict[Any, Mark] = dict(zip(jaxpr.invars, marks, strict=True))

    def mark(atom: Any) -> Mark:
        return None if hasattr(atom, "val") else known.get(atom)

    for eqn in jaxpr.eqns:
        found = _through(eqn, [mark(atom) for atom in eqn.invars])
        known.update(zip(eqn.outvars, found, strict=True))
    return [mark(atom) for atom in jaxpr.outvars]


def _through(eqn: Any, marks: list[Mark]) -> list[Mark]:
    """Return the marks of what an operation returns."""
    count = len(eqn.outvars)
    if all(mark is None for mark in marks):
        return [None] * count
    if MIXED in marks:
        return [MIXED] * count
    name = eqn.primitive.name
    inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    if name in CALLS and inner is not None:
        return _followed(getattr(inner, "jaxpr", inner), marks)
    rule = RULES.get(name)
    return [MIXED if rule is None else rule(eqn, marks)] * count


def _shared(marks: Sequence[Mark]) -> int:
    """Return the one dimension that all have that have it."""
    found = {mark for mark in marks if mark is not None}
    return found.pop() if len(found) == 1 else MIXED


def _elementwise(eqn: Any, marks: list[Mark]) -> Mark:
    return _shared(marks)


def _kept(*names: str) -> Rule:
    """Return the rule of operations on some dimensions, which leave all others where they are."""

    def rule(eqn: Any, marks: list[Mark]) -> Mark:
        axis, touched = _shared(marks), next(eqn.params[n] for n in names if n in eqn.params)
        return MIXED if axis in (touched if isinstance(touched, tuple) else (touched,)) else axis

    return rule


def _dropped(name: str) -> Rule:
    """Return the rule of operations that remove some dimensions."""
    kept = _kept(name)

    def rule(eqn: Any, marks: list[Mark]) -> Mark:
        axis = kept(eqn, marks)
        if axis is None or axis == MIXED:
            return axis
        return axis - sum(d < axis for d in eqn.params[name])

    return rule


def _broadcast(eqn: Any, marks: list[Mark]) -> Mark:
    dims: tuple[int, ...] = eqn.params["broadcast_dimensions"]
    axis = _shared(marks)
    return axis if axis == MIXED else dims[axis]


def _transposed(eqn: Any, marks: list[Mark]) -> Mark:
    axis = _shared(marks)
    return axis if axis == MIXED else tuple(eqn.params["permutation"]).index(axis)


def _reshaped(eqn: Any, marks: list[Mark]) -> Mark:
    axis, old, new = _shared(marks), eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    if axis == MIXED or eqn.params["dimensions"] is not None:
        return MIXED
    before = math.prod(old[:axis])
    fits = (d for d, size in enumerate(new) if size == old[axis])
    return next((d for d in fits if math.prod(new[:d]) == before), MIXED)


def _sliced(eqn: Any, marks: list[Mark]) -> Mark:
    axis = _shared(marks)
    whole = eqn.outvars[0].aval.shape[axis] == eqn.invars[0].aval.shape[axis]
    return axis if axis != MIXED and whole and marks[0] is not None else MIXED


def _sliced_at(eqn: Any, marks: list[Mark]) -> Mark:
    moved = any(mark is not None for mark in marks[1:])
    return MIXED if moved else _sliced(eqn, marks)


def _product(eqn: Any, marks: list[Mark]) -> Mark:
    contracted, batch = eqn.params["dimension_numbers"]
    ranks = [len(v.aval.shape) for v in eqn.invars]

    def out(side: int, axis: int) -> int:
        if axis in contracted[side]:
            return MIXED
        if axis in batch[side]:
            return tuple(batch[side]).index(axis)
        used = {*contracted[side], *batch[side]}
        free = [d for d in range(ranks[side]) if d not in used]
        # The dimensions of the result: of both, then the free ones of the left, and of the right.
        return (
            len(batch[0])
            + side * (ranks[0] - len(contracted[0]) - len(batch[0]))
            + free.index(axis)
        )

    found = [out(side, axis) for side, axis in enumerate(marks) if axis is not None]
    beside = len(found) == 1 or found[0] < len(batch[0])
    return found[0] if len(set(found)) == 1 and beside else MIXED


def _gathered(eqn: Any, marks: list[Mark]) -> Mark:
    """Entries looked up: where indices differ by element, or what is looked up in, or both."""
    where, (operand, indices) = eqn.params["dimension_numbers"], marks
    shape, rank = eqn.invars[0].aval.shape, len(eqn.outvars[0].aval.shape)
    batch = [d for d in range(rank) if d not in where.offset_dims]
    paired = dict(zip(where.operand_batching_dims, where.start_indices_batching_dims, strict=True))
    if operand is None:
        last = len(eqn.invars[1].aval.shape) - 1
        return MIXED if indices is None or indices == last else batch[indices]
    if operand in paired:
        return batch[paired[operand]] if indices in (None, paired[operand]) else MIXED
    whole = eqn.params["slice_sizes"][operand] == shape[operand]
    gone = {*where.collapsed_slice_dims, *where.operand_batching_dims}
    if indices is not None or not whole or operand in gone:
        return MIXED
    kept = [d for d in range(len(shape)) if d not in gone]
    return int(where.offset_dims[kept.index(operand)])


def _convolved(eqn: Any, marks: list[Mark]) -> Mark:
    where = eqn.params["dimension_numbers"]
    alone = marks[1] is None and eqn.params["batch_group_count"] == 1
    return int(where.out_spec[0]) if alone and marks[0] == where.lhs_spec[0] else MIXED


CALLS = {"jit", "pjit", "closed_call", "checkpoint", "custom_jvp_call", "custom_vjp_call"}
ELEMENTWISE = """abs acos acosh add and asin asinh atan atan2 atanh cbrt ceil clamp
    convert_element_type copy cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt
    igamma igammac integer_pow is_finite le lgamma log log1p logistic lt max min mul ne neg
    nextafter not or pow reduce_precision regularized_incomplete_beta rem round rsqrt select_n
    shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt square stop_gradient
    sub tan tanh xor"""
RULES: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE.split(), _elementwise),
    **{f"reduce_{n}": _dropped("axes") for n in ("sum", "max", "min", "prod", "and", "or", "xor")},
    **dict.fromkeys(("argmax", "argmin"), _dropped("axes")),
    "squeeze": _dropped("dimensions"),
    **dict.fromkeys(("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"), _kept("axis")),
    **dict.fromkeys(
        ("sort", "concatenate", "rev", "split"), _kept("dimension", "dimensions", "axis")
    ),
    "broadcast_in_dim": _broadcast,
    "transpose": _transposed,
    "reshape": _reshaped,
    "slice": _sliced,
    "dynamic_slice": _sliced_at,
    "dot_general": _product,
    "gather": _gathered,
    "conv_general_dilated": _convolved,
}
"""How each operation carries the dimension along."""
