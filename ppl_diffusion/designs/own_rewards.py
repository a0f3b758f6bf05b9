"""Rewards of the user's own: functions of texts, networks of one-hot sequences, programs."""

from __future__ import annotations

import inspect
import shlex
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from typing import Any

import torch

from ppl_diffusion.designs.alphabet import Alphabet
from ppl_diffusion.designs.digests import digest
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
        program = shlex.split(spec.at)[0] if spec.at.strip() else ""
        if shutil.which(program) is None:
            raise InputError(
                f"There is no program {program!r} for the reward {spec.name!r}: check its path."
            )
        timeout = spec.options.get("timeout")
        return CommandReward(spec.at, decode, property=spec.answer, timeout=timeout)
    found = spec.object if spec.object is not None else load_object(spec.at)
    if spec.source == "torch":
        symbols = len(alphabet.symbols)
        found = _network(spec.at, found)
        network = TorchReward(found, symbols, head=spec.head)
        network.module.to(device)
        return network
    if not callable(found):
        raise InputError(
            f"{spec.at!r} is an object of type {type(found).__name__}: give a function of a list "
            "of sequences."
        )
    return TextReward(found, decode)


def _network(name: str, found: Any) -> torch.nn.Module:
    """Return a network, made by its class or by a function without arguments where it is none."""
    if not isinstance(found, torch.nn.Module) and callable(found):
        try:
            found = found()
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise InputError(
                f"{name!r} is no network, and calling it makes none ({reason}): name a "
                "torch.nn.Module, or what returns one."
            ) from error
    if not isinstance(found, torch.nn.Module):
        raise InputError(
            f"{name!r} gives an object of type {type(found).__name__}: name a torch.nn.Module, or "
            "what returns one."
        )
    return found


def _version(spec: RewardSpec, function: Any) -> str:
    """Return what tells a function's answers in a file from those of others, and of other versions.

    Without a version that the user keeps, the source is one: a function that was edited is another.
    """
    if "version" in spec.options or spec.source == "command":
        return f"{spec.at} {spec.head} {spec.answer} {spec.options.get('version', '')}"
    written = getattr(function, "fn", getattr(function, "module", function))
    module = inspect.getmodule(written) or inspect.getmodule(type(written))
    try:
        source = inspect.getsource(written if module is None else module)
    except (OSError, TypeError):
        source = repr(getattr(getattr(written, "__code__", None), "co_code", None))
    numbers = written.state_dict() if isinstance(written, torch.nn.Module) else {}
    return f"{spec.at} {spec.head} {digest(source, numbers)}"


def function_options(spec: RewardSpec, function: Any = None) -> dict[str, Any]:
    """Return how a reward is asked, for a :class:`~ppl_diffusion.potentials.SequenceFunction`.

    :raises InputError: if an option cannot be used.
    """
    asked = dict(spec.options)
    if "cache" in asked:
        asked["version"] = _version(spec, function)
    memory = asked.pop("memory", None)
    workers, kind = asked.pop("workers", None), asked.pop("executor", None)
    if memory is not None:
        _whole(spec, "memory", memory, 1)
        if (kind or "processes") != "processes" or spec.source == "command":
            raise InputError(
                f"memory of reward {spec.name!r} bounds worker processes: drop it, or let the "
                "executor be processes."
            )
    for name in ("budget", "batch_size", "retries"):
        if name in asked:
            _whole(spec, name, asked[name], 0 if name == "retries" else 1)
    if "timeout" in asked:
        positive(f"the timeout of reward {spec.name!r}", asked["timeout"])
    if spec.source == "command":
        asked.pop("timeout", None)  # the program itself is killed at its end
        kind = kind or ("threads" if workers is not None else None)
    if workers is None and kind is None and memory is None and "timeout" not in asked:
        return asked
    workers = 1 if workers is None else workers
    _whole(spec, "workers", workers, 1)
    if memory is not None:
        return {**asked, "executor": Processes(workers, memory=memory)}
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
