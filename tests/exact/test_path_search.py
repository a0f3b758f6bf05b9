"""The search for a path: against every path of a tiny grid, and against exact bounds."""

import itertools

import numpy as np
import pytest
import torch

from ppl_diffusion.kernels.path import Path
from ppl_diffusion.models.latent_costs import hidden_costs
from ppl_diffusion.models.path_search import PathCosts, best_path, total_correlation
from ppl_diffusion.testing.latent_laws import LatentLaw, total_correlations
from ppl_diffusion.testing.latent_toys import LatentProblem, corr_bits, mix_prod, random_latents
from tests.exact.test_latent_bounds import Posterior, program

BITS = corr_bits(0.05)


def exact_costs(problem, grid):
    """Average costs over all sequences, codes and ways to hide them."""
    axes = [np.linspace(0, 1, n + 1) for n in grid]
    joint, model = problem.joint, program(problem, encoder=Posterior(problem))
    values = torch.cartesian_prod(*[torch.arange(n) for n in joint.shape])
    weights = joint.flatten()
    values, weights = values[weights > 0], weights[weights > 0]
    sizes = torch.tensor(joint.shape)
    length = problem.length
    hidden = torch.cartesian_prod(*[torch.tensor([False, True])] * joint.ndim)
    states = torch.where(hidden, sizes, values[:, None])  # (values, patterns, L + N)
    clean = values[:, None].expand_as(states).flatten(0, 1)
    states = states.flatten(0, 1)
    level = torch.ones(len(states), dtype=torch.float64)
    parts = (states[:, :length], states[:, length:])
    paid = hidden_costs(model, clean[:, :length], clean[:, length:], parts, (level, level))
    paid = [part.reshape(len(values), -1) for part in paid]
    tables = np.zeros((2, grid[0] + 1, grid[1] + 1))
    for i, j in np.ndindex(tables.shape[1:]):
        levels = torch.tensor([axes[0][i]] * length + [axes[1][j]] * (joint.ndim - length))
        chance = torch.where(hidden, levels, 1 - levels).prod(-1)
        for c, (part, share) in enumerate(zip(paid, (axes[0][i], axes[1][j]), strict=True)):
            tables[c, i, j] = weights @ part @ chance / max(share, 1e-9)
    return PathCosts(*axes, *tables, 1 - axes[0], 1 - axes[1], -problem.encoder_entropy)


def every_path(grid, evaluations):
    """List all paths over a grid with at most so many steps, by trying all lists of points."""
    points = list(itertools.product(range(grid[0] + 1), range(grid[1] + 1)))
    for count in range(evaluations):
        for middle in itertools.permutations(points, count):
            for end in ((0, 0), (0, grid[1])):
                indices = [grid, *middle, end]
                levels = [(i / grid[0], j / grid[1]) for i, j in indices]
                try:
                    yield Path(levels)
                except ValueError:
                    continue


@pytest.fixture(scope="module", name="costs")
def _costs():
    return exact_costs(BITS, (4, 2))


PATHS = [
    Path.masked(4),
    Path.sequential(2, 4),
    Path.joint(2),
    Path.ordered(2),
    Path([(1, 1), (0.75, 0.5), (0.25, 0.5), (0.25, 0), (0, 0)]),
    Path([(1, 1), (0, 1)]),
]


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("seed", [None, 0], ids=["bits", "random"])
def test_a_bound_is_a_sum_of_costs_of_steps(costs, path, seed):
    problem = BITS if seed is None else random_latents(2, 2, 3, seed=seed)
    costs = costs if seed is None else exact_costs(problem, (4, 2))
    assert costs.nelbo(path) == pytest.approx(LatentLaw.of(problem, path).nelbo, abs=1e-9)
    assert len(costs.steps(path)) == path.num_steps


@pytest.mark.parametrize("evaluations", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(4))
def test_no_path_of_the_grid_is_cheaper(evaluations, seed):
    """Any numbers will do for costs: the search knows nothing of probabilities."""
    random = np.random.default_rng(seed)
    grid = (2, 2)
    axes = [np.linspace(0, 1, n + 1) for n in grid]
    tables = random.uniform(0.2, 2.0, (2, 3, 3))
    masses = [np.array([1.0, 0.3, 0.0]), np.array([5.0, 0.7, 0.1])]
    costs = PathCosts(*axes, *tables, *masses, constant=random.normal(-1.0))
    paths = list(every_path(grid, evaluations))
    assert len(paths) >= {1: 2}.get(evaluations, 9)  # 2 direct ones, 7 over one point between
    least = min(costs.nelbo(path) for path in paths)
    found = best_path(costs, evaluations)
    assert found.num_steps <= evaluations
    assert costs.nelbo(found) == pytest.approx(least, abs=1e-12)


