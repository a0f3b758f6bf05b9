"""Particles on several devices: each moves a part of them, and all of them know all weights.

Between two resamplings a device is alone with its particles: their networks, their potentials and
their noise, which comes from keys of their own. What a population shares is gathered first, so that
each device sums the same numbers in the same order: weights, evidence and ancestors do not depend
on how many devices there are. Resampling gathers the states with what was predicted at them, and
each device takes those of its slots.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ppl_diffusion.arrays import Array

Out = TypeVar("Out")
Tree = TypeVar("Tree")
Size = tuple[int, int]

BLOCK = 512
"""Tokens that a processor is given at once: as fast as more of them for the networks shipped."""


@dataclass(frozen=True)
class Shards:
    """How a population of ``(R, N)`` particles lies on devices; by default all on one.

    :param axis: name of the mesh axis that ``N`` is cut along; None where nothing is cut.
    :param count: number of devices ``D`` along it.
    :param block: numbers that a network or a potential is given at once; None for all there are.
    """

    axis: str | None = None
    count: int = 1
    block: int | None = None

    def part(self, size: Size) -> Size:
        """Return the size of what one device has, ``(R, N / D)``."""
        return size[0], size[1] // self.count

    def whole(self, tree: Tree) -> Tree:
        """Return arrays of all particles, ``(R, N, ...)``, from those of each device."""
        if self.axis is None:
            return tree
        return jax.tree.map(lambda x: lax.all_gather(x, self.axis, axis=1, tiled=True), tree)

    def own(self, x: Array) -> Array:
        """Return this device's part, ``(R, N / D, ...)``, of an array of all particles."""
        if self.axis is None:
            return x
        part = x.shape[1] // self.count
        return lax.dynamic_slice_in_dim(x, lax.axis_index(self.axis) * part, part, 1)

    def each(self, fn: Callable[..., Out], *trees: Any) -> Out:
        """Return what a function says about each of this device's particles, ``(R, N / D, ...)``.

        It is asked in blocks of one size, the last one filled up: by how many rows there are a
        matrix product decides how it sums, and so the last bits of every row.

        :param fn: takes batches ``(*batch, ...)``, and returns such.
        :param trees: its arguments, ``(R, N / D, ...)``.
        """
        if self.block is None:
            return fn(*trees)
        leaves = jax.tree.leaves(trees)
        size = leaves[0].shape[:2]
        number = math.prod(size)
        rows = max(1, self.block * number // sum(x.size for x in leaves))
        blocks = -(-number // rows)

        def cut(x: Array) -> Array:
            return jnp.resize(x, (blocks, rows, *x.shape[2:]))  # repeats what there is

        def joined(x: Array) -> Array:
            return x.reshape(-1, *x.shape[2:])[:number].reshape(*size, *x.shape[2:])

        given = jax.tree.map(cut, trees)
        shapes = jax.eval_shape(lambda: fn(*jax.tree.map(lambda x: x[0], given)))
        empty = jax.tree.map(lambda x: jnp.zeros((blocks, *x.shape), x.dtype), shapes)

        def fill(i: Array, answers: Out) -> Out:
            own = fn(*jax.tree.map(lambda x: x[i], given))
            return jax.tree.map(lambda x, y: x.at[i].set(y), answers, own)

        # Always `blocks`, which the compiler must not know: a loop of one round is merged with what
        # stands around it, and then rounds as that does.
        rounds = jnp.maximum(blocks, (leaves[0].ravel()[0] > 0).astype(int))
        return jax.tree.map(joined, lax.fori_loop(0, rounds, fill, empty))


def on_mesh(mesh: Mesh | None, run: Callable[..., Out], layout: Any) -> Callable[..., Out]:
    """Return a function that runs on all devices of a mesh at once; to be compiled.

    :param mesh: the devices, None for where JAX puts things.
    :param run: takes pytrees, of which every device has a copy.
    :param layout: a ``PartitionSpec`` for each result of one device, or for a tree of them.
    """
    if mesh is None:
        return run

    def spread(*given: Any) -> Out:
        arrays, rest = eqx.partition(given, eqx.is_array)

        def one(arrays: Any) -> Out:
            return run(*eqx.combine(arrays, rest))

        # What all devices compute from gathered numbers is the same, which JAX cannot know.
        return jax.shard_map(
            one, mesh=mesh, in_specs=PartitionSpec(), out_specs=layout, check_vma=False
        )(arrays)

    return spread


def on_each_device(mesh: Mesh | None, tree: Tree) -> Tree:
    """Return a pytree with a copy of its arrays on each device of a mesh."""
    return tree if mesh is None else eqx.filter_shard(tree, NamedSharding(mesh, PartitionSpec()))


def shards_of(mesh: Mesh | None, num_particles: int, owner: str) -> Shards:
    """Return how particles lie on the devices of a mesh, or on the one where JAX puts things.

    :param owner: what errors call the method.
    :raises ValueError: if the mesh has more axes than one, or does not divide the particles.
    """
    if mesh is None:
        return Shards()
    # An accelerator sums as it likes, and is fastest when it is given all there is.
    block = BLOCK if mesh.devices.flat[0].platform == "cpu" else None
    if len(mesh.axis_names) != 1:
        raise ValueError(
            f"{owner}: mesh must have one axis, along which particles are cut, and has "
            f"{len(mesh.axis_names)}; make one by jax.make_mesh((number,), ('particles',))."
        )
    if num_particles % mesh.size:
        raise ValueError(
            f"{owner}: {num_particles} particles cannot be shared equally by {mesh.size} devices; "
            f"take a multiple of {mesh.size}."
        )
    return Shards(mesh.axis_names[0], mesh.size, block)
