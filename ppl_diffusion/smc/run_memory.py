"""What the objects behind a run remember: counters, caches, what was tuned on the way.

A checkpoint holds it beside the particles, so that a run that goes on asks, counts and reuses what
the unbroken one would have. Objects are found from the engine through their fields, and known again
by the way to them; whose class remembers something says so with :func:`remembers`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from ppl_diffusion.denoisers import evaluation, prediction
from ppl_diffusion.kernels.event_kernel import EventKernel, Future
from ppl_diffusion.kernels.events import RoundAhead
from ppl_diffusion.kernels.latent_kernel import LatentKernel
from ppl_diffusion.potentials.evaluation import SequenceFunction
from ppl_diffusion.potentials.failures import Failures
from ppl_diffusion.potentials.rewards import FunctionPotential
from ppl_diffusion.row_memory import Generation, RowMemory
from ppl_diffusion.rows import RowTable
from ppl_diffusion.smc.evaluated_potential import (
    EvaluatedPotential,
    ListedAnswers,
    SortedAnswers,
)
from ppl_diffusion.smc.portable import AnyClass, packed, portable, unpacked

Way = tuple[tuple[str, Any], ...]
"""Fields and places by which an object is reached."""

_REMEMBERED: dict[type, tuple[str, ...]] = {
    evaluation.EvaluatedDenoiser: (
        *("rows_requested", "rows_evaluated", "num_calls", "all_new"),
        *("_all_differ", "_sent", "_time", "_probes", "_memory", "_last"),
    ),
    EvaluatedPotential: ("num_calls", "_answers"),
    EventKernel: ("_asked",),
    LatentKernel: ("_level",),
    RowMemory: ("_generations",),
    Failures: ("_known",),
    SequenceFunction: ("progress",),
    FunctionPotential: ("_known", "_total"),
}
_ROOM = __name__.split(".")[0]

for _cls in (
    *(Future, RoundAhead, RowTable, RowMemory, Generation, ListedAnswers, SortedAnswers),
    *(evaluation.Rows, evaluation.Remembered, evaluation.LastCall, prediction.DensePrediction),
):
    portable(_cls)
portable(prediction.HeadPrediction, "head")


def remembers(*fields: str) -> Callable[[AnyClass], AnyClass]:
    """Let checkpoints hold some fields of the instances of a class.

    :param fields: what changes while a run goes on.
    """

    def decorate(cls: AnyClass) -> AnyClass:
        _REMEMBERED[cls] = fields
        return cls

    return decorate


def memory_of(owner: object) -> list[tuple[Way, dict[str, Any]]]:
    """Return what is remembered behind an object, by the ways to those that remember it.

    :param owner: an engine, or a bound run.
    :raises NotPortable: if some of it cannot be held by a checkpoint.
    """
    found = []
    for way, each in _reached(owner):
        names = _fields(each)
        if names:
            found.append((way, {name: packed(getattr(each, name)) for name in names}))
    return found


def remember(owner: object, memory: list[tuple[Way, dict[str, Any]]]) -> None:
    """Give what is behind an object the memory of another run.

    :param owner: an engine, or a bound run, made as the other one was.
    :param memory: of :func:`memory_of`.
    """
    for way, entries in memory:
        each = _follow(owner, way)
        for name, value in entries.items():
            setattr(each, name, _fresh(each, unpacked(value)))


def _fields(each: object) -> tuple[str, ...]:
    mro = type(each).__mro__
    return tuple(dict.fromkeys(name for cls in mro for name in _REMEMBERED.get(cls, ())))


def _fresh(owner: Any, value: Any) -> Any:
    """Put back what is no state of its own."""
    if isinstance(value, evaluation.LastCall):
        tensors = (value.tokens, *value.given.values())
        return value._replace(versions=[x._version for x in tensors])
    for part in value if isinstance(value, tuple) else ():
        if isinstance(part, prediction.HeadPrediction):
            part.head = owner.denoiser.head
    return value


def _reached(owner: object) -> Iterator[tuple[Way, object]]:
    """Walk through the fields of objects of this package, each of them once."""
    seen: set[int] = set()
    queue: list[tuple[Way, object]] = [((), owner)]
    for way, each in queue:  # grows by what is inside
        if id(each) in seen or isinstance(each, Tensor | torch.nn.Module | str | type):
            continue
        seen.add(id(each))
        yield way, each
        queue += [((*way, step), part) for step, part in _parts(each)]


def _parts(each: object) -> list[tuple[tuple[str, Any], object]]:
    if isinstance(each, Mapping):
        return [(("value", i), part) for i, part in enumerate(each.values())]
    if isinstance(each, list | tuple):
        return [(("item", i), part) for i, part in enumerate(each)]
    if isinstance(each, MethodType):
        return [(("field", "__self__"), each.__self__)]
    own = any(cls.__module__.split(".")[0] == _ROOM for cls in type(each).__mro__)
    if not own:
        return []
    held = _fields(each)
    return [(("field", name), part) for name, part in _vars(each).items() if name not in held]


def _vars(each: object) -> dict[str, object]:
    return getattr(each, "__dict__", {})


def _follow(owner: Any, way: Way) -> Any:
    for kind, place in way:
        if kind == "field":
            owner = getattr(owner, place)
        else:
            owner = list(owner.values())[place] if kind == "value" else owner[place]
    return owner
