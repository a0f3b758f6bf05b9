"""Solvers against exact maps and laws of latents whose denoisers are known."""

import math

import numpy as np
import pytest
import torch
from latent_fixtures import codes, grid, moment_errors, one_normal, pushed, transported, two_normals

from ppl_diffusion.kernels.latent_solvers import DDIM, DEIS, Ancestral, DPMSolver

COUNTS = (20, 40, 80, 160)


def errors(solver):
    """Return how far the end of a chain from 1.3 is from the exact map of the ODE, by steps."""
    problem, y = one_normal(), 1.3
    (a0, b0), (a1, b1) = (
        (float(problem.process.signal(u)), float(problem.process.noise(u))) for u in (1.0, 0.0)
    )
    scale = math.sqrt((a1**2 * 0.3 + b1**2) / (a0**2 * 0.3 + b0**2))
    exact = a1 * 0.7 + scale * (y - a0 * 0.7)
    start = torch.tensor([y], dtype=torch.float64)
    return [abs(float(pushed(solver, problem, start, count)) - exact) for count in COUNTS]


def slope(found):
    return math.log2(found[-2] / found[-1])


@pytest.mark.parametrize(
    ("solver", "printed"),
    [
        (DDIM(), (4.98e-2, 2.54e-2, 1.28e-2, 6.43e-3)),
        (DPMSolver(1), (4.98e-2, 2.54e-2, 1.28e-2, 6.43e-3)),
        (DPMSolver(2), (3.46e-3, 9.09e-4, 2.30e-4, 5.78e-5)),
    ],
    ids=repr,
)
def test_errors_of_dpm_solver(solver, printed):
    np.testing.assert_allclose(errors(solver), printed, rtol=2e-3)


@pytest.mark.parametrize(("order", "expected"), [(1, 0.99), (2, 1.96), (3, 2.90), (4, 3.68)])
def test_slopes_of_deis(order, expected):
    assert slope(errors(DEIS(order))) == pytest.approx(expected, abs=6e-3)


@pytest.mark.parametrize(("solver", "expected"), [(DPMSolver(2), 1.99), (DEIS(2, "t"), 1.99)])
def test_slopes_of_order_two(solver, expected):
    assert slope(errors(solver)) == pytest.approx(expected, abs=6e-3)


def test_ipndm_takes_unequal_steps_for_equal_ones():
    """Steps that are equal in log-SNR are not so in rho, so no order brings more than slope 2."""
    for order in (2, 3, 4):
        assert slope(errors(DEIS(order, "ipndm"))) == pytest.approx(2.0, abs=0.02)


def variance_error(order, num_steps, variance=0.3):
    """Return the error of the variance at the end of the SDE solver, by a linear recursion.

    The state is the pair of the latent and the prediction before, and the solver is asked for its
    own factors.
    """
    problem = one_normal(0.0, variance)
    process, solver = problem.process, DPMSolver(order, sde=True, lower_final=False)
    basis = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    y, past = basis[:, :, None, None]
    spread, before = np.diag([problem.moments(1.0)[1], 0.0]), None
    for u, s in grid(num_steps):
        history = solver.start(y)
        if before is not None:
            history = solver.remember(process, y, past, before, history)
        clean = problem.predict(y, u)
        law = solver.law(process, y, clean, u, s, history)
        mean, now = law.mean.flatten().numpy(), clean.flatten().numpy()
        step = np.array([[mean[1] - mean[0], mean[2] - mean[0]], [now[1] - now[0], 0.0]])
        spread = step @ spread @ step.T
        spread[0, 0] += float(law.variance.flatten()[0])
        before = u
    return abs(spread[0, 0] - problem.moments(0.0)[1])


@pytest.mark.parametrize(("order", "expected"), [(1, 1.0), (2, 1.99)])
def test_slope_of_the_variance(order, expected):
    found = [variance_error(order, count) for count in COUNTS]
    assert slope(found) == pytest.approx(expected, abs=0.04 if order == 1 else 6e-3)


def total_variation(solver, schedule, num_steps):
    """Return the total variation of two tokens that are read off the end of a latent's chain.

    ``x1 = x2 = B``, codes -1 and 1, both tokens drawn at once given ``y`` at level 0: they differ
    with probability ``2 r (1 - r)``, where ``r = P(B = 1 | y)``.
    """
    problem = codes(schedule)
    if solver.stochastic:
        y = torch.linspace(-5.0, 5.0, 401, dtype=torch.float64)
        density = torch.exp(-0.5 * y**2) / math.sqrt(2 * math.pi)
        mass, at = transported(solver, problem, y, density, num_steps) * (y[1] - y[0]), y
    else:
        # The map is steep at 0, so that points must lie densely there; the law is symmetric.
        x = torch.linspace(-27.0, 2.0, 2001, dtype=torch.float64)
        y = torch.exp(x)
        mass = 2 * y * torch.exp(-0.5 * y**2) / math.sqrt(2 * math.pi) * (x[1] - x[0])
        at = pushed(solver, problem, y, num_steps)
    return float((mass * disagreement(problem, at)).sum())