def test_two_bits_are_learnt_from_their_code_first(costs):
    assert best_path(costs, 1) == Path.masked(1)
    for evaluations in (2, 3, 8):  # more evaluations have nothing left to gain
        assert best_path(costs, evaluations) == Path.sequential(1, 1)
    assert costs.nelbo(Path.sequential(1, 1)) == pytest.approx(BITS.entropy, abs=1e-12)
    assert total_correlation(costs, Path.sequential(1, 1)) == pytest.approx(0.0, abs=1e-12)


def test_a_useless_code_is_left_alone():
    """Its path is that of masked diffusion, with equal steps for two bits: H(X) + I / T."""
    says_nothing = torch.full((2, 1, 2), 0.5, dtype=torch.float64)
    problem = LatentProblem(BITS.weights, BITS.tokens, says_nothing)
    costs = exact_costs(problem, (8, 2))
    for evaluations in (1, 2, 4, 8):
        found = best_path(costs, evaluations)
        assert found == Path.masked(evaluations)
        assert costs.nelbo(found) == pytest.approx(BITS.entropy + 0.379191 / evaluations, abs=1e-6)


def test_the_best_times_are_not_equal_for_three_bits():
    problem = mix_prod(3, 0.9)
    costs = exact_costs(problem, (16, 1))
    masked = [path for path in (Path([(1, 1), (i / 16, 1), (0, 1)]) for i in range(1, 16))]
    best = min(masked, key=lambda path: LatentLaw.of(problem, path).nelbo)
    blind = PathCosts(
        costs.token_levels,
        costs.latent_levels,
        costs.tokens[:, [1, 1]],
        costs.latent + 10.0,
        costs.token_mass,
        costs.latent_mass,
    )
    assert best_path(blind, 2) == best
    assert best != Path.masked(2)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_what_a_step_loses_is_below_its_total_correlation(path):
    """A grid of 1/16 still loses a quarter of what four steps do; the exact grid is infinite."""
    costs = exact_costs(BITS, (16, 16))
    exact = np.array(total_correlations(BITS, path))
    estimate = total_correlation(costs, path)
    assert (estimate <= exact + 1e-9).all()
    assert (estimate >= 0.74 * exact - 1e-9).all()
    gap = costs.nelbo(path) - BITS.entropy
    assert exact.sum() == pytest.approx(gap, abs=1e-9)


def test_estimates_find_the_code(costs):
    model = program(BITS)
    generator = torch.Generator().manual_seed(0)
    x0, _ = BITS.draw(2000, generator)
    estimate = model.path_costs(x0, grid=(4, 2), num_draws=2, generator=generator)
    for mine, exact in ((estimate.tokens, costs.tokens), (estimate.latent, costs.latent)):
        assert np.abs(mine - exact).max() < 0.15  # two standard deviations are about 0.06
    assert estimate.constant == pytest.approx(costs.constant, abs=0.03)
    found = model.propose_path(x0, evaluations=4, grid=(4, 2), min_gain=0.02, generator=generator)
    assert found == Path.sequential(1, 1)


def test_what_cannot_be_searched_is_refused(costs):
    with pytest.raises(ValueError, match=r"the token level 0.6667 is none of the grid's 5"):
        costs.nelbo(Path.masked(3))
    with pytest.raises(ValueError, match="best_path: evaluations must be >= 1"):
        best_path(costs, 0)
    grid = np.linspace(0, 1, 3)
    with pytest.raises(ValueError, match=r"latent must have the shape \(3, 3\), got \(2, 2\)"):
        PathCosts(grid, grid, np.ones((3, 3)), np.ones((2, 2)), 1 - grid, 1 - grid)
    with pytest.raises(ValueError, match="token_levels must go from 0 to 1"):
        PathCosts(grid / 2, grid, np.ones((3, 3)), np.ones((3, 3)), 1 - grid, 1 - grid)
    with pytest.raises(ValueError, match="latent_levels must be a vector of increasing levels"):
        PathCosts(grid, grid[::-1], np.ones((3, 3)), np.ones((3, 3)), 1 - grid, 1 - grid)
