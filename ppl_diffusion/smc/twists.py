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
from array_api_compat import is_torch_array
from torch import Tensor

from ppl_diffusion.arrays import Array, array_namespace
from ppl_diffusion.kernels.base import Kernel
from ppl_diffusion.kernels.completions import Completions
from ppl_diffusion.processes.noise import uniforms
from ppl_diffusion.smc.weights import log_sum_exp

Carry = dict[str, Any]
FILL_UNIFORMS = "fill_uniforms"
LOG_BASE = "log_base"
"""Log-weights of particles under the law of the moves alone, ``(R, N)``: no twist, no potential."""


class FillTwist(ABC):
    """A twist that completes the unfinished sequence and asks the potential about the result.

    ``log h`` is the log-mean-exp of the potential's look-ahead over ``num_fills`` completions,
    mixed with their mean over the population where there is a ``floor`` (:func:`floored`).

    ``late`` completions are scored while the network looks at the next state, and count there
    (:mod:`ppl_diffusion.smc.late`).
    """

    name: ClassVar[str]
    num_fills: int = 1
    floor: float = 0.0
    late: bool = False

    def __post_init__(self) -> None:
        """Say in the name what is late, so that results do."""
        if not isinstance(self.late, bool):
            kind = type(self).__name__
            raise TypeError(f"{kind}: late is True or False, got {self.late!r}.")
        if self.late:
            object.__setattr__(self, "name", f"{type(self).name}, late")

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

    def fill(self, completions: Completions, uniforms: Tensor | None) -> Tensor:
        """Return completions, int64 ``(R, N, num_fills, *plates, L)``.

        :param completions: of the states ``(R, N, *plates, L)``.
        :param uniforms: what :meth:`uniforms` returned.
        """
        if uniforms is None:
            return completions.likeliest()[:, :, None]
        return completions.draw(uniforms.movedim(2, -1)).movedim(-1, 2)


@dataclass(frozen=True)
class ArgmaxFill(FillTwist):
    """Fill every site with its likeliest token: one deterministic completion.

    :param late: score it while the network looks at the next state.
    """

    late: bool = False
    name = "argmax"

    def uniforms(self, carried: Tensor | None, shape: tuple[int, ...], generator: Any) -> None:
        """None are needed."""


@dataclass(frozen=True)
class PersistentFill(FillTwist):
    """Fill with noise drawn once per particle and inherited with it.

    Parent and child see the same noise, so that their scores differ by what was revealed and not
    by fresh randomness. The noise never decides what is revealed.

    :param num_fills: completions per particle.
    :param floor: share of the mean over the population, see :func:`floored`.
    :param late: score them while the network looks at the next state.
    """

    num_fills: int = 4
    floor: float = 0.0
    late: bool = False
    name = "persistent"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_floor(self.floor)

    def init(self, shape: tuple[int, ...], generator: Any) -> Tensor:
        """Draw the noise of each particle."""
        return _rand(shape, self.num_fills, generator)

    def uniforms(self, carried: Tensor | None, shape: tuple[int, ...], generator: Any) -> Tensor:
        """Return the carried noise."""
        assert carried is not None
        return carried


@dataclass(frozen=True)
class Defensive(FillTwist):
    """The likeliest completion, some persistent ones, and a floor: a look-ahead that does no harm.

    Completions alone have no lower bound relative to the potential. Where they guess a state wrong
    it is lost in almost every run, and runs then agree on an evidence that is too small. With the
    floor every final weight is at most ``1 / floor`` times that of importance sampling.

    :param num_persistent: completions with inherited noise, besides the likeliest one.
    :param floor: share of the mean over the population, see :func:`floored`; 0 for none.
    :param late: score completions while the network looks at the next state, which lets slow
        rewards run beside it; resampling then sees one step less.
    :raises ValueError: if a number is not usable.
    """

    num_persistent: int = 4
    floor: float = 0.2
    late: bool = False
    name = "defensive"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_floor(self.floor)
        if self.num_persistent < 0:
            raise ValueError(f"num_persistent must be >= 0, got {self.num_persistent}.")

    @property
    def num_fills(self) -> int:  # type: ignore[override]
        """Completions per particle."""
        return 1 + self.num_persistent

    def init(self, shape: tuple[int, ...], generator: Any) -> Tensor | None:
        """Draw the noise of each particle."""
        return _rand(shape, self.num_persistent, generator) if self.num_persistent else None

    def uniforms(self, carried: Tensor | None, shape: tuple[int, ...], generator: Any) -> Any:
        """Return the carried noise."""
        return carried

    def fill(self, completions: Completions, uniforms: Tensor | None) -> Tensor:
        """Return the likeliest completion, then the others."""
        likeliest = super().fill(completions, None)
        if uniforms is None:
            return likeliest
        return torch.cat([likeliest, super().fill(completions, uniforms)], 2)


