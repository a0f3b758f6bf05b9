"""The bound of the uniform process on large vocabularies, without a second table of size ``V``.

For ``pi = 1/V`` the integrand of :func:`~ppl_diffusion.processes.nelbo_terms` needs only three
numbers of a denoiser's row ``c``: with ``kappa = V a / (1 - a)`` and ``q_j = kappa c_j``, so that
``Y_j = V a c_j + 1 - a = (1 - a) (1 + q_j)``, these are ``q`` at the noised and at the clean token
and ``G = sum_j log(1 + q_j)`` (Duo, Sahoo et al. 2025, arXiv:2506.10892, Eq. 17, divided by
``1 - a``: what is summed is then positive, and nothing cancels where ``a`` is close to 0 or 1).
Their gradients are written by hand, so that rows are visited in small chunks and the only table
that ever exists beside the logits is their gradient; :func:`uniform_nelbo_from_hidden` pulls the
vocabulary head into the chunks as well, and no table of all rows exists at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

# Numbers in one chunk of rows: a few megabytes, which a processor's cache holds. Elsewhere a
# chunk must keep thousands of cores busy.
_CHUNK_CPU, _CHUNK_DEVICE = 2**20, 2**26

# The bound is of order kappa**2 while its parts are of order kappa. In float32 that matters for
# kappa < 0.01, which a vocabulary above this size reaches only where alpha < 1e-5.
_ALWAYS_FLOAT64 = 1024


def uniform_nelbo_terms(
    x0: Tensor, z: Tensor, logits: Tensor, alpha: Tensor | float, alpha_prime: Tensor | float
) -> Tensor:
    """Return the integrand of the continuous-time NELBO of a uniform process, from logits.

    Equal to :func:`~ppl_diffusion.processes.nelbo_terms` with ``log_c = log_softmax(logits)``. No
    table of size ``V`` is made besides the gradient of ``logits``.

    :param x0: clean tokens, int64 ``(*batch, L)``.
    :param z: noised tokens, int64 ``(*batch, L)``.
    :param logits: unnormalised cavity log-probabilities, ``(*batch, L, V)``; what is below float32
        is computed in float32. ``-inf`` is a token of probability zero.
    :param alpha: signal level, in ``[0, 1]``, broadcastable to ``(*batch, L)``. A constant for the
        gradient, like ``alpha_prime``.
    :param alpha_prime: d alpha / d t, broadcastable to ``(*batch, L)``.
    :returns: nats, float64 ``(*batch, L)``, differentiable (once) in ``logits``. Zero where
        ``alpha`` is zero.
    :raises ValueError: if the shapes do not fit.
    """
    _check_shapes(x0, z, logits.shape[:-1])
    size = logits.shape[-1]
    a, slope = _per_row(alpha, x0), _per_row(alpha_prime, x0)
    ids = torch.stack([z.reshape(-1), x0.reshape(-1)], dim=-1)
    log_sum, q = _RowSums.apply(logits.reshape(-1, size), ids, _odds(a, size))
    return _bound(ids[:, 0] == ids[:, 1], log_sum, q, a, slope, size).reshape(x0.shape)


def uniform_nelbo_from_hidden(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    x0: Tensor,
    z: Tensor,
    alpha: Tensor | float,
    alpha_prime: Tensor | float,
    *,
    rows_per_chunk: int | None = None,
) -> Tensor:
    """Return :func:`uniform_nelbo_terms` of ``head(hidden)`` without holding its logits.

    A chunk of rows goes through the head and the bound, and is computed again for the gradient.
    Gradients reach ``hidden`` and the parameters of the head.

    :param hidden: hidden states, ``(*batch, L, D)``.
    :param head: an :class:`torch.nn.Linear`, or any map ``(rows, D) -> (rows, V)`` to
        log-probabilities, normalised or not.
    :param x0: clean tokens, int64 ``(*batch, L)``.
    :param z: noised tokens, int64 ``(*batch, L)``.
    :param alpha: signal level, broadcastable to ``(*batch, L)``.
    :param alpha_prime: d alpha / d t, broadcastable to ``(*batch, L)``.
    :param rows_per_chunk: positions that go through the head at a time; by default as many as
        fill a few megabytes.
    :returns: nats, float64 ``(*batch, L)``.
    :raises ValueError: if the shapes do not fit.
    """
    _check_shapes(x0, z, hidden.shape[:-1])
    rows = hidden.reshape(-1, hidden.shape[-1])
    size = _head_width(head, rows)
    # Larger chunks than elsewhere: below a few dozen rows a matrix product is slow.
    step = rows_per_chunk or 4 * _rows_that_fit(size, rows)
    columns = [x0.reshape(-1), z.reshape(-1), _per_row(alpha, x0), _per_row(alpha_prime, x0)]
    bound = _linear_bound if _is_plain(head, rows) else _checkpointed_bound
    return bound(head, rows, columns, size, step).reshape(x0.shape)


def _linear_bound(head: Any, hidden: Tensor, columns: list[Tensor], size: int, step: int) -> Tensor:
    x0, z, a, slope = columns
    ids = torch.stack([z, x0], dim=-1)
    log_sum, q = _LinearRowSums.apply(hidden, head.weight, head.bias, ids, _odds(a, size), step)
    return _bound(x0 == z, log_sum, q, a, slope, size)


def _checkpointed_bound(
    head: Callable[[Tensor], Tensor], hidden: Tensor, columns: list[Tensor], size: int, step: int
) -> Tensor:
    def bound(part: Tensor, x0: Tensor, z: Tensor, a: Tensor, slope: Tensor) -> Tensor:
        return uniform_nelbo_terms(x0, z, head(part), a, slope)

    chunks = zip(*(tensor.split(step) for tensor in (hidden, *columns)), strict=True)
    return torch.cat([checkpoint(bound, *chunk, use_reentrant=False) for chunk in chunks])


def _bound(kept: Tensor, log_sum: Tensor, q: Tensor, a: Tensor, slope: Tensor, size: int) -> Tensor:
    """Return the bound of every row from ``G`` and ``q`` at the noised and the clean token."""
    odds = _odds(a, size)
    q_z, q_x = q.unbind(-1)
    log_z, log_x, log_odds = q_z.log1p(), q_x.log1p(), odds.log1p()
    spread = log_sum - size * log_z
    stayed = (size + odds) * (odds - q_z) / (1 + q_z) - spread - (size - 1) * log_odds
    moved = (
        (odds - size * q_z) / (1 + q_z)
        - spread
        - odds
        + (1 + odds) * log_odds
        - odds * (log_x - log_z)
    )
    rate = torch.where(a > 0, -slope / (size * a), 0.0)
    return rate * torch.where(kept, stayed / (1 + odds), moved)


def _odds(a: Tensor, size: int) -> Tensor:
    # No noise at all would divide by zero; a position that was kept has a finite limit there.
    return size * a / (1 - a).clamp_min(1e-30)


class _RowSums(torch.autograd.Function):
    """``logits (n, V), ids (n, 2), odds (n,) -> G (n,), q at the ids (n, 2)``."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, odds: Tensor) -> tuple[Tensor, Tensor]:
        log_sum, total, q = _sums(logits, ids, odds)
        ctx.save_for_backward(logits, ids, odds, total, q)
        return log_sum, q

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sum: Tensor, grad_q: Tensor) -> tuple[Tensor, None, None]:
        logits, ids, odds, total, q = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        _pull_back(gradient, logits, ids, odds, total, grad_sum, grad_q * q)
        return gradient, None, None


