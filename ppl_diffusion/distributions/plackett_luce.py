"""Which positions, and in which order: the Plackett-Luce law of a selection without replacement.

Positions are picked one after another in proportion to ``exp(score / temperature)`` among those
that are left::

    p(S) = prod_j exp(s_{S_j} / tau) / sum_{l left before pick j} exp(s_l / tau)

To keep the ``n`` largest of ``s + tau * Gumbel`` *is* to draw from it (Gumbel-top-``n``: Kool, van
Hoof and Welling 2019, arXiv:1903.06059). So what confidence-ordered decoders do as an argsort has
an exact density, and can be proposed from, weighed and put into a model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import permutations
from typing import Self

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from ppl_diffusion.kernels.shapes import check_expand, check_value
from ppl_diffusion.kernels.step import MAX_ENUMERATE
from ppl_diffusion.processes.noise import uniforms

NOBODY = -1e300
"""Log-weight of what cannot be picked: nothing beside any score, and finite for gradients."""

TINY = torch.finfo(torch.float64).tiny


class PlackettLuce(TorchDistribution):
    """The law of ``count`` positions in the order in which they were picked, event ``(count,)``.

    Values are positions, int64. A row with fewer positions to pick from than ``count`` picks all of
    them, and ends in -1, which stands for no position.

    :param scores: log-weight of each position, ``(*batch, M)``.
    :param count: how many are picked: a number, or one per row, int64 ``(*batch,)``, of which the
        largest is the length of a value.
    :param eligible: bool ``(*batch, M)``: positions that may be picked; all by default.
    :param temperature: divides the scores. 0 is the limit: the highest scores in order, equal ones
        from the left, with certainty.
    :raises ValueError: if ``count`` is no number of positions, the temperature is negative, or
        (while arguments are validated) an eligible position has no finite score.

    Example::

        law = PlackettLuce(torch.tensor([2.0, 0.0, 1.0]), 2)
        law.log_prob(torch.tensor([0, 2]))
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012 (torch's class protocol)
    has_enumerate_support = True

    def __init__(
        self,
        scores: Tensor,
        count: int | Tensor,
        *,
        eligible: Tensor | None = None,
        temperature: float = 1.0,
        validate_args: bool | None = None,
    ) -> None:
        if not (math.isfinite(temperature) and temperature >= 0):
            raise ValueError(
                f"PlackettLuce: temperature must be a finite number >= 0, got {temperature}."
            )
        size, wanted = scores.shape[-1], torch.as_tensor(count, device=scores.device)
        counts = wanted.flatten().tolist() or [0]
        if wanted.is_floating_point() or not 0 <= min(counts) <= max(counts) <= size:
            raise ValueError(
                f"PlackettLuce: count must be whole and between 0 and the {size} positions, got "
                f"{count}."
            )
        allowed = torch.ones_like(scores, dtype=torch.bool) if eligible is None else eligible
        batch = torch.broadcast_shapes(scores.shape[:-1], allowed.shape[:-1], wanted.shape)
        self.scores = scores.to(torch.float64).expand(*batch, size)
        self.eligible = allowed.expand(*batch, size)
        self.num_picked = torch.minimum(wanted.expand(batch), self.eligible.sum(-1))
        self.temperature = float(temperature)
        super().__init__(batch, torch.Size((max(counts),)), validate_args=validate_args)
        if self._validate_args and not bool(torch.isfinite(self.scores[self.eligible]).all()):
            raise ValueError(
                "PlackettLuce: an eligible position has a score that is not finite; bound the "
                "scores, or make it ineligible."
            )

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self) -> constraints.Constraint:
        """Positions, and -1 where there is none left."""
        return constraints.independent(constraints.integer_interval(-1, self.size - 1), 1)

    @property
    def size(self) -> int:
        """Number ``M`` of positions."""
        return self.scores.shape[-1]

    def sample(
        self,
        sample_shape: Sequence[int] = torch.Size(),
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Pick positions.

        :returns: int64 ``(*sample_shape, *batch, count)``, the first pick first.
        """
        shape = (*sample_shape, *self.batch_shape, self.size)
        keys = self.scores.detach().expand(shape)
        if self.temperature > 0:
            noise = uniforms(shape, generator=generator, device=keys.device).clamp_min(TINY)
            keys = keys / self.temperature - (-noise.log()).log()
        return self._first(keys)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the exact log-probability of picks in their order, with a gradient in the scores.

        :param value: positions, int64 ``(*sample, *batch, count)``.
        :returns: float64, the broadcast batch shape; ``-inf`` for a position picked twice, one that
            is not eligible, or another number of picks.
        """
        if self._validate_args:
            self._validate_sample(value)
        value = check_value(self, value)
        batch = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        value = value.expand(*batch, value.shape[-1])
        there = value >= 0
        index = value.clamp(0, self.size - 1)
        times = index.new_zeros(*batch, self.size).scatter_add(-1, index, there.to(torch.int64))
        legal = (there == self._wanted).all(-1) & (times <= self.eligible).all(-1)
        legal = legal & (value < self.size).all(-1)
        if self.temperature == 0:
            legal = legal & (value == self._first(self.scores)).all(-1)
            log_p = torch.zeros(batch, dtype=torch.float64, device=value.device)
        else:
            log_p = self._log_ratios(index, there, times == 0).sum(-1)
        return torch.where(legal, log_p, -torch.inf)

    def _log_ratios(self, index: Tensor, there: Tensor, untouched: Tensor) -> Tensor:
        """Return the log-probability of every pick given those before it, ``(*batch, count)``."""
        scores = (self.scores / self.temperature).expand(untouched.shape)
        own = torch.where(there, scores.gather(-1, index), NOBODY)
        never = torch.where(untouched & self.eligible, scores, NOBODY).logsumexp(-1, keepdim=True)
        # What is left before a pick: what is never picked, the picks after it, and itself.
        left = torch.cat([never, own.flip(-1)], -1).logcumsumexp(-1)[..., 1:].flip(-1)
        return torch.where(there, own - left, 0.0)

    def picked(self, value: Tensor) -> Tensor:
        """Return which positions are among the picks, bool ``(*batch, M)``.

        :param value: positions, int64 ``(*batch, count)``.
        """
        there = (value >= 0).to(torch.int64)
        times = there.new_zeros(*value.shape[:-1], self.size)
        return times.scatter_add(-1, value.clamp_min(0), there) > 0

    @property
    def _wanted(self) -> Tensor:
        """Which entries of a value are positions, bool ``(*batch, count)``."""
        entries = torch.arange(self.event_shape[0], device=self.scores.device)
        return entries < self.num_picked[..., None]

    def _first(self, keys: Tensor) -> Tensor:
        """Return the eligible positions of the highest keys in descending order."""
        keys = torch.where(self.eligible, keys, -torch.inf)
        order = keys.sort(stable=True, dim=-1, descending=True).indices[..., : self.event_shape[0]]
        return torch.where(self._wanted, order, -1)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Return all ordered selections, ``(number, *batch, count)``.

        :param expand: whether to expand the batch dimensions (size one otherwise).
        :raises NotImplementedError: if there are more than ``MAX_ENUMERATE``.
        """
        count = self.event_shape[0]
        lengths = sorted({count, *self.num_picked.flatten().tolist()})
        total = sum(math.perm(self.size, length) for length in lengths)
        if total > MAX_ENUMERATE:
            raise NotImplementedError(
                f"PlackettLuce: the support has {total} values, more than max_enumerate = "
                f"{MAX_ENUMERATE}; use sampling-based inference."
            )
        rows = [
            (*picks, *[-1] * (count - length))
            for length in lengths
            for picks in permutations(range(self.size), length)
        ]
        values = torch.tensor(rows, dtype=torch.int64, device=self.scores.device)
        values = values.reshape(total, *[1] * len(self.batch_shape), count)
        return values.expand(-1, *self.batch_shape, count) if expand else values

    def expand(self, batch_shape: Sequence[int], _instance: Self | None = None) -> Self:
        """Return the same distribution with larger batch dimensions."""
        new: Self = self._get_checked_instance(PlackettLuce, _instance)
        shape, old = check_expand(self.batch_shape, batch_shape), len(self.batch_shape)
        for name, value in vars(self).items():
            expanded = isinstance(value, Tensor)
            new.__dict__[name] = value.expand((*shape, *value.shape[old:])) if expanded else value
        super(PlackettLuce, new).__init__(shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new
