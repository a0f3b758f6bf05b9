"""Rewards of the user's own: functions of texts, networks of one-hot sequences, programs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from typing import Any

import torch

from ppl_diffusion.designs.alphabet import Alphabet
from ppl_diffusion.designs.reward_spec import RewardSpec
from ppl_diffusion.jobs.checks import InputError, at_least, one_of, positive
from ppl_diffusion.potentials import (
    CommandReward,
    Processes,
    TextReward,
    Threads,
    TorchReward,
    load_object,
)

EXECUTORS = ("processes", "threads", "ray")
"""Where calls of a reward run: processes that can be killed, threads, or actors of Ray."""


def own_function(spec: RewardSpec, alphabet: Alphabet, device: torch.device) -> Any:
    """Return the function of tokens behind a reward.

    :param device: where a network computes.
    :raises ValueError: if there is no such object, or it is none of the kind.
    """
    decode = alphabet.decode
    if spec.source == "command":
        timeout = spec.options.get("timeout")
        return CommandReward(spec.at, decode, property=spec.answer, timeout=timeout)
    found = spec.object if spec.object is not None else load_object(spec.at)
    if spec.source == "torch":
        symbols = len(alphabet.symbols)
        if not isinstance(found, torch.nn.Module) and callable(found):
            found = found()  # a class, or a function that loads one
        network = TorchReward(found, symbols, head=spec.head)
        network.module.to(device)
        return network
    if not callable(found):
        raise InputError(
            f"{spec.at!r} is an object of type {type(found).__name__}: give a function of a list "
            "of sequences."
        )
    return TextReward(found, decode)


def function_options(spec: RewardSpec) -> dict[str, Any]:
    """Return how a reward is asked, for a :class:`~ppl_diffusion.potentials.SequenceFunction`.

    :raises InputError: if an option cannot be used.
    """
    asked = dict(spec.options)
    workers, kind = asked.pop("workers", None), asked.pop("executor", None)
    for name in ("budget", "batch_size", "retries"):
        if name in asked:
            _whole(spec, name, asked[name], 0 if name == "retries" else 1)
    if "timeout" in asked:
        positive(f"the timeout of reward {spec.name!r}", asked["timeout"])
    if spec.source == "command":
        asked.pop("timeout", None)  # the program itself is killed at its end
        kind = kind or ("threads" if workers is not None else None)
    if workers is None and kind is None and "timeout" not in asked:
        return asked
    workers = 1 if workers is None else workers
    _whole(spec, "workers", workers, 1)
    return {**asked, "executor": make_executor(kind or "processes", workers)}


def make_executor(kind: str, workers: int) -> Executor:
    """Return an executor by name.

    :param kind: one of :data:`EXECUTORS`.
    :param workers: how many calls it makes at once.
    :raises InputError: if there is none of that name.
    """
    one_of("executor", kind, EXECUTORS)
    made: Mapping[str, Callable[[int], Executor]] = {
        "processes": Processes,
        "threads": Threads,
        "ray": _ray,
    }
    return made[kind](workers)


def _ray(workers: int) -> Executor:
    from ppl_diffusion.potentials.ray_executor import RayExecutor

    return RayExecutor(workers)


def _whole(spec: RewardSpec, name: str, value: Any, low: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise InputError(f"{name} of reward {spec.name!r} is {value!r}: give a whole number.")
    at_least(f"{name} of reward {spec.name!r}", value, low)
