"""Psi schedules: a time grid and the ``kappa`` of each of its steps.

A Psi-posterior mixes the ancestral kernel with a fresh draw of the marginal (Sahoo et al. 2026,
arXiv:2602.21185, eq. 11)::

    Psi(z_s | z_t, x) = kappa q(z_s | z_t, x) + (1 - kappa) q_s(z_s | x)

so ``kappa`` says how much of a step moves forward and how much corrects what was decided before.
A schedule is a grid with a rule for ``kappa`` per phase (:mod:`ppl_diffusion.kernels.kappa_rules`):
ReMDM, forward-backward and flow-matching correctors are rules. Every grid here runs from exactly 1
to exactly 0, so no extra "noise removal" step is needed. ``kappa`` may be negative where the kernel
still is a distribution: :func:`kappa_room` says how far, :meth:`PsiSchedule.within` stays inside.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import Parameter, signature

import numpy as np

from ppl_diffusion.kernels.kappa_rules import (
    KappaRule,
    backward,
    capped,
    constant_eta,
    fixed,
    fraction,
    kappa_room,
    rescaled,
    rescaled_duo,
)
from ppl_diffusion.processes.base import Process, whole_number
from ppl_diffusion.processes.schedules import Schedule


@dataclass(frozen=True, eq=False, repr=False)
class PsiSchedule:
    """A time grid with one ``kappa`` per step.

    :param times: ``T + 1`` times, never increasing, from exactly 1 to exactly 0.
    :param kappa: ``T`` Psi parameters; 1 is ancestral, at most 1.
    :param alphas: signal levels at ``times``.
    :param name: what to call it in tables.
    :raises ValueError: if the shapes disagree, the grid is no grid, or ``kappa`` is not a number
        of at most 1.
    """

    times: np.ndarray
    kappa: np.ndarray
    alphas: np.ndarray
    name: str

    def __post_init__(self) -> None:
        steps = len(self.times) - 1
        if len(self.alphas) != steps + 1 or self.kappa.shape != (steps,):
            raise ValueError(
                f"PsiSchedule: {steps + 1} times need as many alphas and {steps} values of kappa, "
                f"got {len(self.alphas)} and {self.kappa.shape}."
            )
        falls = np.all(np.diff(self.times) <= 0) and np.all(np.diff(self.alphas) >= 0)
        if self.times[0] != 1 or self.times[-1] != 0 or not falls:
            raise ValueError(
                "PsiSchedule: times must decrease from exactly 1 (noise) to 0, and alphas rise."
            )
        if not np.all(np.isfinite(self.kappa)) or self.kappa.max() > 1:
            raise ValueError(f"PsiSchedule {self.name}: kappa must be finite and at most 1.")

    @property
    def num_steps(self) -> int:
        """Number ``T`` of steps."""
        return len(self.kappa)

    @property
    def sigma(self) -> np.ndarray:
        """Probability ``(1 - kappa)(1 - b)`` per step that a revealed token is masked again."""
        return np.asarray((1 - self.kappa) * (1 - self.alphas[1:]))

    @property
    def expected_corrections(self) -> float:
        """Expected number of times that a token present from the start is masked again.

        ``sum_i (1 - kappa_i)(1 - b_i)``, the one measure of correction strength that can be
        compared between schedules.
        """
        return float(self.sigma.sum())

    def within(self, process: Process) -> "PsiSchedule":
        """Return the schedule with ``kappa`` raised to what a process allows.

        ReMDM's caps reach a little below zero in the last steps, which the absorbing process has
        room for and others have less.

        :param process: forward process of the kernel to be built.
        """
        kappa = np.maximum(self.kappa, kappa_room(process, self.alphas))
        return replace(self, kappa=kappa)

    def __repr__(self) -> str:
        low, high = self.kappa.min(), self.kappa.max()
        span = f"{low:.4g}" if low == high else f"{low:.4g}..{high:.4g}"
        corrections = f"{self.expected_corrections:.3g} corrections per token"
        return f"PsiSchedule({self.name}, {self.num_steps} steps, kappa {span}, {corrections})"


def ancestral(schedule: Schedule, num_steps: int) -> PsiSchedule:
    """Return equal time steps with ``kappa = 1``."""
    return _even(schedule, num_steps, fixed(1.0), "ancestral")


def constant(
    schedule: Schedule, num_steps: int, *, kappa: float, t_on: float = 1.0, t_off: float = 0.0
) -> PsiSchedule:
    """Return one ``kappa`` for the steps that start in ``[t_off, t_on]``, ancestral ones elsewhere.

    Published: ``kappa = 0.95`` for ``t`` in ``[0.1, 0.5]`` (Duo on CIFAR-10).

    :param kappa: the value, at most 1.
    :param t_on: noise level from which on correcting begins.
    :param t_off: noise level at which it ends.
    """
    on, off = fraction(t_on, "t_on"), fraction(t_off, "t_off")
    if off > on:
        raise ValueError(f"t_off must not exceed t_on, got {off} > {on}.")
    window = "" if (on, off) == (1.0, 0.0) else f", t in [{off:g}, {on:g}]"
    return _even(
        schedule,
        num_steps,
        lambda a, b, t: np.where((t <= on) & (t >= off), kappa, 1.0),
        f"constant({kappa:g}{window})",
    )


def remdm_cap(schedule: Schedule, num_steps: int, *, eta: float) -> PsiSchedule:
    """Return ReMDM-cap, ``sigma = min(eta, (1 - b) / a)``.

    Its last steps have ``kappa`` slightly below zero: valid for the absorbing process, use
    :meth:`PsiSchedule.within` for another.

    :param eta: remasking probability in ``[0, 1]``.
    """
    return _even(schedule, num_steps, capped(eta), f"remdm-cap({eta:g})")


def remdm_rescale(schedule: Schedule, num_steps: int, *, eta: float) -> PsiSchedule:
    """Return ReMDM-rescale, ``sigma = eta min(1, (1 - b) / a)``.

    :param eta: factor in ``[0, 1]``.
    """
    return _even(schedule, num_steps, rescaled(eta), f"remdm-rescale({eta:g})")


def rescale_duo_compat(schedule: Schedule, num_steps: int, *, eta: float) -> PsiSchedule:
    """Return what Duo's published code runs as "rescale": see :func:`rescaled_duo`.

    Like that code it ends with a forced ``kappa = 1``.

    :param eta: factor in ``[0, 1]``.
    """
    return _even(schedule, num_steps, rescaled_duo(eta), f"rescale-duo-compat({eta:g})")


def remdm_loop(
    schedule: Schedule,
    num_steps: int,
    *,
    eta: float,
    alpha_c: float | None = None,
    t_c: float | None = None,
    high: float = 0.45,
    middle: float = 0.5,
) -> PsiSchedule:
    """Return ReMDM-loop: go to ``t_c``, hold the time there while remasking, and finish.

    Holding at ``alpha_c`` needs ``eta <= (1 - alpha_c) / alpha_c`` and the absorbing process;
    other processes need ``eta <= 1 - alpha_c``.

    :param eta: remasking probability while holding, in ``[0, 1]``.
    :param alpha_c: signal level to hold (0.9 if ``t_c`` is not given either).
    :param t_c: or the time to hold.
    :param high: fraction of the steps that lead there.
    :param middle: fraction of the steps that hold.
    """
    if alpha_c is None and t_c is None:
        alpha_c = 0.9
    modes = (fixed(1.0), constant_eta(eta), fixed(1.0))
    psi = profile(
        schedule, num_steps, modes=modes, alpha_c=alpha_c, t_c=t_c, high=high, middle=middle
    )
    return replace(psi, name=f"remdm-loop({eta:g})")


def forward_backward(schedule: Schedule, num_steps: int) -> PsiSchedule:
    """Return the forward-backward sampler, ``sigma = (b - a) / a``. Absorbing process only.

    One forward step of twice the progress and one backward step (Campbell et al. 2022).
    """
    return _even(schedule, num_steps, backward(1.0), "forward-backward")


def dfm_corrector(
    schedule: Schedule, num_steps: int, *, weight: float | None = None
) -> PsiSchedule:
    """Return the corrector sampler of discrete flow matching. Absorbing process only.

    Forward rates weigh ``1 + w`` and backward rates ``w`` (Gat et al. 2024), ``sigma = w (b-a)/a``.
    The published code shortens steps whose probabilities would exceed one; here the grid stays
    and ``sigma`` is capped.

    :param weight: ``w``; None is ``10 (t (1 - t))^(1/4)``.
    """
    label = "10 (t(1-t))^0.25" if weight is None else f"{weight:g}"
    return _even(schedule, num_steps, backward(weight), f"dfm({label})")


def predictor_corrector(schedule: Schedule, num_steps: int) -> PsiSchedule:
    """Return ``kappa = 0``: predict the clean sequence and noise it afresh in every step."""
    return _even(schedule, num_steps, fixed(0.0), "predictor-corrector")


def profile(
    schedule: Schedule,
    num_steps: int,
    *,
    modes: Sequence[KappaRule],
    alpha_c: float | None = None,
    t_c: float | None = None,
    high: float = 0.45,
    middle: float = 0.5,
    compat: bool = False,
) -> PsiSchedule:
    """Build a schedule of three phases, each with its own rule.

    The steps are split by ``high`` and ``middle`` (rounded; a hold leaves at least one step on
    either side). With a hold, the first phase goes
    linearly from 1 to ``t_c``, the second stays there and the third goes on to 0; without one the
    grid is even. This is the builder of Duo's code; the exact inverse of the schedule is used for
    ``alpha_c``, and ``kappa`` is neither clipped nor forced to one unless asked.

    :param modes: three rules, for the high, middle and low noise.
    :param alpha_c: signal level to hold in the middle; with ``t_c`` None, no hold.
    :param t_c: or the time to hold.
    :param high: fraction of the steps in the first phase.
    :param middle: fraction of the steps in the second.
    :param compat: clip ``kappa`` to ``[0, 1]`` and force the last step of every phase to 1, as the
        published code does.
    :raises ValueError: if there are not three rules, the fractions exceed one, or the hold is given
        twice or has no steps around it.
    """
    if len(modes) != 3:
        raise ValueError(f"profile: give three modes (high, middle, low noise), got {len(modes)}.")
    hold = _hold(schedule, alpha_c, t_c)
    sizes = _split(whole_number(num_steps, "profile: num_steps"), high, middle, hold is not None)
    times = _profile_grid(sizes, hold)
    alphas = _levels(schedule, times)
    edges = np.cumsum((0, *sizes))
    kappa = np.ones(num_steps)
    for rule, start, end in zip(modes, edges[:-1], edges[1:], strict=True):
        span = slice(start, end)
        kappa[span] = rule(alphas[:-1][span], alphas[1:][span], times[:-1][span])
    if compat:
        kappa = np.clip(kappa, 0.0, 1.0)
        kappa[edges[1:][np.asarray(sizes) > 0] - 1] = 1.0
    return PsiSchedule(times, kappa, alphas, "profile")


def _hold(schedule: Schedule, alpha_c: float | None, t_c: float | None) -> float | None:
    """Return the time to hold, or None."""
    if alpha_c is not None and t_c is not None:
        raise ValueError("give alpha_c or t_c, not both.")
    if alpha_c is not None:
        level = _inside(alpha_c, "alpha_c")
        return float(schedule.time_from_log1m(math.log1p(-level)))
    return None if t_c is None else _inside(t_c, "t_c")


def _split(num_steps: int, high: float, middle: float, holds: bool) -> tuple[int, int, int]:
    """Return the steps of each phase; around a hold at least one step leads there and one on."""
    if fraction(high, "high") + fraction(middle, "middle") > 1 + 1e-9:
        raise ValueError(f"profile: high + middle must not exceed 1, got {high:g} + {middle:g}.")
    if holds and num_steps < 2:
        raise ValueError(f"profile: a hold needs at least two steps, got {num_steps}.")
    first = min(max(round(high * num_steps), int(holds)), num_steps - int(holds))
    second = min(round(middle * num_steps), num_steps - first - int(holds))
    return first, second, num_steps - first - second


def _profile_grid(sizes: tuple[int, int, int], hold: float | None) -> np.ndarray:
    first, second, last = sizes
    if hold is None:
        return np.linspace(1.0, 0.0, first + second + last + 1)
    down = np.linspace(1.0, hold, first + 1)
    return np.concatenate([down, np.full(second, hold), np.linspace(hold, 0.0, last + 1)[1:]])


def _even(schedule: Schedule, num_steps: int, rule: KappaRule, name: str) -> PsiSchedule:
    times = np.linspace(1.0, 0.0, whole_number(num_steps, f"{name}: num_steps") + 1)
    alphas = _levels(schedule, times)
    return PsiSchedule(times, rule(alphas[:-1], alphas[1:], times[:-1]), alphas, name)


def _levels(schedule: Schedule, times: np.ndarray) -> np.ndarray:
    return np.asarray(schedule.alpha(times), dtype=np.float64)


def _inside(value: float, name: str) -> float:
    if not 0.0 < value < 1.0:
        raise ValueError(f"{name} must lie strictly between 0 and 1, got {value}.")
    return float(value)


SCHEDULES: Mapping[str, Callable[..., PsiSchedule]] = {
    "ancestral": ancestral,
    "constant": constant,
    "remdm-cap": remdm_cap,
    "remdm-rescale": remdm_rescale,
    "rescale-duo-compat": rescale_duo_compat,
    "remdm-loop": remdm_loop,
    "forward-backward": forward_backward,
    "dfm": dfm_corrector,
    "predictor-corrector": predictor_corrector,
}
"""The named schedules, as :func:`parse_psi` knows them."""


def parse_psi(text: str, schedule: Schedule, num_steps: int) -> PsiSchedule:
    """Build a schedule from text such as ``remdm-cap:0.01`` or ``constant:0.95,t_on=0.5``.

    The name is one of :data:`SCHEDULES`; after the colon stand its numbers, the first of which
    may go without its name.

    :raises ValueError: if the name is unknown, or a number is missing, unknown or out of range.
    """
    name, _, numbers = text.strip().partition(":")
    if name not in SCHEDULES:
        raise ValueError(f"unknown kappa schedule {name!r}; choose from {', '.join(SCHEDULES)}.")
    options = _options(name, numbers)
    try:
        return SCHEDULES[name](schedule, num_steps, **options)
    except ValueError as error:
        raise ValueError(f"kappa schedule {text!r}: {error}") from error


def _options(name: str, numbers: str) -> dict[str, float]:
    """Return the keyword arguments written after the colon."""
    known = list(signature(SCHEDULES[name]).parameters.values())[2:]
    options: dict[str, float] = {}
    for position, word in enumerate(filter(None, (part.strip() for part in numbers.split(",")))):
        key, equals, value = word.rpartition("=")
        if not equals and position == 0 and known:
            key = known[0].name
        if key not in {parameter.name for parameter in known}:
            takes = ", ".join(parameter.name for parameter in known) or "no numbers"
            raise ValueError(f"kappa schedule {name!r} does not take {word!r}; it takes {takes}.")
        if key in options:
            raise ValueError(f"kappa schedule {name!r}: {key} is given twice.")
        options[key] = _number(name, key, value)
    _require(name, known, options)
    return options


def _require(name: str, known: list[Parameter], options: dict[str, float]) -> None:
    for parameter in known:
        if parameter.default is Parameter.empty and parameter.name not in options:
            raise ValueError(
                f"kappa schedule {name!r} needs {parameter.name}; write {name}:NUMBER."
            )


def _number(name: str, key: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise ValueError(
            f"kappa schedule {name!r}: {key} must be a number, got {value!r}."
        ) from None