class _LinearRowSums(torch.autograd.Function):
    """The same of ``hidden (n, D) @ weight.T + bias``, whose logits are never held."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        odds: Tensor,
        step: int,
    ) -> tuple[Tensor, Tensor]:
        parts = [
            _sums(F.linear(part, weight, bias), *others)
            for part, *others in _split(step, hidden, ids, odds)
        ]
        log_sum, total, q = (torch.cat(column) for column in zip(*parts, strict=True))
        ctx.save_for_backward(hidden, weight, bias, ids, odds, total, q)
        ctx.step = step
        return log_sum, q

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sum: Tensor, grad_q: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, ids, odds, total, q = ctx.saved_tensors
        to_hidden, to_weight, to_bias = (
            torch.zeros_like(leaf) if needed else None
            for leaf, needed in zip((hidden, weight, bias), ctx.needs_input_grad, strict=False)
        )
        columns = (hidden, ids, odds, total, grad_sum, grad_q * q)
        for index, (part, *others) in enumerate(_split(ctx.step, *columns)):
            table = F.linear(part, weight, bias)
            _pull_back(table, table, *others)
            if to_hidden is not None:
                torch.mm(table, weight, out=to_hidden[index * ctx.step :][: len(table)])
            if to_weight is not None:
                to_weight.addmm_(table.t(), part)
            if to_bias is not None:
                to_bias += table.sum(0)
        return to_hidden, to_weight, to_bias, None, None, None


def _sums(logits: Tensor, ids: Tensor, odds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``G``, the normaliser and ``q`` at the ids of every row."""
    step = _rows_that_fit(logits.shape[-1], logits)
    parts = [_chunk_sums(*part) for part in _split(step, logits, ids, odds)]
    log_sum, total, q = (torch.cat(column) for column in zip(*parts, strict=True))
    return log_sum, total, q


