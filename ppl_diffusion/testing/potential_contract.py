"""The laws every potential keeps, as tests to inherit.

::

    class TestMyPotential(PotentialContract):
        def make_potential(self): return MyPotential(...)
        def make_sequences(self): return torch.randint(4, (24, 20), generator=...)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ppl_diffusion.potentials.base import AbstractPotential


class PotentialContract(ABC):
    """Inherit, implement the two factories, and pytest finds the tests.

    :cvar tolerance: largest difference between one batch and one call per sequence (0 unless the
        potential computes in lower precision).
    """

    tolerance: float = 0.0

    @abstractmethod
    def make_potential(self) -> AbstractPotential:
        """Return a fresh potential."""

    @abstractmethod
    def make_sequences(self) -> Tensor:
        """Return at least two clean sequences, int64 ``(B, L)``, some with different potentials."""

    def test_one_batch_equals_one_call_per_sequence(self) -> None:
        x0 = self.make_sequences()
        single = self.make_potential()
        expected = torch.stack([single(row) for row in x0])
        self._assert_equal(self.make_potential()(x0), expected)

    def test_every_leading_shape_is_accepted(self) -> None:
        x0 = self.make_sequences()
        flat = self.make_potential()(x0)
        for shape in ((len(x0), 1), (1, len(x0)), (1, 1, len(x0))):
            value = self.make_potential()(x0.reshape(*shape, -1))
            assert value.shape == shape
            self._assert_equal(value.reshape(-1), flat)
        assert self.make_potential()(x0[:0]).shape == (0,)

    def test_values_are_float64_and_never_nan_or_plus_infinity(self) -> None:
        value = self.make_potential()(self.make_sequences())
        assert value.dtype == torch.float64
        assert not bool(value.isnan().any())
        assert bool((value < math.inf).all())

    def test_the_examples_tell_sequences_apart(self) -> None:
        value = self.make_potential()(self.make_sequences())
        assert len(value.unique()) > 1, "make_sequences must reach more than one value"

    def test_the_lookahead_is_finite_float64(self) -> None:
        x0 = self.make_sequences()
        ahead = self.make_potential().lookahead(x0)
        assert ahead.shape == x0.shape[:-1]
        assert ahead.dtype == torch.float64
        assert bool(ahead.isfinite().all())

    def test_asking_twice_and_in_another_order_gives_the_same(self) -> None:
        potential, x0 = self.make_potential(), self.make_sequences()
        first = potential(x0)
        self._assert_equal(potential(x0.flip(0)).flip(0), first)

    def test_the_sequences_are_left_alone(self) -> None:
        x0 = self.make_sequences()
        before = x0.clone()
        potential = self.make_potential()
        potential(x0)
        potential.lookahead(x0)
        assert torch.equal(x0, before)

    def test_it_adds_and_scales_like_a_number(self) -> None:
        potential, x0 = self.make_potential(), self.make_sequences()
        value = potential(x0)
        total = potential + 2.5 * potential
        torch.testing.assert_close(total(x0), value + 2.5 * value, rtol=1e-12, atol=1e-12)
        ahead = potential.lookahead(x0)
        torch.testing.assert_close(total.lookahead(x0), 3.5 * ahead, rtol=1e-12, atol=1e-12)
        assert not bool((0 * potential)(x0).any())

    def _assert_equal(self, actual: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(actual, expected, rtol=0, atol=self.tolerance)
