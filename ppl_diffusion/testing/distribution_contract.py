"""What every distribution of the package must satisfy: Pyro's shape law, as Pyro tests it.

The same questions as Pyro's own generic distribution tests (which ``tests/peers/pyro`` runs
where a Pyro checkout is available), asked without one, and a few that they leave out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyro
import pytest
import torch
from pyro.distributions import TorchDistribution

SHAPES = [(), (2,), (2, 3)]


class DistributionContract:
    """Inherit, implement :meth:`make_distribution`, and pytest runs the contract::

        class TestMine(DistributionContract):
            def make_distribution(self):
                return Mine(...)

    The support must be small enough to enumerate. Set ``batch_shape`` to the batch shape of
    what you return; where it contains a 1, expanding that dimension is tested too.
    """

    batch_shape: tuple[int, ...] = ()

    def make_distribution(self) -> TorchDistribution:
        """Return the distribution under test."""
        raise NotImplementedError

    @pytest.fixture(name="d")
    def _d(self) -> TorchDistribution:
        return self.make_distribution()

    @pytest.fixture(name="double")
    def _double(self) -> Iterator[None]:
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        yield
        torch.set_default_dtype(before)

    def test_shapes(self, d: TorchDistribution) -> None:
        assert d.batch_shape == torch.Size(self.batch_shape)
        assert d.event_dim == len(d.event_shape) == d.support.event_dim
        for shape in SHAPES:
            value = d.sample(torch.Size(shape))
            assert (
                value.shape == d.shape(shape) == torch.Size(shape) + d.batch_shape + d.event_shape
            )
            assert d.log_prob(value).shape == torch.Size(shape) + d.batch_shape

    def test_samples_lie_in_the_support(self, d: TorchDistribution) -> None:
        value = d.sample(torch.Size((50,)))
        ok = d.support.check(value)
        assert ok.shape == (50, *d.batch_shape)
        assert bool(ok.all())
        assert d.support.is_discrete
        assert not d.support.check(value - 100).any()

    def test_probabilities_sum_to_one(self, d: TorchDistribution) -> None:
        total = d.log_prob(d.enumerate_support()).exp().sum(0)
        torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-6)

    def test_impossible_values_have_log_prob_minus_infinity_not_nan(
        self, d: TorchDistribution
    ) -> None:
        log_p = d.log_prob(d.enumerate_support())
        assert not bool(torch.isnan(log_p).any())
        assert bool((log_p <= 1e-9).all())

    def test_samples_are_possible(self, d: TorchDistribution) -> None:
        assert bool((d.log_prob(d.sample(torch.Size((200,)))) > -torch.inf).all())

    def test_small_values_broadcast_against_big_distributions(self, d: TorchDistribution) -> None:
        big = d.expand((2, *d.batch_shape))
        value = d.sample()
        assert big.log_prob(value).shape == (2, *d.batch_shape)
        torch.testing.assert_close(
            big.log_prob(value), d.log_prob(value).expand(2, *d.batch_shape), rtol=0, atol=1e-9
        )
        big_value = big.sample()
        torch.testing.assert_close(
            big.log_prob(big_value), d.log_prob(big_value), rtol=0, atol=1e-9
        )

    @pytest.mark.parametrize("make", [torch.Size, tuple, list])
    @pytest.mark.parametrize("shape", [(), (2,), (3, 1, 2)])
    def test_expand(self, d: TorchDistribution, shape: Sequence[int], make: type) -> None:
        for large in (d.expand(make((*shape, *d.batch_shape))), d.expand_by(make(shape))):
            assert large.batch_shape == (*shape, *d.batch_shape)
            assert large.event_shape == d.event_shape
            assert large.sample().shape == large.shape()
            assert isinstance(large, type(d))

    def test_expand_existing_dimension(self, d: TorchDistribution) -> None:
        for dim, size in enumerate(d.batch_shape):
            if size == 1:
                shape = [*d.batch_shape[:dim], 5, *d.batch_shape[dim + 1 :]]
                large = d.expand(shape)
                assert large.batch_shape == tuple(shape)
                assert large.log_prob(large.sample()).shape == tuple(shape)

    @pytest.mark.parametrize(
        ("first", "then"), [((2, 1), (4, 3)), ((2, 4), (2, 2, 1)), ((1, 2, 1), (2, 1))]
    )
    def test_expand_refuses_to_shrink(
        self, d: TorchDistribution, first: tuple[int, ...], then: tuple[int, ...]
    ) -> None:
        large = d.expand((*first, *d.batch_shape))
        with pytest.raises(ValueError, match="Cannot broadcast distribution of shape"):
            large.expand((*then, *d.batch_shape))

    def test_expand_twice(self, d: TorchDistribution) -> None:
        large = d.expand((2, 1, *d.batch_shape)).expand((2, 3, *d.batch_shape))
        assert large.sample().shape == large.shape()

    def test_enumerate_support_shapes(self, d: TorchDistribution) -> None:
        assert d.has_enumerate_support
        for large in (d, d.expand((2, *d.batch_shape))):
            full, slim = large.enumerate_support(), large.enumerate_support(expand=False)
            assert full.shape == (len(full), *large.batch_shape, *large.event_shape)
            ones = [1] * len(large.batch_shape)
            assert slim.shape == (len(full), *ones, *large.event_shape)
            assert bool((full == slim).all())
            flat = slim.reshape(len(slim), -1)
            assert len(flat.unique(dim=0)) == len(flat)

    def test_wrong_event_shape_is_refused(self, d: TorchDistribution) -> None:
        too_few, longer = d.event_shape[1:], (*d.shape()[:-1], d.shape()[-1] + 1)
        text = r"must end in shape|must match event_shape|at least event_dim|[Dd]imension"
        for shape in ((*d.shape(), 1), too_few, longer):
            with pytest.raises((ValueError, IndexError), match=text):
                d.log_prob(torch.zeros(shape))

    def test_wrong_batch_shape_is_refused(self, d: TorchDistribution) -> None:
        large = d.expand((3, *d.batch_shape))
        with pytest.raises((ValueError, RuntimeError)):
            large.log_prob(torch.zeros(2, *d.shape()))

    def test_values_outside_the_support_are_refused(self, d: TorchDistribution) -> None:
        value = d.sample()
        validated = d.expand(d.batch_shape)
        validated._validate_args = True
        with pytest.raises(ValueError, match="within the support"):
            validated.log_prob(value + 100)

    @pytest.mark.usefixtures("double")
    def test_default_dtype_float64_changes_nothing(self, d: TorchDistribution) -> None:
        value = d.sample(torch.Size((3,)))
        assert value.dtype == torch.int64
        assert d.log_prob(value).dtype == torch.float64
        assert d.log_prob(value.double()).shape == (3, *d.batch_shape)

    def test_log_prob_is_float64(self, d: TorchDistribution) -> None:
        assert d.log_prob(d.sample()).dtype == torch.float64

    def test_same_seed_same_value(self, d: TorchDistribution) -> None:
        pyro.set_rng_seed(11)
        first = d.sample(torch.Size((5,)))
        pyro.set_rng_seed(11)
        assert torch.equal(first, d.sample(torch.Size((5,))))

    def test_to_event_and_mask(self, d: TorchDistribution) -> None:
        large = d.expand((2, 3, *d.batch_shape))
        event = large.to_event(len(large.batch_shape))
        value = event.sample()
        torch.testing.assert_close(event.log_prob(value), large.log_prob(value).sum())
        assert float(large.mask(False).log_prob(value).abs().sum()) == 0
