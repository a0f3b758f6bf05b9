"""Paths of particles as the states of Markov chains, and what moves of them need to know."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ppl_diffusion.denoisers.evaluation import EvaluatedDenoiser
from ppl_diffusion.distributions.reverse_chain import ReverseChain
from ppl_diffusion.processes.noise import uniforms
from ppl_diffusion.smc.feynman_kac import per_particle

Rated = Tensor | tuple[Tensor, Mapping[str, Tensor]]
"""``log G``, and whatever else belongs to a state and is replaced with it."""
_NOTHING: Mapping[str, Tensor] = MappingProxyType({})


class PathState(NamedTuple):
    """Paths of particles and the potential of their ends.

    :param path: int64 ``(R, N, *plates, T + 1, L)``.
    :param log_g: ``log G(x0)``, float64 ``(R, N)``.
    :param values: what else was computed with ``log_g``, each ``(R, N, ...)``.
    :param log_c: log-probability that each position was revealed with, float64
        ``(R, N, *plates, L)``, NaN where it is not known; None if none is.
    """

    path: Tensor
    log_g: Tensor
    values: Mapping[str, Tensor] = _NOTHING
    log_c: Tensor | None = None

    @property
    def x0(self) -> Tensor:
        """Clean sequences, int64 ``(R, N, *plates, L)``."""
        return self.path[..., -1, :]


class PathModel:
    """What path moves need: a chain behind a cache, and a potential.

    :param chain: the reverse chain; plates in its batch shape belong to every particle.
    :param log_potential: ``x0 (R, N, *plates, L) -> log G (R, N)`` or ``(R, N, *plates)``; or that
        and other values of the same particles.
    :param max_rows: largest number of rows sent to the network at once, None for what suits it.
    """

    def __init__(
        self,
        chain: ReverseChain,
        log_potential: Callable[[Tensor], Rated],
        *,
        max_rows: int | None = None,
    ) -> None:
        known = chain.kernel.denoiser
        if not isinstance(known, EvaluatedDenoiser):  # else its answers are shared
            known = EvaluatedDenoiser(known, max_rows=max_rows)
        self.denoiser = known
        kernel = chain.kernel.with_denoiser(self.denoiser)
        same = ReverseChain(kernel, chain.length, prompt=chain.prompt, given=chain.given)
        self.chain = same.expand(chain.batch_shape)
        self._log_potential = log_potential

    @property
    def num_evaluations(self) -> int:
        """Network rows evaluated so far."""
        return self.denoiser.rows_evaluated

    def rate(self, x0: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return ``log G``, float64 ``(R, N)``, and what else was computed with it.

        :param x0: int64 ``(R, N, *plates, L)``.
        """
        rated = self._log_potential(x0)
        log_g, values = rated if isinstance(rated, tuple) else (rated, _NOTHING)
        return per_particle(log_g), values

    def state(self, path: Tensor, log_c: Tensor | None = None) -> PathState:
        """Return the state of given paths.

        :param path: int64 ``(R, N, *plates, T + 1, L)``.
        :param log_c: as in :class:`PathState`.
        """
        return PathState(path, *self.rate(path[..., -1, :]), log_c)


class PathMove(ABC):
    """A Markov kernel on paths that leaves ``p(path) G(x0)^beta`` invariant.

    :cvar name: its name.
    :cvar renews: whether it changes clean sequences.
    """

    name: ClassVar[str]
    renews: ClassVar[bool] = True

    @abstractmethod
    def check(self, chain: ReverseChain) -> None:
        """Refuse a chain this move is wrong for.

        :raises CapabilityError: if it is.
        """

    @property
    def exact(self) -> bool:
        """Whether it leaves that law invariant for any denoiser."""
        return True

    def num_rows(self, chain: ReverseChain) -> float:
        """Return how many network rows a move of one path asks for, before any is saved.

        :param chain: the chain.
        """
        return float(chain.num_steps)

    @abstractmethod
    def __call__(
        self,
        model: PathModel,
        state: PathState,
        *,
        beta: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> tuple[PathState, Tensor]:
        """Return the states after one move, and whether it was accepted, bool ``(R, N)``.

        :param model: chain and potential.
        :param state: states of positive probability.
        :param beta: power of the potential in the invariant law.
        """


def tilt(log_g: Tensor, beta: float) -> Tensor:
    """Return ``beta log G``, with ``G^0 = 1`` also where ``G`` is zero.

    :param log_g: log-potentials.
    :param beta: power, at least 0.
    """
    return beta * log_g if beta > 0 else torch.zeros_like(log_g)


def accept(
    state: PathState, proposed: PathState, log_ratio: Tensor, generator: torch.Generator | None
) -> tuple[PathState, Tensor]:
    """Return the states after an acceptance step, and where it was passed, bool ``(R, N)``.

    :param log_ratio: of Metropolis and Hastings, ``(R, N)``; NaN is no.
    """
    u = uniforms(log_ratio.shape, generator=generator, device=log_ratio.device)
    accepted = u.log() < log_ratio  # never where the ratio is NaN: a dead particle stays
    return choose(accepted, proposed, state), accepted


def choose(where: Tensor, new: PathState, old: PathState) -> PathState:
    """Return the one state where a condition holds, and the other elsewhere.

    :param where: bool ``(R, N)``.
    """

    def pick(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(where.reshape(*where.shape, *[1] * (a.ndim - 2)), a, b)

    log_c = None
    if new.log_c is not None or old.log_c is not None:
        known = new.log_c if new.log_c is not None else old.log_c
        nothing = torch.full_like(known, torch.nan)  # type: ignore[arg-type]
        log_c = pick(*(nothing if s.log_c is None else s.log_c for s in (new, old)))
    values = {name: pick(value, old.values.get(name, value)) for name, value in new.values.items()}
    path, log_g = pick(new.path, old.path), pick(new.log_g, old.log_g)
    return PathState(path, log_g, values, log_c)
