"""Rows shared by the processes of a group: each answers a part, and all know all answers.

The processes run the same thing from the same seed and hold the same particles, weights and random
numbers. What is dear, networks and potentials, is asked about a part of the rows by each of them;
then the answers are exchanged. So a result is that of one process, whatever the method, as long as
nothing but the seed is random.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_GROUP: ContextVar[ProcessGroup | None] = ContextVar("group", default=None)


@contextmanager
def share_rows(group: ProcessGroup | None) -> Iterator[None]:
    """Share the rows that networks and potentials are asked about inside.

    Every process of the group has to come here with the same questions: the same program, from the
    same seed.

    :param group: a group of ``torch.distributed``, ``torch.distributed.group.WORLD`` for all
        processes; None shares nothing.

    Example::

        with share_rows(torch.distributed.group.WORLD):
            posterior = ParticleGibbs(assay).run(seed=0)
    """
    token = _GROUP.set(group)
    try:
        yield
    finally:
        _GROUP.reset(token)


def shared_seed(seed: int | None, group: ProcessGroup | None) -> int | None:
    """Return the seed that all processes of a group use: theirs, or one that the first has drawn.

    :raises ValueError: if their seeds differ.
    :raises RuntimeError: if another process does not answer.
    """
    if group is None:
        return seed
    drawn = int(torch.randint(2**62, (), device="cpu")) if seed is None else seed
    told = _gathered((seed, drawn), group)
    if len({given for given, _ in told}) > 1:
        raise ValueError(
            f"the processes of the group have different seeds, {[given for given, _ in told]}; "
            "give all of them one."
        )
    first: int = told[0][1]
    return first


def own_rows(count: int) -> slice:
    """Return which of some rows this process answers.

    :param count: how many there are.
    """
    group = _GROUP.get()
    return slice(0, count) if group is None else _part(count, group)


class _Told(NamedTuple):
    """What the others need to know before answers are exchanged."""

    failure: str | None
    rows: int
    cost: int
    shape: tuple[int, ...]
    dtype: torch.dtype | None


def shared_rows(
    count: int,
    ask: Callable[[slice], Tensor],
    device: torch.device,
    cost: Callable[[], int] = int,
) -> tuple[Tensor, int]:
    """Return what all rows are answered, and what that cost all processes together.

    Gradients are not exchanged: where they are recorded each process answers all rows.

    :param count: number of rows.
    :param ask: answers some of them, ``(n, ...)``.
    :param device: where answers lie.
    :param cost: a counter of what answers cost.
    :raises RuntimeError: if another process failed, or does not answer.
    """
    group, before = _GROUP.get(), cost()
    if group is None or torch.is_grad_enabled() or not count:
        return ask(slice(0, count)), cost() - before
    part, own, error = _part(count, group), None, None
    try:
        with share_rows(None):  # what is asked inside is asked about these rows only
            own = ask(part) if part.stop > part.start else None
    except Exception as found:  # the others wait, and must not wait for ever
        error = found
    failure = None if error is None else f"{type(error).__name__}: {error}"
    shape, dtype = ((), None) if own is None else (tuple(own.shape[1:]), own.dtype)
    told = _gathered(_Told(failure, count, cost() - before, shape, dtype), group)
    if error is not None:
        raise error
    _check(told)
    sent = _padded(own, -(-count // group.size()), told[0], device)
    parts = [torch.empty_like(sent) for _ in told]
    _answered(lambda: torch.distributed.all_gather(parts, sent, group=group))
    return torch.cat(parts)[:count], sum(one.cost for one in told)


def _part(count: int, group: ProcessGroup) -> slice:
    """Return equal parts, of which the last ones are shorter, or empty."""
    size = -(-count // group.size())
    return slice(min(group.rank() * size, count), min((group.rank() + 1) * size, count))


def _check(told: list[_Told]) -> None:
    for rank, one in enumerate(told):
        if one.failure is not None:
            raise RuntimeError(
                f"process {rank} of the group failed on its part of the rows: {one.failure}"
            )
    if len({one.rows for one in told}) > 1:
        raise RuntimeError(
            "the processes of the group ask about different rows; give all of them the same "
            "program, arguments, options and seed."
        )


def _padded(own: Tensor | None, size: int, like: _Told, device: torch.device) -> Tensor:
    """Return answers as long as those of the first process, which always has some."""
    padded = torch.zeros((size, *like.shape), dtype=like.dtype, device=device)
    if own is not None:
        padded[: len(own)] = own
    return padded


def _gathered(value: Any, group: ProcessGroup) -> list[Any]:
    """Return the values of all processes, in the order of their ranks."""
    values = [None] * group.size()
    _answered(lambda: torch.distributed.all_gather_object(values, value, group=group))
    return values


def _answered(exchange: Callable[[], object]) -> None:
    """Run an exchange, and say what it means if nobody answers.

    :raises RuntimeError: if another process is gone, or later than the timeout of the group.
    """
    try:
        exchange()
    except RuntimeError as error:
        raise RuntimeError(
            "another process of the group has ended or does not answer, so that this one cannot "
            "go on; see what it said, and start all of them anew."
        ) from error