def _chunk_sums(logits: Tensor, ids: Tensor, odds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mass = _masses(logits)
    total = mass.sum(-1).double()
    scale = odds / total
    q = mass.gather(-1, ids) * scale[:, None]
    log_sum = mass.mul_(scale[:, None].to(mass.dtype)).log1p_().sum(-1).double()
    return log_sum, total, q


def _pull_back(target: Tensor, logits: Tensor, *columns: Tensor) -> None:
    """Write the gradient in the logits into ``target``, which may be the logits themselves."""
    step = _rows_that_fit(logits.shape[-1], logits)
    for part, *others in _split(step, target, logits, *columns):
        part.copy_(_chunk_gradient(*others))


def _chunk_gradient(
    logits: Tensor, ids: Tensor, odds: Tensor, total: Tensor, grad_sum: Tensor, picked: Tensor
) -> Tensor:
    """Return the gradient of a chunk in its logits; ``picked`` is that of ``log q`` at the ids."""
    p = _masses(logits)
    p.div_(total[:, None].to(p.dtype))
    size, weight = odds[:, None].to(p.dtype), grad_sum * odds
    share = p.mul(size).add_(1).reciprocal_().mul_(p).mul_(size)
    shift = picked.sum(-1) - weight * torch.linalg.vecdot(p, share)
    share.mul_(-weight[:, None].to(p.dtype)).sub_(shift[:, None].to(p.dtype))
    return p.mul_(share).scatter_add_(-1, ids, picked.to(p.dtype))


def _masses(logits: Tensor) -> Tensor:
    """Return the unnormalised probabilities of a chunk, its largest entry 1, as a new table."""
    wide = torch.float64 if logits.shape[-1] <= _ALWAYS_FLOAT64 else torch.float32
    work = torch.promote_types(logits.dtype, wide)
    return logits.to(work, copy=True).sub_(logits.amax(-1, keepdim=True)).exp_()


def _split(step: int, *columns: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(column.split(step) for column in columns), strict=True)


def _rows_that_fit(width: int, like: Tensor) -> int:
    budget = _CHUNK_CPU if like.device.type == "cpu" else _CHUNK_DEVICE
    return max(1, budget // width)


def _is_plain(head: Callable[[Tensor], Tensor], rows: Tensor) -> bool:
    # A subclass, a hook or automatic casting may make another map of it.
    return (
        type(head) is nn.Linear
        and not head._forward_hooks
        and not head._forward_pre_hooks
        and head.weight.dtype == rows.dtype
        and not torch.is_autocast_enabled(rows.device.type)
    )


def _head_width(head: Callable[[Tensor], Tensor], rows: Tensor) -> int:
    if isinstance(head, nn.Linear):
        return head.out_features
    with torch.no_grad():
        return int(head(rows[:1]).shape[-1])


def _per_row(value: Tensor | float, x0: Tensor) -> Tensor:
    given = torch.as_tensor(value, dtype=torch.float64, device=x0.device)
    return given.detach().expand(x0.shape).reshape(-1)


def _check_shapes(x0: Tensor, z: Tensor, rows: torch.Size) -> None:
    if not x0.shape == z.shape == rows:
        raise ValueError(
            f"uniform NELBO: x0 {tuple(x0.shape)} and z {tuple(z.shape)} must have one entry per "
            f"row, {tuple(rows)}; give them the shape of the rows."
        )
