"""What weighs particles: potentials of bare chains, and all that a program scores."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from ppl_diffusion.handlers import Steering, clamp
from ppl_diffusion.inference import SMC
from ppl_diffusion.inference.smc import seeded
from ppl_diffusion.potentials import Constraint, Potential, factor
from ppl_diffusion.programs import Program
from ppl_diffusion.programs.sources import ChainSource, ProgramSource
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


def source_of(program, *args, holding=()):
    return ProgramSource(Program(program, args), set(holding))


def asked(source, x0, *, last):
    """The potential of sequences ``(B, L)``, or what guesses promise."""
    state = {"latents": {}, "log_r": torch.zeros(1, len(x0), dtype=torch.float64)}
    (site,) = source.chains
    return source.look({site.name: x0[None, :, None]}, state, last=last)[0, :, 0]


def potential(source, x0):
    return asked(source, x0, last=True)


def lookahead(source, x0):
    return asked(source, x0, last=False)


def test_a_bare_chain_keeps_its_potential():
    source = ChainSource(toy_chain(), GOAL)
    assert source.given is GOAL
    assert [tilt.of for tilt in source.law.tilts] == ["toy"]
    assert not source.is_program
    x0 = torch.zeros(1, 2, 2, dtype=torch.int64)
    log_g, values = source.final({"sites": {"x": {"tokens": x0}}})
    assert values == {"x0": x0}
    assert torch.equal(log_g, GOAL(x0))
    assert "log G = toy" in str(source.law)


def test_a_function_becomes_a_potential():
    def likes_zero(x0):
        return (x0 == 0).sum(-1)

    source = ChainSource(toy_chain(), likes_zero)
    assert isinstance(source.given, Potential)
    assert [tilt.of for tilt in source.law.tilts] == ["likes_zero"]


def test_a_program_is_the_density_of_everything_else():
    source = source_of(design, toy_chain())
    assert source.is_program
    assert [tilt.of for tilt in source.law.tilts] == ["the program design"]
    torch.testing.assert_close(potential(source, all_x0()), log_potential(all_x0()))
    grid = all_x0().expand(4, 9, 2)
    state = {
        "sites": {"path": {"tokens": grid}},
        "latents": {},
        "log_r": torch.zeros(4, 9).double(),
    }
    torch.testing.assert_close(source.final(state)[0], log_potential(grid))


def test_the_evidence_of_a_program():
    chain = toy_chain()
    posterior = SMC(design, num_particles=16, num_runs=400).run(chain, seed=0)
    z = z_score(posterior.log_evidence.exp(), ExactChain.of(chain).evidence(log_potential))
    assert abs(z) < 4  # false alarm 6e-5


def test_sites_of_a_program():
    chain, size = toy_chain(num_steps=3), {"num_particles": 5, "num_runs": 2}
    without = SMC(design, store_path=False, **size).run(chain, seed=0)
    assert set(without.samples) == {"x"}
    assert torch.equal(without.samples["x"], without.x0)
    posterior = SMC(design, **size).run(chain, seed=0)
    assert set(posterior.samples) == {"x", "path"}
    assert torch.equal(posterior.samples["path"], posterior.path)
    x0 = torch.randint(3, (2, 5, 2))
    state = {"sites": {"path": {"tokens": x0}}, "latents": {}, "log_r": torch.zeros(2, 5).double()}
    values = source_of(design, chain).final(state)[1]
    assert set(values) == {"x"}
    assert torch.equal(values["x"], x0)


def test_a_clamp_is_a_hard_constraint_with_a_graded_lookahead():
    held = clamp(design, tokens=torch.tensor([1, 2]), mask=torch.tensor([True, False]))
    source, x0 = source_of(held, toy_chain()), all_x0()
    allowed = x0[:, 0] == 1
    torch.testing.assert_close(potential(source, x0)[allowed], log_potential(x0)[allowed])
    assert bool((potential(source, x0)[~allowed] == -torch.inf).all())
    penalty = lookahead(source, x0) - log_potential(x0)
    torch.testing.assert_close(penalty, torch.where(allowed, 0.0, -2.0).double())
    within = torch.stack([torch.ones(9, dtype=torch.int64), x0[:, 1]], -1)
    holding = source_of(held, toy_chain(), holding=["path"])
    torch.testing.assert_close(lookahead(holding, x0), log_potential(within))


def test_a_steering_hint_is_the_lookahead():
    guide = Constraint(lambda x0: (x0[..., 0] != 0).double(), penalty=3.0)
    for hint in (guide, Steering(guide)):
        source = source_of(design, toy_chain(), hint)
        torch.testing.assert_close(lookahead(source, all_x0()), guide.lookahead(all_x0()))
        torch.testing.assert_close(potential(source, all_x0()), log_potential(all_x0()))


def test_what_cannot_be_read_says_so():
    chain = toy_chain()

    with pytest.raises(TypeError, match="a bare chain needs a potential"):
        SMC(chain)
    with pytest.raises(TypeError, match="takes no arguments"):
        SMC(chain, GOAL).run(1)
    with pytest.raises(ValueError, match="a program is its own potential"):
        SMC(design, GOAL)
    with pytest.raises(TypeError, match="must be a ReverseChain or a Pyro program, got int"):
        SMC(3)


def test_a_seed_leaves_the_global_state_alone():
    before = torch.get_rng_state()
    with seeded(3):
        first = torch.rand(2)
    assert torch.equal(before, torch.get_rng_state())
    with seeded(3):
        assert torch.equal(first, torch.rand(2))
