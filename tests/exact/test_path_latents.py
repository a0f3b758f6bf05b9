"""Latents that a chain depends on move with the ratio of path laws: unbiased, or found out.

Evidence and means that are not normalised are held to enumeration (4 standard errors: false alarm
6e-5 each) on programs whose chains depend on a label, on labels in a plate, and on a number.
"""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.handlers import clamp
from ppl_diffusion.inference import SMC, latent_moves
from ppl_diffusion.kernels import Absorbing, InterpolatingKernel, OrderedKernel
from ppl_diffusion.programs import sources
from ppl_diffusion.testing.conditional import LabelledTables, TiltedSites
from ppl_diffusion.testing.oracles import z_score
from ppl_diffusion.testing.toys import random_joint, toy_process

RATES = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
NOISY, MASKED = toy_process("uniform", 2), Absorbing(2)
TABLES = [random_joint(2, 2, seed=seed, sharpness=3.0) for seed in (1, 2, 6)]
BY_LABEL = InterpolatingKernel(NOISY, LabelledTables(TABLES, NOISY), num_steps=4)
REVEALED = OrderedKernel(MASKED, LabelledTables(TABLES, MASKED), length=2)
BY_NUMBER = OrderedKernel(MASKED, TiltedSites(MASKED), length=3)
LABELS, PAIRS = torch.arange(3), torch.cartesian_prod(*[torch.arange(2)] * 2)


def number(x):
    return torch.tensor(x, dtype=torch.float64)


def zeros(x):
    return (x == 0).sum(-1).double()


def density(mean, y, sd):
    return dist.Normal(mean, sd).log_prob(number(y)).exp()


@pytest.fixture(autouse=True)
def large_batches(monkeypatch):
    monkeypatch.setattr(sources, "MAX_ROWS", 2**17)


def label():
    """A chain of uniform noise that depends on a label, and a latent that no chain depends on."""
    c = pyro.sample("c", dist.Categorical(RATES))
    gain = pyro.sample("gain", dist.Normal(number(0.0), 1.0))
    chain = ReverseChain(BY_LABEL, 2, given={"label": c})
    x = chain.x0(pyro.sample("path", chain))
    pyro.sample("y", dist.Normal(gain + 2 * zeros(x) + 1.5 * (c == 1), 0.7), obs=number(3.5))


def label_law(kernel=BY_LABEL):
    """Return ``p(x0 | label)``, ``(labels, 4)``."""
    chain = ReverseChain(kernel, 2, given={"label": LABELS})
    paths = chain.enumerate_support()
    p = chain.log_prob(paths).exp()
    index = (paths[:, :, -1] * torch.tensor([2, 1])).sum(-1).clamp_max(3)
    return torch.zeros(4, 3, dtype=torch.float64).scatter_add_(0, index, p).T


def label_truth():
    mean = 2 * zeros(PAIRS) + 1.5 * (LABELS == 1)[:, None]
    weight = RATES[:, None] * label_law() * density(mean, 3.5, math.sqrt(1.49))
    return weight.sum(), weight[1].sum() / weight.sum(), lambda s: (s["c"] == 1).double()


def both():
    """Two chains, of two and of four steps, that depend on one label."""
    c = pyro.sample("c", dist.Categorical(RATES))
    first = ReverseChain(REVEALED, 2, given={"label": c})
    second = ReverseChain(BY_LABEL, 2, given={"label": c})
    x = first.x0(pyro.sample("first", first))
    z = second.x0(pyro.sample("second", second))
    pyro.sample("y", dist.Normal(zeros(x) + 2 * zeros(z) + c, 0.7), obs=number(4.5))


def both_truth():
    first, second = zeros(PAIRS)[:, None], 2 * zeros(PAIRS)
    law = label_law(REVEALED)[:, :, None] * label_law()[:, None]
    mean = first + second + LABELS[:, None, None]
    weight = (RATES[:, None, None] * law * density(mean, 4.5, 0.7)).sum((1, 2))
    return weight.sum(), weight[1] / weight.sum(), lambda s: (s["c"] == 1).double()


