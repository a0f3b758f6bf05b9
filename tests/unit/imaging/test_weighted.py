"""Weighted draws against brute force, and against what calibration means."""

import math

import numpy as np
import pytest
import torch

from ppl_diffusion.imaging import weighted


def drawn(n=12, shape=(3, 4), seed=0):
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn((n, *shape), generator=generator, dtype=torch.float64)
    weights = torch.rand(n, generator=generator, dtype=torch.float64)
    truth = torch.randn(shape, generator=generator, dtype=torch.float64)
    return truth, draws, weights / weights.sum()


def repeated(draws, counts):
    """Return draws as often as their weights say, in all of the sum of the counts."""
    return draws.repeat_interleave(torch.tensor(counts), 0)


def test_weights_count_copies():
    _, draws, _ = drawn(3)
    counts = [1, 4, 5]
    weights = torch.tensor(counts, dtype=torch.float64) / 10
    copies, equal = repeated(draws, counts), torch.full((10,), 0.1, dtype=torch.float64)
    torch.testing.assert_close(weighted.mean(draws, weights), copies.mean(0))
    torch.testing.assert_close(weighted.sd(draws, weights), copies.std(0, correction=0))
    for level in (0.0, 0.05, 0.1, 0.35, 0.5, 0.95, 1.0):
        found = weighted.quantile(draws, weights, level)
        peer = np.quantile(copies.numpy(), level, axis=0, method="inverted_cdf")
        np.testing.assert_allclose(found.numpy(), peer)
        torch.testing.assert_close(found, weighted.quantile(copies, equal, level))
    truth = torch.zeros_like(draws[0])
    covered = [weighted.coverage(truth, x, w, 0.6) for x, w in ((draws, weights), (copies, equal))]
    assert covered[0] == covered[1] != weighted.coverage(truth, draws, torch.ones(3) / 3, 0.6)
    torch.testing.assert_close(
        weighted.crps(truth, draws, weights), weighted.crps(truth, copies, equal)
    )


@pytest.mark.parametrize("fair", [False, True])
def test_crps_is_the_double_sum(fair):
    truth, draws, weights = drawn()
    error = torch.einsum("n,n...->...", weights, (draws - truth).abs())
    pairs = torch.einsum("n,m,nm...->...", weights, weights, (draws[:, None] - draws).abs())
    spare = 1 - weights.square().sum() if fair else 1.0
    torch.testing.assert_close(
        weighted.crps(truth, draws, weights, fair=fair), error - pairs / (2 * spare)
    )


def test_crps_is_the_area_between_distribution_functions():
    truth, draws, weights = drawn(shape=(1,))
    grid = torch.linspace(-6, 6, 400_001, dtype=torch.float64)
    below = (weights[:, None] * (draws <= grid)).sum(0)
    area = torch.trapezoid((below - (truth <= grid).double()).square(), grid)
    assert float(weighted.crps(truth, draws, weights)) == pytest.approx(float(area), abs=1e-4)


def test_a_single_draw_scores_its_absolute_error():
    truth, draws, _ = drawn(1)
    one = torch.ones(1, dtype=torch.float64)
    torch.testing.assert_close(weighted.crps(truth, draws, one), (draws[0] - truth).abs())
    assert float(weighted.sd(draws, one).max()) == 0
    assert weighted.diversity(draws, one) == 0
    with pytest.raises(ValueError, match="a single draw has no fair score"):
        weighted.crps(truth, draws, one, fair=True)


def test_the_fair_score_does_not_depend_on_the_number_of_draws():
    """For draws and truth of one standard normal law both expectations are 1/sqrt(pi) - spread."""
    few, many = [], []
    for seed in range(20):
        truth, draws, _ = drawn(40, (500,), seed)
        for n, scores in ((4, few), (40, many)):
            equal = torch.full((n,), 1 / n, dtype=torch.float64)
            scores.append(float(weighted.crps(truth, draws[:n], equal, fair=True).mean()))
    # The score of the law itself; 10,000 truths have a standard error of .004.
    assert np.mean(few) == pytest.approx(1 / math.sqrt(math.pi), abs=0.016)
    assert np.mean(many) == pytest.approx(1 / math.sqrt(math.pi), abs=0.016)


def test_ranks_of_one_more_draw_are_uniform():
    truth, draws, _ = drawn(5, (20_000,))
    equal = torch.full((5,), 0.2, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    ranks = weighted.ranks(truth, draws, equal, generator=generator).sort()[0]
    even = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    # Kolmogorov's statistic: beyond 2.1 / sqrt(n) with probability 3e-4.
    assert float((ranks - even).abs().max()) < 2.1 / math.sqrt(20_000)


def test_ties_are_broken_at_random():
    """Pixels of the background are equal in all draws, and in the truth."""
    ones, equal = torch.ones(5, 20_000), torch.full((5,), 0.2, dtype=torch.float64)
    generator = torch.Generator().manual_seed(2)
    share = weighted.coverage(ones[0], ones, equal, randomised=True, generator=generator)
    assert abs(share - 0.9) < 4 * math.sqrt(0.09 / 20_000)
    assert weighted.coverage(ones[0], ones, equal) == 1


@pytest.mark.parametrize("n", [8, 16, 50])
def test_few_draws_cover_their_share_by_ranks_and_what_they_can_by_their_interval(n):
    truth, draws, _ = drawn(n, (20_000,))
    equal = torch.full((n,), 1 / n, dtype=torch.float64)
    error = 4 * math.sqrt(0.25 / 20_000)
    generator = torch.Generator().manual_seed(3)
    by_rank = weighted.coverage(truth, draws, equal, randomised=True, generator=generator)
    assert abs(by_rank - 0.9) < error
    assert abs(weighted.coverage(truth, draws, equal) - weighted.attainable(n)) < error


def test_what_can_be_attained():
    assert weighted.attainable(16) == 15 / 17
    assert weighted.attainable(1) == 0
    assert weighted.attainable(100_000) == pytest.approx(0.9, abs=1e-4)


def test_a_point_mass_covers_nothing():
    truth, draws, _ = drawn(8, (1000,))
    equal = torch.full((8,), 1 / 8, dtype=torch.float64)
    assert weighted.coverage(truth, draws[:1].expand(8, -1), equal) == 0


def test_the_narrow_draws_of_an_optimiser_cover_too_little():
    truth, draws, _ = drawn(16, (5000,))
    equal = torch.full((16,), 1 / 16, dtype=torch.float64)
    assert weighted.coverage(truth, 0.2 * draws, equal) < 0.35


def test_diversity_is_the_size_of_a_difference_of_two_draws():
    _, draws, weights = drawn()
    squares = (draws[:, None] - draws).square().mean((-1, -2))
    expected = torch.einsum("n,m,nm->", weights, weights, squares).sqrt()
    assert weighted.diversity(draws, weights) == pytest.approx(float(expected))
