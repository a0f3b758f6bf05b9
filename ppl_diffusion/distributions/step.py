"""What the distributions of one reverse step share: the next state given the current one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from ppl_diffusion.distributions._shapes import enumerated
from ppl_diffusion.kernels.noise import uniforms

MAX_ENUMERATE = 2**16
"""Largest support that ``enumerate_support`` will build."""


class StepDistribution(TorchDistribution):
    """The law of the next state, event shape ``(L,)``; values are state ids.

    Positions in ``fixed`` keep their token with probability one and contribute nothing to the
    density. Subclasses set ``tokens``, ``fixed`` and ``num_states`` before ``super().__init__``.

    :ivar tokens: current states, int64 ``(*batch, L)``.
    :ivar fixed: bool ``(*batch, L)`` or None.
    :ivar num_states: number ``S`` of states of a site.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012 (torch's class protocol)
    has_enumerate_support = True
    num_uniforms: ClassVar[int] = 2
    """How many uniforms per site :meth:`draw` takes."""

    tokens: Tensor
    fixed: Tensor | None
    num_states: int

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self) -> constraints.Constraint:
        """Sequences of states."""
        return constraints.independent(constraints.integer_interval(0, self.num_states - 1), 1)

    @abstractmethod
    def draw(self, *noise: Tensor) -> Tensor:
        """Turn uniforms into next states; the same uniforms give the same states.

        :param noise: ``num_uniforms`` arrays of numbers in ``[0, 1)``, ``(*sample, *batch, L)``.
        """

    def sample(
        self,
        sample_shape: Sequence[int] = torch.Size(),
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw next states.

        :param sample_shape: leading dimensions.
        :param generator: source of randomness (the global one by default).
        :returns: int64 ``(*sample_shape, *batch, L)``.
        """
        shape = (self.num_uniforms, *sample_shape, *self.batch_shape, *self.event_shape)
        device = self.tokens.device
        noise = uniforms(shape, generator=generator, device=device)
        with torch.no_grad():
            return self.draw(*noise)

    @property
    def wants_gradient(self) -> bool:
        """Whether the prediction behind this step depends on a tensor that requires a gradient."""
        return False

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Return all sequences of states, ``(S ** L, *batch, L)``.

        :param expand: whether to expand the batch dimensions (size one otherwise).
        :raises NotImplementedError: if there are more than ``MAX_ENUMERATE``.
        """
        return enumerated(self, self.num_states, expand, MAX_ENUMERATE, self.tokens.device)
