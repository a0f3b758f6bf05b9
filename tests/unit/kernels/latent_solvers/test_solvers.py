"""Solvers: their laws, one formula under several names, history per row, and what is refused."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from latent_fixtures import descend, grid, one_normal, two_normals
from pyro.distributions import Delta
from torch.distributions import kl_divergence

from ppl_diffusion.kernels.latent_solvers import (
    DDIM,
    DEIS,
    SOLVERS,
    Ancestral,
    DPMSolver,
    TwoGrids,
    Wide,
)
from ppl_diffusion.kernels.latent_solvers.deis import EQUAL_STEPS, noise_weights
from ppl_diffusion.processes import Gaussian

ALL = [
    Ancestral(),
    DDIM(),
    DDIM(0.5),
    DPMSolver(1),
    DPMSolver(2),
    DPMSolver(2, sde=True),
    DEIS(1),
    DEIS(4),
    DEIS(3, "t"),
    DEIS(3, "ipndm"),
    TwoGrids(0.5),
    Wide(),
]
MULTISTEP = [solver for solver in ALL if solver.order > 1]
each_solver = pytest.mark.parametrize("solver", ALL, ids=repr)
each_multistep = pytest.mark.parametrize("solver", MULTISTEP, ids=repr)

SHAPE = (2, 5, 3, 4)
"""Runs, particles, slots, coordinates."""


def draws(seed=0, shape=SHAPE, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)


def one_law(solver, process=None, dtype=torch.float64, u=0.7, s=0.3):
    """Return the law of a step after one that was remembered."""
    process = process or Gaussian()
    y, clean, before = (draws(seed, dtype=dtype) for seed in range(3))
    history = solver.remember(process, y, before, 0.9, solver.start(y))
    return solver.law(process, y, clean, u, s, history)


@each_solver
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_laws(solver, dtype):
    law = one_law(solver, dtype=dtype)
    assert law.event_shape == SHAPE[2:]
    assert law.batch_shape == SHAPE[:2]
    value = law.sample()
    assert value.dtype == dtype
    assert isinstance(law, Delta) is not solver.stochastic
    if solver.stochastic:
        assert law.log_prob(value).shape == SHAPE[:2]
        assert not torch.equal(value, law.sample())
    exact = one_law(solver).mean
    round_off = 1e-5 if dtype == torch.float32 else 0.0
    torch.testing.assert_close(law.mean.double(), exact, atol=round_off, rtol=0.0)


@each_solver
def test_gradients_reach_latent_and_prediction(solver):
    y, clean = draws().requires_grad_(), draws(1).requires_grad_()
    law = solver.law(Gaussian(), y, clean, 0.7, 0.3, solver.start(y))
    law.rsample().sum().backward()
    assert bool((y.grad != 0).all())
    assert bool((clean.grad != 0).all())


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (DPMSolver(1), DDIM()),
        (DEIS(1), DDIM()),
        (DEIS(1, "t"), DDIM()),
        (TwoGrids(0.0), DDIM()),
        (DPMSolver(1, sde=True), Ancestral()),
        (DDIM(1.0), Ancestral()),
    ],
    ids=repr,
)
def test_one_formula_under_two_names(one, other):
    """To the last digit."""
    here, there = one_law(one), one_law(other)
    assert torch.equal(here.mean, there.mean)
    if one.stochastic:
        assert torch.equal(here.base_dist.scale, there.base_dist.scale)


def test_ddim_formula():
    process, y, clean = Gaussian(), draws(), draws(1)
    a, b = process.signal, process.noise
    noise = (y - float(a(0.7)) * clean) / float(b(0.7))
    expected = float(a(0.3)) * clean + float(b(0.3)) * noise
    torch.testing.assert_close(one_law(DDIM(), process).mean, expected)


@each_solver
def test_point_mass_in_one_step(solver):
    """A prediction that does not change is exact, so one step from level 1 to 0 is."""
    process, y = Gaussian(), draws()
    clean = torch.full(SHAPE, 0.4, dtype=torch.float64)
    law = solver.law(process, y, clean, 1.0, 0.0, solver.start(y))
    if isinstance(solver, TwoGrids) or solver == DDIM(0.5):
        pytest.skip("another law")
    mean, _ = process.bridge(y, clean, 1.0, 0.0, solver.eta)
    torch.testing.assert_close(law.mean, mean)
    halfway = solver.law(process, y, clean, 1.0, 0.5, solver.start(y)).mean
    history = solver.remember(process, y, clean, 1.0, solver.start(y))
    twice = solver.law(process, halfway, clean, 0.5, 0.0, history).mean
    torch.testing.assert_close(twice, mean)


@each_multistep
def test_levels_of_rows(solver):
    """Every row has its own levels and its own restarts; held to one row at a time."""
    process, count = Gaussian("linear"), 4
    y, one, two, three = draws(3, (4, count, 2, 3))
    u = torch.tensor([[1.0, 0.9, 1.0, 0.8], [0.7, 0.6, 0.8, 0.7], [0.5, 0.5, 0.4, 0.3]]).double()
    s, restart = torch.tensor([0.1, 0.0, 0.2, 0.0]).double(), torch.tensor([True, False] * 2)

    def law(rows, at):
        history = solver.start(y[rows])
        for k, clean in enumerate((one, two)):
            again = restart[rows] if k else False
            history = solver.remember(process, y[rows], clean[rows], at(u[k]), history, again)
        return solver.law(process, y[rows], three[rows], at(u[2]), at(s), history).mean

    together = law(slice(None), lambda level: level)
    for row in range(count):
        alone = law(slice(row, row + 1), lambda level, row=row: float(level[row]))
        torch.testing.assert_close(together[row : row + 1], alone)


@each_multistep
def test_restart_lowers_the_order(solver):
    process, first_order = Gaussian(), Ancestral() if solver.stochastic else DDIM()
    y, clean, before = draws(), draws(1), draws(2)
    history = solver.remember(process, y, before, 0.9, solver.start(y))
    plain = first_order.law(process, y, clean, 0.7, 0.3, {}).mean
    assert not torch.allclose(solver.law(process, y, clean, 0.7, 0.3, history).mean, plain)
    rows = torch.zeros(SHAPE[:2], dtype=torch.bool)
    rows[0, 1] = True
    mixed = solver.law(process, y, clean, 0.7, 0.3, solver.forget(history, rows)).mean
    assert torch.equal(torch.isclose(mixed, plain).all(-1).all(-1), rows)
    for none in (
        solver.forget(history),
        solver.remember(process, y, before, 0.9, solver.start(y), True),
    ):
        assert torch.equal(solver.law(process, y, clean, 0.7, 0.3, none).mean, plain)


def gathered(solver, *, with_history):
    """Permute particles in the middle of a chain; return what that and permuting the end give."""
    problem, start = two_normals(), draws(5)
    order = torch.tensor([3, 0, 4, 1, 2])

    def permute(k, latent, history):
        if k != 5:
            return latent, history
        moved = {name: value[:, order] for name, value in history.items()}
        return latent[:, order], moved if with_history else history

    there = descend(solver, problem, start, grid(12))[:, order]
    return descend(solver, problem, start, grid(12), permute), there


@each_multistep
def test_resampling_commutes_with_steps(solver):
    torch.testing.assert_close(*gathered(solver, with_history=True))


@each_multistep
def test_history_that_stays_behind_is_found(solver):
    here, there = gathered(solver, with_history=False)
    assert float((here - there).abs().max()) > 1e-3


@pytest.mark.parametrize(
    "solver", [DPMSolver(2, lower_final=final) for final in (None, True, False)]
)
@pytest.mark.parametrize("num_steps", [9, 10])
def test_order_of_the_last_step(solver, num_steps):
    problem, last = two_normals(), {}
    steps = grid(num_steps)

    def keep(k, latent, history):
        if k == num_steps - 2:
            last.update(latent=latent, history=history)
        return latent, history

    end = descend(solver, problem, draws(6), steps, keep)
    clean = problem.predict(last["latent"], steps[-1][0])
    plain = DDIM().law(problem.process, last["latent"], clean, *steps[-1], {}).mean
    lowered = num_steps < 10 if solver.lower_final is None else solver.lower_final
    assert torch.allclose(end, plain) is lowered


def test_predictions_of_one_level_have_no_slope():
    """Tokens changed between two predictions at one level, and nobody said restart."""
    process, y, solver = Gaussian(), draws(), DPMSolver(2)
    history = solver.remember(process, y, draws(1), 0.7, solver.start(y))
    law = solver.law(process, y, draws(2), 0.7, 0.3, history)
    assert torch.equal(law.mean, DDIM().law(process, y, draws(2), 0.7, 0.3, {}).mean)


def test_projection():
    solver = DPMSolver(2, projection=lambda clean: clean.clamp(-0.1, 0.1))
    process, y, clean = Gaussian(), draws(), draws(1)
    history = solver.remember(process, y, draws(2), 0.9, solver.start(y))
    raw = DPMSolver(2).estimate(process, y, clean, 0.7, 0.3, history)
    assert torch.equal(solver.estimate(process, y, clean, 0.7, 0.3, history), raw.clamp(-0.1, 0.1))


@pytest.mark.parametrize("solver", [s for s in ALL if s.stochastic], ids=repr)
def test_term_of_the_bound(solver):
    """Held to the divergence of the two normal laws."""
    process, y, clean, guess = Gaussian(), draws(), draws(1), draws(2)
    history = solver.remember(process, y, draws(3), 0.9, solver.start(y))
    mean, std = process.bridge(y, clean, 0.7, 0.3, solver.eta)
    law = solver.law(process, y, guess, 0.7, 0.3, history)
    there = torch.distributions.Normal(mean, torch.as_tensor(std).expand_as(mean))
    expected = kl_divergence(there, torch.distributions.Normal(law.mean, law.base_dist.scale))
    got = solver.step_kl(process, y, clean, guess, 0.7, 0.3, history)
    torch.testing.assert_close(got, expected.sum((-1, -2)))


@pytest.mark.parametrize("solver", [s for s in ALL if not s.stochastic], ids=repr)
def test_deterministic_steps_have_no_bound(solver):
    y = draws()
    with pytest.raises(ValueError, match="a deterministic step has no density"):
        solver.step_kl(Gaussian(), y, y, y, 0.7, 0.3, solver.start(y))


@each_solver
def test_label(solver):
    assert solver.label(0.3) == (0.65 if isinstance(solver, TwoGrids) else 0.3)


def test_two_grids_formula():
    """The noise is read off at the label, and the step ends on the grid of states."""
    process, y, clean, solver = Gaussian(), draws(), draws(1), TwoGrids(0.99)
    a, b = process.signal, process.noise
    assert solver.label(1.0) == 1.0
    at = 0.99 + 0.01 * 0.7
    noise = (y - float(a(at)) * clean) / float(b(at))
    expected = float(a(0.3)) * clean + float(b(0.3)) * noise
    torch.testing.assert_close(one_law(solver, process).mean, expected)


@pytest.mark.parametrize("basis", ["rho", "t", "ipndm"])
def test_noise_weights(basis):
    """Held to sums over ten thousand points of the Lagrange polynomials."""
    process = Gaussian("cosine")
    levels = (0.35, 0.4, 0.6, 0.75, 0.95)
    for count in range(2, 6):
        weights = noise_weights(process, basis, levels[:count])
        assert sum(weights) == pytest.approx(1.0, abs=1e-12)
        if basis == "ipndm":
            continue
        rho = np.exp(-process.log_snr(np.array(levels)))
        dense = np.linspace(0.4, 0.35, 10_001)
        dense_rho = np.exp(-process.log_snr(dense))
        x, nodes = (dense_rho, rho[1:count]) if basis == "rho" else (dense, levels[1:count])
        for j, weight in enumerate(weights):
            others = [(x - n) / (nodes[j] - n) for m, n in enumerate(nodes) if m != j]
            height = np.prod(others, axis=0) if others else np.ones_like(x)
            expected = np.trapezoid(height, dense_rho) / (rho[0] - rho[1])
            assert weight == pytest.approx(expected, abs=1e-7)


def test_equal_steps_in_rho_have_the_classical_weights():
    process = Gaussian("linear")
    levels = process.level_of(-np.log(np.linspace(1.0, 2.0, 5)))
    for count in range(2, 6):
        weights = noise_weights(process, "rho", tuple(levels[:count]))
        np.testing.assert_allclose(weights, EQUAL_STEPS[count - 2], atol=1e-10)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DDIM(1.5), r"DDIM: eta must lie in \[0, 1\], got 1.5"),
        (lambda: DPMSolver(3), "DPMSolver: order must be 1 or 2, got 3"),
        (lambda: DEIS(5), "DEIS: order must be 1, 2, 3 or 4, got 5"),
        (lambda: DEIS(2, "s"), "DEIS: basis must be one of rho, t, ipndm, got 's'"),
        (lambda: TwoGrids(2.0), r"TwoGrids: lowest must lie in \[0, 1\], got 2.0"),
    ],
)
def test_bad_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_solvers_are_values():
    assert DEIS(3) == DEIS() != DEIS(2)
    assert len(set(ALL)) == len({repr(solver) for solver in ALL}) == len(ALL)
    assert len({solver.name for solver in SOLVERS.values()}) == len(SOLVERS)
    assert next(iter(SOLVERS.values())) == Ancestral()


def test_a_history_is_left_alone():
    process, y, solver = Gaussian(), draws(), DEIS(3)
    start = solver.start(y)
    copies = {name: value.clone() for name, value in start.items()}
    solver.remember(process, y, draws(1), 1.0, start)
    assert all(torch.equal(start[name], copies[name]) for name in start)


def test_uneven_steps():
    """Order 2 on a grid whose steps shrink threefold: the error falls like that of equal steps."""
    problem, y = one_normal(), torch.full((1, 1, 1), 1.3, dtype=torch.float64)
    ends = []
    for count in (80, 160, 2000):
        x = np.linspace(1.0, 0.0, count + 1)
        levels = 0.5 * x + 0.5 * x**2
        steps = list(pairwise(float(x) for x in levels))
        ends.append(float(descend(DPMSolver(2), problem, y, steps)))
    assert abs(ends[0] - ends[2]) / abs(ends[1] - ends[2]) == pytest.approx(4.0, rel=0.15)