def plated():
    """Two sequences in a plate, each with its own label."""
    with pyro.plate("each", 2):
        c = pyro.sample("c", dist.Categorical(RATES))
        chain = ReverseChain(REVEALED, 2, given={"label": c})
        x = chain.x0(pyro.sample("path", chain))
    total = (2 * zeros(x) + c).sum(-1, keepdim=True)
    pyro.sample("y", dist.Normal(total, 1.0), obs=number(8.0))


def plated_truth():
    law, value = label_law(REVEALED) * RATES[:, None], 2 * zeros(PAIRS) + LABELS[:, None]
    value, law = value.flatten(), law.flatten()
    weight = law[:, None] * law * density(value[:, None] + value, 8.0, 1.0)
    of_label = weight.sum(1).reshape(3, 4).sum(1)
    mean = of_label[2] / weight.sum()
    return weight.sum(), mean, lambda s: (s["c"][..., 0] == 2).double()


def condition():
    """A chain that depends on a number."""
    c = pyro.sample("c", dist.Normal(number(0.0), 1.0))
    chain = ReverseChain(BY_NUMBER, 3, given={"cond": c})
    x = chain.x0(pyro.sample("path", chain))
    pyro.sample("y", dist.Normal(zeros(x) - c, 0.7), obs=number(2.0))


def condition_truth(held=None):
    grid = torch.linspace(-7, 7, 4001, dtype=torch.float64)
    x = torch.cartesian_prod(*[torch.arange(2)] * 3)
    zero = torch.sigmoid(2 * grid)[:, None, None]
    law = torch.where(x == 0, zero, 1 - zero).prod(-1)
    if held is not None:
        law = law * (x[:, 0] == held)
    prior = dist.Normal(0.0, 1.0).log_prob(grid).exp()[:, None] * (grid[1] - grid[0])
    weight = prior * law * density(zeros(x) - grid[:, None], 2.0, 0.7)
    mean = (weight.sum(1) * grid).sum() / weight.sum()
    return weight.sum(), mean, lambda s: s["c"]


held = clamp(condition, tokens=torch.tensor([1, 0, 0]), mask=torch.tensor([True, False, False]))
PROGRAMS = {
    "label": (label, label_truth),
    "both": (both, both_truth),
    "plated": (plated, plated_truth),
    "condition": (condition, condition_truth),
    "held": (held, lambda: condition_truth(1)),
}


def scores(name, method="smc", num_runs=1500, particles=8, seed=1, **options):
    """Return how far evidence and unnormalised mean are from the truth, and what was done."""
    program, truth = PROGRAMS[name]
    sizes = {"num_particles": particles, "num_runs": num_runs, "store_path": False}
    posterior = SMC(program, method=method, ess_threshold=0.9, **sizes, **options).run(seed=seed)
    z, mean, value = truth()
    estimate = (posterior.log_evidence - z.log()).exp()
    means = posterior.expectation(value)
    found = z_score(estimate, 1.0), z_score(estimate * (means - mean), 0.0)
    return found, posterior.settings["latent_moves"]


@pytest.mark.parametrize("name", PROGRAMS)
def test_moves_along_paths_leave_evidence_and_means_unbiased(name):
    found, done = scores(name)
    assert all(abs(z) < 4 for z in found), found
    assert not done["left"]
    steps = {"plated": [1, 2], "condition": [1, 2, 3], "held": [1, 2, 3]}.get(name, [1, 2, 3, 4])
    assert done["along_paths"]["schedule"] == steps
    assert min(done["along_paths"]["acceptance"]) > 0.05


def test_strided_steering_moves_where_it_looked():
    found, done = scores("condition", "steering", every=2)
    assert all(abs(z) < 4 for z in found), found
    assert done["along_paths"]["schedule"] == [1, 3]


def test_without_a_look_ahead_latents_move_at_the_end():
    found, done = scores("label", num_runs=1000, twist=None)
    assert all(abs(z) < 4 for z in found), found
    assert done["along_paths"]["schedule"] == [4]


def forget_the_path(monkeypatch):
    monkeypatch.setattr(latent_moves.Spot, "level", property(lambda s: s.log_h + s.log_r))


@pytest.mark.parametrize("name", ["both", "plated", "condition"])
def test_a_forgotten_ratio_of_path_laws_is_found_out(name, monkeypatch):
    forget_the_path(monkeypatch)
    found, _ = scores(name, num_runs=800, particles=16)
    assert max(abs(z) for z in found) > 8, found
