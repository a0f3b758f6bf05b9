r"""The precision policy: how uniforms become moves and tokens without losing rare ones.

Gumbel-max over all classes is an exponential race ``argmin E_i / p_i``. Its clocks ``E`` come from
uniforms on a lattice and cannot be smaller than some ``e0`` (about ``2^-24`` in float32), so a
class with ``p_i`` far below ``e0`` can never win. In an ancestral step of ``N`` the tokens carry
only ``O(1/N)`` of the mass and the mask the rest: rare tokens vanish and flat sites are revealed
too late, the more so the finer the grid (Zheng et al. 2024, arXiv:2409.02908, section 5; their
proposition 5.2 is the law that is drawn instead). Hence, everywhere in this library:

1. **The move first.** Stay, denoiser or prior is decided by one uniform against float64 weights
   (:func:`~ppl_diffusion.processes.mixture_sample`) or by event times; mask and tokens never meet
   in one race.
2. **Then one token from the unscaled prediction**, only where it is needed: one float64 uniform
   per row inverts the float64 distribution function (:func:`draw_categorical`). Nothing depends
   on the number of steps, and a uniform source of resolution ``h`` errs by at most ``h`` in any
   probability.
3. **A class of probability zero is never drawn**, whatever the round-off of a sum.
4. **Uniforms have resolution to spare**: ``2^-53`` from torch (:func:`uniforms`); from JAX 64
   random bits each, whose floats keep their full precision towards zero (:func:`jax_uniforms`).
   With JAX's default 32-bit floats the distribution function is built from the rarest class up:
   rare classes then lie near zero, where both the sum and the uniform have relative precision.
"""

import math
from collections.abc import Sequence

import torch
from array_api_compat import is_torch_array

from ppl_diffusion.arrays import Array, array_namespace, device_of, float64_of, int64_of, to_float64

BLOCK = 256
"""Classes per block of the two-level search; smaller vocabularies are searched at once."""

PAIRS = 8
"""Classes up to which JAX compares all pairs in place of sorting them."""

CHUNK = 2**20
"""Probabilities held at a time while rows are drawn (8 MB): they stay in the processor's cache."""


