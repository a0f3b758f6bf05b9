"""The methods of the Pareto benchmark, with what gives each of them a curve.

Methods that sample a tilt of the prior are run at several temperatures of the reward. Searches know
no temperature: they keep a larger or smaller share of what they found, or choose among more or
fewer children.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ppl_diffusion.designs.brief import job_of
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.inference import SMC, Power, Tilt
from ppl_diffusion.kernels import InterpolatingKernel, first_hitting
from ppl_diffusion.models import DiffusionProgram, Oracle, load, load_oracle
from ppl_diffusion.potentials import AbstractPotential, Potential, Reward
from ppl_diffusion.smc import PersistentFill

PRIOR = "yeast-promoter"
_BRIEF = job_of(PRIOR).question
(_REWARD,), (_JUDGE,) = _BRIEF.rewards, _BRIEF.judges
DEFAULT_TEMPERATURE = _REWARD.temperature or 1.0
HIGHEST_EXPRESSION = _REWARD.at_most or float("inf")
CAPPED = f"min(oracle, {HIGHEST_EXPRESSION:g})"
NUM_STEPS = 64
SHARPENED = 1.5
"""Exponent of the prior where it is sharpened."""


class Remembered:
    """A denoiser that keeps what it said, for settings that share their seeds and hence states.

    Costs are counted above it: a row that comes again is paid for again.

    :param denoiser: a time-free denoiser.
    :param size: rows kept; the least recently used are dropped first.
    """

    def __init__(self, denoiser: Any, size: int = 250_000) -> None:
        self.denoiser, self.size = denoiser, size
        self.vocab_size, self.kind = denoiser.vocab_size, denoiser.kind
        self.time_free = True
        self._known: OrderedDict[bytes, Tensor] = OrderedDict()

    def __call__(self, tokens: Tensor, t: float | Tensor, /) -> Tensor:
        """Return log-probabilities over the clean vocabulary, ``(*batch, L, V)``."""
        rows = tokens.reshape(-1, tokens.shape[-1])
        keys = [row.tobytes() for row in rows.to(torch.int8).numpy()]
        new = {key: i for i, key in enumerate(keys) if key not in self._known}
        if new:
            values = self.denoiser(rows[list(new.values())], t)
            self._known.update(zip(new, values, strict=True))
        output = torch.stack([self._known[key] for key in keys])
        for key in keys:
            self._known.move_to_end(key)
        while len(self._known) > self.size:
            self._known.popitem(last=False)
        return output.reshape(*tokens.shape, self.vocab_size)


@dataclass(frozen=True)
class Lab:
    """The prior, who designs and who judges.

    :param prior: a masked prior.
    :param designer: the oracle in the reward.
    :param judge: an oracle fitted on other families of sequences.
    """

    prior: DiffusionProgram
    designer: Oracle
    judge: Oracle

    @classmethod
    def load(cls) -> Lab:
        """Return the shipped promoters."""
        return cls(load(PRIOR), load_oracle(_REWARD.at), load_oracle(_JUDGE.at))

    @cached_property
    def denoiser(self) -> Remembered:
        """The prior's denoiser."""
        return Remembered(self.prior.denoiser)

    @cached_property
    def chain(self) -> ReverseChain:
        """The chain on a time grid: all methods but one, and all bounds."""
        kernel = InterpolatingKernel(self.prior.process, self.denoiser, num_steps=NUM_STEPS)
        return ReverseChain(kernel, self.prior.length)

    @cached_property
    def ordered(self) -> ReverseChain:
        """The chain that reveals one position per step."""
        length = self.prior.length
        kernel = first_hitting(self.prior.process, self.denoiser, length=length)
        return ReverseChain(kernel, length)

    def reward(self, temperature: float) -> Reward:
        """Return the reward of ``ppl-diffusion design``, with nothing remembered.

        :param temperature: expression units per nat.
        """
        return Reward(self._capped, temperature, name=CAPPED)

    def _capped(self, tokens: Tensor) -> Tensor:
        expression: Tensor = self.designer(tokens)
        return expression.clamp_max(HIGHEST_EXPRESSION)


Build = Callable[[Lab, AbstractPotential, int], SMC]


@dataclass(frozen=True)
class Setting:
    """A point on the curve of a method.

    :param method: what tables call the method.
    :param label: what tables call the point.
    :param build: ``(lab, potential, number of particles) -> the runner``.
    :param temperature: of the reward.
    :param tempered: whether the temperature matters; it does not to searches.
    :param unit: the number of particles is a multiple of this.
    :param asks: whether the reward is asked for at all.
    """

    method: str
    label: str
    build: Build
    temperature: float = DEFAULT_TEMPERATURE
    tempered: bool = False
    unit: int = 1
    asks: bool = True


