"""Potentials as sites of a program: a ``pyro.factor`` that knows how to look ahead."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pyro
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from ppl_diffusion.potentials.base import AbstractPotential, Potential


class PotentialFactor(TorchDistribution):
    """An observed unit whose log-density is ``log G(x0)``, computed only when it is asked for.

    :param x0: clean tokens, int64 ``(*batch, L)``.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012 (torch's class protocol)
    support = constraints.independent(constraints.real, 1)

    def __init__(self, potential: AbstractPotential, x0: Tensor) -> None:
        self.potential, self.x0 = potential, x0
        super().__init__(x0.shape[:-1], torch.Size((0,)), validate_args=False)

    def sample(self, sample_shape: Sequence[int] = torch.Size()) -> Tensor:
        return self.x0.new_empty((*sample_shape, *self.batch_shape, 0), dtype=torch.float64)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return ``log G(x0)``, float64, the batch shape."""
        shape = torch.broadcast_shapes(self.batch_shape, value.shape[:-1])
        return self.potential(self.x0).expand(shape)

    def lookahead(self) -> Tensor:
        """Return the potential's finite look-ahead, for guessed sequences."""
        return self.potential.lookahead(self.x0)

    def expand(
        self, batch_shape: Sequence[int], _instance: PotentialFactor | None = None
    ) -> PotentialFactor:
        new = self._get_checked_instance(PotentialFactor, _instance)
        new.potential = self.potential
        new.x0 = self.x0.expand(*batch_shape, self.x0.shape[-1])
        super(PotentialFactor, new).__init__(
            new.x0.shape[:-1], self.event_shape, validate_args=False
        )
        return new


def factor(
    name: str, potential: AbstractPotential | Callable[[Tensor], Tensor], x0: Tensor
) -> None:
    """Multiply the program's density by ``G(x0)``, like ``pyro.factor``.

    Unlike a plain factor it tells inference programs how to score an unfinished sequence, so a
    hard constraint guides particles instead of only judging the finished ones.

    :param potential: the potential, or a function ``x0 (*batch, L) -> log G (*batch,)``, which
        becomes a :class:`~ppl_diffusion.potentials.Potential`.
    :param x0: clean tokens, int64 ``(*batch, L)``.
    :raises TypeError: if the potential is not callable.
    """
    known = potential if isinstance(potential, AbstractPotential) else Potential(potential)
    unit = PotentialFactor(known, x0)
    pyro.sample(name, unit, obs=unit.sample(), infer={"is_auxiliary": True})