def disagreement(problem, y):
    r = 0.5 * (1.0 + problem.predict(y, 0.0))
    return 2 * r * (1 - r)


LATENT_STEPS = (1, 2, 4, 8, 16, 64)
TABLE = [
    ("sqrt", Ancestral(), (0.0908, 0.0168, 0.00443, 0.00112, 0.00029, 4e-5)),
    ("sqrt", DDIM(), (0.0873, 0.0180, 0.0056, 0.0016, 0.0005, 6e-5)),
    ("linear", Ancestral(), (0.1274, 0.0493, 0.0237, 0.0120, 0.0066, 0.0031)),
]


def digits(printed):
    """Return half a unit of the last digit of a printed number, and a little."""
    mantissa = f"{printed:g}".split("e")[0]
    if "e" in f"{printed:g}":
        return 0.51 * 10.0 ** int(f"{printed:g}".split("e")[1])
    return 0.51 * 10.0 ** -len(mantissa.split(".")[1])


@pytest.mark.parametrize(("schedule", "solver", "printed"), TABLE, ids=str)
def test_two_equal_tokens_from_a_latent(schedule, solver, printed):
    """The published digits; the best product law of two tokens has .4142."""
    for num_steps, expected in zip(LATENT_STEPS, printed, strict=True):
        got = total_variation(solver, schedule, num_steps)
        assert got == pytest.approx(expected, abs=digits(expected)), num_steps


@pytest.mark.parametrize(("schedule", "floor"), [("sqrt", 1.352e-5), ("linear", 2.085e-3)])
def test_floor_of_a_latent_that_ends_in_noise(schedule, floor):
    """What no number of steps goes below."""
    problem, y = codes(schedule), torch.linspace(-5.0, 5.0, 4001, dtype=torch.float64)
    a, b = float(problem.process.signal(0.0)), float(problem.process.noise(0.0))
    mass = torch.exp(-0.5 * ((y - a) / b) ** 2) + torch.exp(-0.5 * ((y + a) / b) ** 2)
    got = float((mass / mass.sum() * disagreement(problem, y)).sum())
    assert got == pytest.approx(floor, rel=1e-3)
    for solver in (Ancestral(), DDIM(), DPMSolver(2), DEIS(3)):
        assert total_variation(solver, schedule, 64) > got


def test_lowering_the_last_step_costs_where_a_chain_ends_in_noise():
    """The official default guards a step to infinite log-SNR, which these chains do not take."""
    for schedule, lowered, plain in (("sqrt", 0.00485, 0.00323), ("linear", 0.0214, 0.0160)):
        here = total_variation(DPMSolver(2), schedule, 4)
        assert here == pytest.approx(lowered, rel=5e-3)
        assert total_variation(DPMSolver(2, lower_final=False), schedule, 4) == pytest.approx(
            plain, rel=5e-3
        )


EVALUATIONS = (4, 8, 16, 32, 64)
MOMENTS = [
    (Ancestral(), (0.503, 0.255, 0.126, 0.0625, 0.0312)),
    (DDIM(), (0.406, 0.206, 0.103, 0.0512, 0.0258)),
    (DPMSolver(2), (0.235, 0.0158, 0.00872, 0.00152, 0.000545)),
    (DPMSolver(2, lower_final=False), (0.0967, 0.0430, 0.00872, 0.00152, 0.000545)),
    (DEIS(2), (0.298, 0.105, 0.0331, 0.00959, 0.00244)),
    (DEIS(3), (0.274, 0.0796, 0.0179, 0.00286, 0.000623)),
    (DEIS(3, "t"), (0.0355, 0.0171, 0.00384, 0.000747, 0.000297)),
    (DEIS(2, "ipndm"), (0.0557, 0.0306, 0.00981, 0.00257, 0.00075)),
]


@pytest.mark.parametrize(("solver", "table"), MOMENTS, ids=str)
def test_moments_by_evaluations(solver, table):
    """Error of E[y] plus that of E[y^2] for two unequal modes, by evaluations of the network."""
    found = moment_errors(solver, two_normals(), EVALUATIONS)
    np.testing.assert_allclose(list(found.values()), table, rtol=1e-2)