def uniforms(
    shape: Sequence[int],
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Return float64 uniforms on ``[0, 1)`` with resolution ``2^-53``.

    :param device: where to put them. A generator of another device draws there, and the numbers
        are moved: a seed means the same everywhere.
    """
    source = device if generator is None else generator.device
    drawn = torch.rand(tuple(shape), dtype=torch.float64, generator=generator, device=source)
    return drawn if device is None else drawn.to(device)


def jax_uniforms(key: Array, shape: Sequence[int], streams: Array = 0) -> Array:
    """Return uniforms on ``[0, 1)`` from 64 random bits each, exact towards zero.

    ``jax.random.uniform`` puts its values on the lattice of ``2^-23`` (float32). Here the leading
    zeros of the bits become the exponent and the bits after them the mantissa, cut and never
    rounded: ``P(u < x) = x`` for every float ``x`` of at least ``2^-32``. One block of Threefry
    (Salmon et al. 2011) has these 64 bits; the ``i``-th number of a stream depends on nothing but
    the key, the stream and ``i``.

    :param key: a JAX random key.
    :param streams: which of the key's independent sequences, integers ``(*batch,)``.
    :returns: ``(*batch, *shape)``, float64, or float32 where 64-bit numbers are switched off.
    """
    import jax
    import jax.numpy as jnp

    high, low = _threefry(key, shape, streams)
    zeros = jax.lax.clz(high)
    # 32 bits from the first one on; a shift by all 32 bits is undefined, hence the two cases.
    kept = jnp.where(zeros == 0, high, (high << (zeros % 32)) | (low >> (32 - zeros) % 32))
    kept = jnp.where(zeros == 32, low, kept)
    # 2^-zeros, by its exponent bits: ldexp minds subnormal numbers, and would cost the most here.
    scale = jax.lax.bitcast_convert_type((127 - zeros) << 23, jnp.float32).astype(float)
    if float64_of(jnp) == jnp.float32:
        return (kept >> 8).astype(float) * 2.0**-24 * scale
    rest = jnp.where(zeros == 32, 0, low << (zeros % 32)) >> 11  # 21 more bits: 53 in all
    return (kept.astype(float) * 2.0**-32 + rest.astype(float) * 2.0**-53) * scale


def _threefry(key: Array, shape: Sequence[int], streams: Array) -> Sequence[Array]:
    """Return two words of 32 random bits for each number, ``(*batch, *shape)``."""
    import jax
    import jax.numpy as jnp
    from jax.extend.random import threefry2x32_p

    # Keys that are split or folded off the same key count with a high word of zero.
    high = jnp.asarray(streams, "uint32") + 1
    low = jnp.arange(math.prod(shape), dtype="uint32").reshape(tuple(shape))
    counters = jnp.broadcast_arrays(high.reshape(*high.shape, *(1,) * low.ndim), low)
    first, second, *_ = jax.random.key_data(key)
    words: Sequence[Array] = threefry2x32_p.bind(first, second, *counters)
    return words


def draw_categorical(log_c: Array, uniforms: Array) -> Array:
    """Draw from each row of ``log_c`` by inverting its distribution function.

    Float64 in torch, with a two-level search for large vocabularies; JAX with 32-bit floats sums
    the classes in ascending order. Never returns a class of probability zero.

    :param log_c: log-probabilities, up to a constant per row, shape ``(..., V)``.
    :param uniforms: numbers in ``[0, 1)``, shape ``(...)``; the two broadcast.
    :returns: int64 ids, shape ``(...)``.
    """
    if is_torch_array(log_c):
        return _draw_torch(log_c, uniforms)
    xp = array_namespace(log_c)
    if float64_of(xp) == xp.float64:
        return _invert(xp.exp(to_float64(log_c)), to_float64(uniforms))
    if log_c.shape[-1] <= PAIRS:
        return _invert_pairs(xp.exp(log_c), to_float64(uniforms))
    order = xp.argsort(log_c, axis=-1)
    rank = _invert(xp.exp(xp.take_along_axis(log_c, order, axis=-1)), to_float64(uniforms))
    order = xp.broadcast_to(order, (*rank.shape, order.shape[-1]))
    return xp.take_along_axis(order, rank[..., None], axis=-1)[..., 0]


def _invert(weights: Array, u: Array) -> Array:
    """Return the class at which the cumulative sum of the weights passes ``u`` times the total."""
    xp = array_namespace(weights)
    cdf = xp.cumulative_sum(weights, axis=-1)
    passed = cdf <= (u * cdf[..., -1])[..., None]
    index = xp.sum(xp.astype(passed, int64_of(xp)), axis=-1)
    # Parallel sums are not monotone to the last bit, and u * total may round up to the total:
    # the class with mass at or before that index is the one.
    classes = xp.arange(weights.shape[-1], device=device_of(weights))
    reached = (classes <= index[..., None]) & (weights > 0)
    return xp.max(xp.where(reached, classes, 0), axis=-1)


def _invert_pairs(weights: Array, u: Array) -> Array:
    """Return the same, the sums taken from the rarest class up by comparing all pairs of classes.

    XLA sorts short rows at several times the price.
    """
    xp = array_namespace(weights)
    classes = xp.arange(weights.shape[-1])
    this, other = weights[..., :, None], weights[..., None, :]
    upto = (other < this) | ((other == this) & (classes <= classes[:, None]))
    cdf = xp.sum(xp.where(upto, other, 0.0), axis=-1)
    passed = cdf <= (u * xp.max(cdf, axis=-1))[..., None]
    # A class without mass is always passed; where u * total rounds up to the total, all are.
    chosen = xp.minimum(xp.sum(passed, axis=-1) + 1, len(classes))
    return xp.sum(xp.where(xp.sum(upto, axis=-1) == chosen[..., None], classes, 0), axis=-1)


def _draw_torch(log_c: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    log_c, u = log_c.detach(), u.to(torch.float64)
    if log_c.shape[:-1] == u.shape and log_c.numel() <= CHUNK and log_c.shape[-1] <= 4 * BLOCK:
        return _search(log_c.to(torch.float64).exp(), u[..., None])[0][..., 0]
    # To (rows, V) and (rows, draws): a row is summed once for all its draws.
    shape = torch.broadcast_shapes(log_c.shape[:-1], u.shape)
    lead = (*(1,) * (len(shape) - log_c.ndim + 1), *log_c.shape[:-1])
    order = sorted(range(len(shape)), key=lambda d: (lead[d] == 1, d))
    moved = u.expand(shape).permute(order)
    if moved.numel() == 0:
        return moved.new_empty(shape, dtype=torch.int64)
    rows = math.prod(lead)
    drawn, _ = _draw_rows(log_c.reshape(rows, -1), moved.reshape(rows, -1).contiguous())
    return drawn.reshape(moved.shape).permute([order.index(d) for d in range(len(shape))])


def draw_normalised(
    log_c: torch.Tensor, uniforms: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one class from each row of a prediction, and return what the rows sum to.

    One pass over the vocabulary for the draw and for the check. Rows of a large vocabulary in
    float32 keep float32, all the precision they have, up to the sums of the blocks; these, and the
    classes of the chosen block, are added in float64, so rare classes lose nothing. Torch only.

    :param log_c: log-probabilities that should be normalised, ``(n, V)``.
    :param uniforms: numbers in ``[0, 1)``, float64 ``(n,)``.
    :returns: int64 ids ``(n,)`` and float64 totals ``(n,)``.
    """
    log_c, u = log_c.detach(), uniforms[:, None]
    if log_c.shape[-1] <= 4 * BLOCK and log_c.numel() <= CHUNK:
        index, cdf = _search(log_c.to(torch.float64).exp(), u)
        return index[:, 0], cdf[:, -1]
    small = log_c.shape[-1] <= 4 * BLOCK
    dtype = torch.float64 if small else torch.promote_types(log_c.dtype, torch.float32)
    drawn, total = _draw_rows(log_c, u.contiguous(), dtype)
    return drawn[:, 0], total


def likeliest(rows: torch.Tensor) -> torch.Tensor:
    """Return the first largest entry of each row. Torch only.

    :param rows: ``(n, V)``.
    :returns: int64 ``(n,)``.
    """
    size, width = rows.shape[-1], 64
    if size < BLOCK or not len(rows):
        return rows.argmax(-1)
    # Unlike its place, the value of a maximum is found many entries at a time.
    whole = size // width * width
    top, block = rows[:, :whole].unflatten(-1, (-1, width)).amax(-1).max(-1)
    start = block * width
    places = start[:, None] + torch.arange(width, device=rows.device)
    found = start + rows.gather(-1, places).argmax(-1)
    if whole == size:
        return found
    rest, place = rows[:, whole:].max(-1)
    return torch.where(rest > top, place + whole, found)


def _draw_rows(
    log_c: torch.Tensor, u: torch.Tensor, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw chunk by chunk, in one buffer that stays in cache; return the totals of the rows too."""
    rows, size = log_c.shape
    width = size if size <= 4 * BLOCK else size + -size % BLOCK
    room = 32 * CHUNK if log_c.is_cuda else CHUNK  # there, few large launches
    step = max(1, min(rows, room // (width + u.shape[1])))
    buffer = log_c.new_empty((step, width), dtype=dtype)
    buffer[:, size:] = 0.0
    parts = []
    for logs, draws in zip(log_c.split(step), u.split(step), strict=True):
        p = buffer[: len(logs)]
        torch.exp(logs.to(dtype), out=p[:, :size])
        parts.append(_draw_chunk(p, draws))
    drawn, total = (torch.cat(part) for part in zip(*parts, strict=True))
    return drawn.clamp_max(size - 1), total  # a row without mass would end in the padding


def _draw_chunk(p: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if p.shape[1] <= 4 * BLOCK * u.shape[1]:  # blocks pay where a row has few draws
        index, cdf = _search(p, u)
        return index, cdf[:, -1]
    blocks = p.view(len(p), -1, BLOCK)
    sums = blocks.sum(-1).to(torch.float64)  # a sum with a dtype would copy the whole buffer
    block, edges = _search(sums, u)
    before = (edges - sums).gather(1, block)
    picked = blocks.gather(1, block[..., None].expand(*block.shape, BLOCK)).flatten(0, 1)
    rest = (u * edges[:, -1:] - before).clamp_min(0).reshape(-1, 1)
    index = _search(picked, rest, relative=False)[0].view_as(block)
    return block * BLOCK + index, edges[:, -1]


def _search(
    p: torch.Tensor, point: torch.Tensor, *, relative: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the class of every draw, ``(*rows, draws)``, and the cumulative sums."""
    cdf = p.cumsum(-1, dtype=torch.float64)
    total = cdf[..., -1:]
    target = point * total if relative else point
    # u * total may round up to the total, behind which there is no class.
    target = torch.minimum(target, torch.nextafter(total, total.new_zeros(())))
    index = torch.searchsorted(cdf, target, right=True).clamp_max(p.shape[-1] - 1)
    if p.is_cuda:  # parallel sums are not monotone to the last bit, see _invert
        classes = torch.arange(p.shape[-1], device=p.device)
        index = torch.where(p > 0, classes, 0).cummax(-1).values.gather(-1, index)
    return index, cdf