@dataclass(frozen=True)
class SampledFill(FillTwist):
    """Fill with fresh samples at every step; unbiased and, at realistic lengths, very noisy.

    :param num_fills: completions per particle.
    :param late: score them while the network looks at the next state.
    """

    num_fills: int = 4
    late: bool = False
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

    def at(self, kernel: Kernel) -> CallableTwist:
        """Return the twist for a run whose network is behind a counter; here it asks none.

        :param kernel: the chain's kernel around it.
        """
        return self

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
    Literal["auto", "defensive", "argmax", "persistent", "sample"]
    | Twist
    | Callable[[Carry, int], Tensor]
    | None
)


def as_twist(twist: TwistLike) -> Twist | None:
    """Return a twist object from its short form.

    :param twist: None (bootstrap), a name (``"auto"`` is ``"defensive"`` if no method says else), a
        function ``(carry, k) -> log h`` or a twist.
    :raises ValueError: if the name is unknown.
    """
    if twist is None or isinstance(twist, FillTwist | CallableTwist):
        resolved = twist
    elif isinstance(twist, str):
        names: dict[str, type[FillTwist]] = {
            "auto": Defensive,
            "defensive": Defensive,
            "argmax": ArgmaxFill,
            "persistent": PersistentFill,
            "sample": SampledFill,
        }
        if twist not in names:
            known = ", ".join(name for name in names if name != "auto")
            raise ValueError(f"unknown twist {twist!r}; choose one of {known} or None.")
        resolved = names[twist]()
    elif callable(twist):
        resolved = CallableTwist(twist)
    else:
        raise TypeError(f"a twist is a name, a function or None, got {type(twist).__name__}.")
    if isinstance(resolved, SampledFill):
        warnings.warn(
            "twist='sample' draws fresh completions at every step, whose noise enters the weights; "
            "'defensive' or 'persistent' is almost always better.",
            UserWarning,
            stacklevel=3,
        )
    return resolved


def floored(log_f: Array, log_c: Array, floor: float) -> Array:
    """Return ``log((1 - floor) f + floor c)``: the twist that a look-ahead is defended by.

    ``c`` is the mean of ``f`` under the law of the moves, estimated from the very particles; that
    is legal as a carried twist cancels whatever it is. Then ``c h / E f`` is at least ``floor``,
    so that no state the potential wants can be dropped for a wrong guess.

    :param log_f: log of the look-ahead.
    :param log_c: log of ``c``, broadcastable; ``-inf`` (nobody is alive) leaves ``f`` alone.
    :param floor: the share of ``c``, in ``[0, 1)``.
    """
    xp = array_namespace(log_f)
    mixed = xp.logaddexp(math.log1p(-floor) + log_f, math.log(floor) + log_c)
    return xp.where(log_c == -math.inf, log_f, mixed)


def mean_lookahead(log_f: Array, log_base: Array) -> Array:
    """Return the log of the mean look-ahead under the law of the moves, ``(R, 1, ...)``.

    :param log_f: log of the look-ahead, ``(R, N, ...)``.
    :param log_base: what each particle stands for (``LOG_BASE``), ``(R, N)``.
    """
    base = log_base.reshape(*log_base.shape, *[1] * (log_f.ndim - 2))
    return log_mean_exp(base + log_f, 1)[:, None]


def _check_floor(floor: float) -> None:
    if not 0 <= floor < 1:
        raise ValueError(f"floor must lie in [0, 1), got {floor}.")


def log_mean_exp(values: Array, dim: int) -> Array:
    """Return the log of the mean of exponentials."""
    if is_torch_array(values):
        return torch.logsumexp(values, dim) - math.log(values.shape[dim])
    xp = array_namespace(values)
    return log_sum_exp(xp.moveaxis(values, dim, -1)) - math.log(values.shape[dim])


def _rand(shape: tuple[int, ...], num_fills: int, generator: Any) -> Tensor:
    runs, particles, *rest = shape
    full = (runs, particles, num_fills, *rest)
    return uniforms(full, generator=generator, device="cpu")
