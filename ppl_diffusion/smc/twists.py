"""Twists: what an unfinished state promises.

A twist is ``log h_k(x_k)``, a guess of ``log E[G(x0) | x_k]``. It decides where particles go and
never what they target: increments telescope, so whatever it adds it takes back, and at the last
step the potential itself stands in its place. A twist must be finite and is free to be wrong.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ppl_diffusion.processes.noise import draw_categorical, uniforms

Carry = dict[str, Any]
FILL_UNIFORMS = "fill_uniforms"
LOG_BASE = "log_base"
"""Log-weights of particles under the law of the moves alone, ``(R, N)``: no twist, no potential."""


class FillTwist(ABC):
    """A twist that completes the unfinished sequence and asks the potential about the result.

    ``log h`` is the log-mean-exp of the potential's look-ahead over ``num_fills`` completions.
    """

    name: ClassVar[str]
    num_fills: int = 1

    @abstractmethod
    def uniforms(
        self, carried: Tensor | None, shape: tuple[int, ...], generator: Any
    ) -> Tensor | None:
        """Return the uniforms of the completions, ``(*shape[:2], num_fills, *shape[2:])``.

        :param carried: what :meth:`init` put into the carry, if anything.
        :param shape: shape ``(R, N, *plates, L)`` of the tokens.
        """

    def init(self, shape: tuple[int, ...], generator: Any) -> Tensor | None:
        """Return noise that travels with each particle, or None.

        :param shape: shape ``(R, N, *plates, L)`` of the tokens.
        """
        return None

    def fill(self, log_x0: Tensor, uniforms: Tensor | None) -> Tensor:
        """Return completions, int64 ``(R, N, num_fills, *plates, L)``.

        :param log_x0: ``log p(x0 | x_k)`` per site, ``(R, N, *plates, L, V)``.
        """
        if uniforms is None:
            return log_x0.argmax(-1)[:, :, None]
        return draw_categorical(log_x0[:, :, None], uniforms.to(log_x0.device))


@dataclass(frozen=True)
class ArgmaxFill(FillTwist):
    """Fill every site with its likeliest token: one deterministic completion."""

    name = "argmax"

    def uniforms(self, carried: Tensor | None, shape: tuple[int, ...], generator: Any) -> None:
        """None are needed."""


@dataclass(frozen=True)
class PersistentFill(FillTwist):
    """Fill with noise drawn once per particle and inherited with it.

    Parent and child see the same noise, so that their scores differ by what was revealed and not
    by fresh randomness. The noise never decides what is revealed.

    :param num_fills: completions per particle.
    """

    num_fills: int = 4
    name = "persistent"

    def init(self, shape: tuple[int, ...], generator: Any) -> Tensor:
        """Draw the noise of each particle."""
        return _rand(shape, self.num_fills, generator)

    def uniforms(self, carried: Tensor | None, shape: tuple[int, ...], generator: Any) -> Tensor:
        """Return the carried noise."""
        assert carried is not None
        return carried


@dataclass(frozen=True)
class SampledFill(FillTwist):
    """Fill with fresh samples at every step; unbiased and, at realistic lengths, very noisy.

    :param num_fills: completions per particle.
    """

    num_fills: int = 4
    name = "sample"

    def uniforms(self, carried: Tensor | None, shape: tuple[int, ...], generator: Any) -> Tensor:
        """Draw fresh noise."""
        return _rand(shape, self.num_fills, generator)


@dataclass(frozen=True)
class CallableTwist:
    """A twist given by a function.

    :param fn: ``(carry, k) -> log h (R, N)`` where ``carry["tokens"]`` holds the states,
        ``(R, N, *plates, L)``, after ``k`` of the ``T`` reverse steps.
    """

    fn: Callable[[Carry, int], Tensor]
    name: str = "callable"

    def __call__(self, carry: Carry, k: int, shape: tuple[int, int]) -> Tensor:
        """Return the checked ``log h``, float64 ``shape``.

        :raises ValueError: if the value is not finite or does not have one number per particle.
        """
        value = self.fn(carry, k)
        if not isinstance(value, Tensor):
            value = torch.as_tensor(value, device=carry["tokens"].device)
        value = value.to(torch.float64)
        if value.shape != shape:
            raise ValueError(
                f"the twist returned shape {tuple(value.shape)} at step {k}, expected {shape}: "
                "one number per run and state (particles, times their children if there are any)."
            )
        if not bool(torch.isfinite(value).all()):
            raise ValueError(
                f"the twist is not finite at step {k}; an unfinished state may still reach the "
                "target, so return a large negative number instead of -inf."
            )
        return value


Twist = FillTwist | CallableTwist
TwistLike = (
    Literal["argmax", "persistent", "sample"] | Twist | Callable[[Carry, int], Tensor] | None
)


def as_twist(twist: TwistLike) -> Twist | None:
    """Return a twist object from its short form.

    :param twist: None (bootstrap), a name, a function ``(carry, k) -> log h`` or a twist.
    :raises ValueError: if the name is unknown.
    """
    if twist is None or isinstance(twist, FillTwist | CallableTwist):
        resolved = twist
    elif isinstance(twist, str):
        names: dict[str, type[FillTwist]] = {
            "argmax": ArgmaxFill,
            "persistent": PersistentFill,
            "sample": SampledFill,
        }
        if twist not in names:
            raise ValueError(f"unknown twist {twist!r}; choose one of {', '.join(names)} or None.")
        resolved = names[twist]()
    elif callable(twist):
        resolved = CallableTwist(twist)
    else:
        raise TypeError(f"a twist is a name, a function or None, got {type(twist).__name__}.")
    if isinstance(resolved, SampledFill):
        warnings.warn(
            "twist='sample' draws fresh completions at every step, whose noise enters the weights; "
            "'persistent' or 'argmax' is almost always better.",
            UserWarning,
            stacklevel=3,
        )
    return resolved


def log_mean_exp(values: Tensor, dim: int) -> Tensor:
    """Return the log of the mean of exponentials."""
    return torch.logsumexp(values, dim) - math.log(values.shape[dim])


def _rand(shape: tuple[int, ...], num_fills: int, generator: Any) -> Tensor:
    runs, particles, *rest = shape
    full = (runs, particles, num_fills, *rest)
    return uniforms(full, generator=generator, device="cpu")
