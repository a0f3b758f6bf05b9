"""What programs accept as a target: chains with potentials, and programs with one chain."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from ppl_diffusion.handlers import Steering, clamp
from ppl_diffusion.inference._task import as_task, seeded
from ppl_diffusion.potentials import Constraint, Potential, factor
from ppl_diffusion.smc import FeynmanKac, run_smc
from ppl_diffusion.testing.oracles import ExactChain, z_score
from ppl_diffusion.testing.toys import toy_chain, toy_potential

GOAL = toy_potential(3, 2, scale=1.5)


def design(chain, hint=None):
    path = pyro.sample("path", chain, infer={} if hint is None else {"steer": hint})
    x = pyro.deterministic("x", chain.x0(path), event_dim=1)
    pyro.sample("y", dist.Normal((x == 0).sum(-1).double(), 1.0), obs=torch.tensor(1.0))
    factor("goal", GOAL, x)


def log_potential(x0):
    return GOAL(x0) + dist.Normal((x0 == 0).sum(-1).double(), 1.0).log_prob(torch.tensor(1.0))


def all_x0():
    return torch.cartesian_prod(torch.arange(3), torch.arange(3))


def test_a_bare_chain_keeps_its_potential():
    task = as_task(toy_chain(), GOAL)
    assert task.potential is GOAL
    assert task.name == "toy"
    assert not task.is_program
    x0 = torch.zeros(1, 2, 2, dtype=torch.int64)
    assert task.samples(x0) == {"x0": x0}
    assert "log G = toy" in task.target


def test_a_function_becomes_a_potential():
    def likes_zero(x0):
        return (x0 == 0).sum(-1)

    assert isinstance(as_task(toy_chain(), likes_zero).potential, Potential)
    assert as_task(toy_chain(), likes_zero).name == "likes_zero"


def test_a_program_is_the_density_of_everything_else():
    task = as_task(design, None, (toy_chain(),))
    assert task.is_program
    assert task.name == "the program design"
    torch.testing.assert_close(task.potential(all_x0()), log_potential(all_x0()))
    grid = all_x0().expand(4, 9, 2)
    assert task.potential(grid).shape == (4, 9)


def test_the_evidence_of_a_program_by_its_task():
    chain = toy_chain()
    task = as_task(design, None, (chain,))
    posterior = run_smc(FeynmanKac(task.chain, task.potential), 16, 400)
    z = z_score(posterior.log_evidence.exp(), ExactChain.of(chain).evidence(log_potential))
    assert abs(z) < 4  # false alarm 6e-5


def test_sites_of_a_program():
    task = as_task(design, None, (toy_chain(num_steps=3),))
    x0 = torch.randint(3, (2, 5, 2))
    without = task.samples(x0)
    assert set(without) == {"x"}
    path = x0[..., None, :].expand(2, 5, 4, 2)
    assert torch.equal(task.samples(x0, path)["path"], path)
    assert torch.equal(without["x"], x0)


def test_a_clamp_is_a_hard_constraint_with_a_graded_lookahead():
    held = clamp(design, tokens=torch.tensor([1, 2]), mask=torch.tensor([True, False]))
    potential = as_task(held, None, (toy_chain(),)).potential
    x0 = all_x0()
    allowed = x0[:, 0] == 1
    torch.testing.assert_close(potential(x0)[allowed], log_potential(x0)[allowed])
    assert bool((potential(x0)[~allowed] == -torch.inf).all())
    penalty = potential.lookahead(x0) - log_potential(x0)
    torch.testing.assert_close(penalty, torch.where(allowed, 0.0, -2.0).double())


def test_a_steering_hint_is_the_lookahead():
    guide = Constraint(lambda x0: (x0[..., 0] != 0).double(), penalty=3.0)
    for hint in (guide, Steering(guide)):
        potential = as_task(design, None, (toy_chain(), hint)).potential
        torch.testing.assert_close(potential.lookahead(all_x0()), guide.lookahead(all_x0()))
        torch.testing.assert_close(potential(all_x0()), log_potential(all_x0()))


def test_what_cannot_be_read_says_so():
    chain = toy_chain()

    with pytest.raises(TypeError, match="a bare chain needs a potential"):
        as_task(chain, None)
    with pytest.raises(TypeError, match="takes no arguments"):
        as_task(chain, GOAL, (1,))
    with pytest.raises(ValueError, match="a program is its own potential"):
        as_task(design, GOAL, (chain,))
    with pytest.raises(TypeError, match="must be a ReverseChain or a Pyro program, got int"):
        as_task(3, None)


def test_a_seed_leaves_the_global_state_alone():
    before = torch.get_rng_state()
    with seeded(3):
        first = torch.rand(2)
    assert torch.equal(before, torch.get_rng_state())
    with seeded(3):
        assert torch.equal(first, torch.rand(2))