@dataclass(frozen=True)
class Plan:
    """What is compared at one budget.

    :param kind: what is equal, ``"evaluations"`` or ``"calls"``.
    :param budget: that many in one run.
    :param num_runs: independent runs per setting.
    :param temperatures: temperatures of the reward, in expression units per nat.
    :param strengths: children, and inverse shares kept, of methods without a temperature.
    """

    kind: str
    budget: int
    num_runs: int
    temperatures: tuple[float, ...] = (1.6, DEFAULT_TEMPERATURE, 0.1)
    strengths: tuple[int, ...] = (2, 4, 8)

    @property
    def frugal(self) -> bool:
        """Whether methods use the options that save reward calls."""
        return self.kind == "calls"

    def settings(self) -> Iterator[Setting]:
        """Return everything that is run, method by method."""
        yield Setting("prior samples", "", _prior, asks=False)
        yield from (_best_of_n(strength) for strength in self.strengths)
        for method, build in self._tilts():
            for temperature in self.temperatures:
                yield Setting(method, f"T={temperature:g}", build, temperature, tempered=True)
        yield from (_greedy(children) for children in self.strengths)
        yield from (_beam(children) for children in self.strengths)

    def _tilts(self) -> Iterator[tuple[str, Build]]:
        every = 4 if self.frugal else 1
        children = 2 if self.frugal else 4
        rarely = f", every {every}" if self.frugal else ""
        yield "importance sampling", _program("importance-sampling")
        yield f"difference, argmax{rarely}", _program("steering", twist="argmax", every=every)
        yield f"difference, defensive{rarely}", _program("steering", every=every)
        persistent = _program("steering", twist=PersistentFill(4), every=every)
        yield f"difference, persistent{rarely}", persistent
        yield f"max, argmax{rarely}", _program("steering", twist="argmax", kind="max", every=every)
        yield f"soft value, {children} children", _soft_value(children, True)
        yield f"soft value, {children}, unweighted", _soft_value(children, False)
        fills = PersistentFill(4 if self.frugal else 16)
        yield "twisted, reweighted", _program("twisted", twist=fills)
        yield "twisted, clamped", _clamped
        yield "corrector, Tilt", _corrector(1.0)
        yield f"corrector, Power {SHARPENED:g} + Tilt", _corrector(SHARPENED)


def _program(method: str, **options: Any) -> Build:
    return lambda lab, potential, size: _runner(lab.chain, potential, size, method, **options)


def _runner(chain: Any, potential: Any, size: int, method: str, **options: Any) -> SMC:
    return SMC(chain, potential, method=method, num_particles=size, store_path=False, **options)


def _prior(lab: Lab, potential: AbstractPotential, size: int) -> SMC:
    nothing = Potential(lambda x0: torch.zeros(x0.shape[:-1]), name="0")
    return _runner(lab.chain, nothing, size, "importance-sampling")


def _best_of_n(strength: int) -> Setting:
    share = strength**2

    def build(lab: Lab, potential: AbstractPotential, size: int) -> SMC:
        return _runner(lab.chain, potential, size, "best-of-n", keep=max(size // share, 1))

    return Setting("best of N", f"keep 1/{share}", build)


def _soft_value(children: int, weighted: bool, alpha: float = 1.0) -> Build:
    return _program(
        "soft-value", num_children=children, alpha=alpha, weighted=weighted, twist="argmax"
    )


def _greedy(children: int) -> Setting:
    build = _soft_value(children, False, alpha=0.0)
    return Setting("soft value, best child", f"{children} children", build)


def _beam(children: int) -> Setting:
    def build(lab: Lab, potential: AbstractPotential, size: int) -> SMC:
        shares = {"num_children": children, "keep": size // children}
        return _runner(lab.chain, potential, size, "beam", **shares)

    return Setting("beam", f"{children} children", build, unit=children)


def _clamped(lab: Lab, potential: AbstractPotential, size: int) -> SMC:
    return _runner(lab.ordered, potential, size, "twisted", twist="argmax")


def _corrector(exponent: float) -> Build:
    def build(lab: Lab, potential: AbstractPotential, size: int) -> SMC:
        base = lab.chain if exponent == 1 else Power(lab.chain, exponent)
        return _runner(Tilt(base, potential), None, size, "corrector", twist="argmax")

    return build
