"""What weighs particles: potentials of bare chains, and all that a program scores."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.handlers import Steering, clamp
from ppl_diffusion.inference import SMC
from ppl_diffusion.inference.smc import seeded
from ppl_diffusion.kernels import Absorbing, OrderedKernel
from ppl_diffusion.potentials import Constraint, Potential, factor
from ppl_diffusion.programs import Program
from ppl_diffusion.programs.sources import ChainSource, ProgramSource
from ppl_diffusion.testing.conditional import LabelledTables, TiltedSites
from ppl_diffusion.testing.oracles import ExactChain, z_score
from ppl_diffusion.testing.toys import random_joint, toy_chain, toy_potential

GOAL = toy_potential(3, 2, scale=1.5)
TABLES = [random_joint(3, 2, seed=seed, sharpness=2.0) for seed in (1, 2, 3)]
LABELLED = OrderedKernel(Absorbing(3), LabelledTables(TABLES, Absorbing(3)), length=2)
TILTED = OrderedKernel(Absorbing(2), TiltedSites(Absorbing(2)), length=2)


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


def labelled(label):
    chain = ReverseChain(LABELLED, 2, given={"label": torch.tensor(label)})
    factor("goal", GOAL, chain.x0(pyro.sample("path", chain)))


@pytest.mark.parametrize(
    "options", [{"method": "tempering"}, {"method": "twisted", "twist": "exhaustive"}]
)
def test_a_label_that_nothing_draws_need_not_travel_with_the_particles(options):
    posterior = SMC(labelled, num_particles=16, num_runs=200, **options).run(1, seed=0)
    evidence = float((TABLES[1].flatten() * GOAL(all_x0()).exp()).sum())
    assert abs(z_score(posterior.log_evidence.exp(), evidence)) < 4  # false alarm 6e-5


def hinted_later(chain, hint):
    x = chain.x0(pyro.sample("first", chain))
    second = ReverseChain(LABELLED, 2, given={"label": x[..., 0]})
    z = second.x0(pyro.sample("second", second, infer={} if hint is None else {"steer": hint}))
    factor("goal", GOAL, z)


@pytest.mark.parametrize("hint", [None, Steering(GOAL)])
@pytest.mark.parametrize("method", ["smc", "twisted", "soft-value"])
def test_a_chain_that_waits_for_another_is_looked_ahead_when_it_begins(method, hint):
    chain = toy_chain("uniform", num_steps=3)
    size = {"num_particles": 8, "num_runs": 200, "ess_threshold": 0.9}
    posterior = SMC(hinted_later, method=method, **size).run(chain, hint, seed=1)
    each = torch.stack([(table.flatten() * GOAL(all_x0()).exp()).sum() for table in TABLES])
    evidence = float((ExactChain.of(chain).x0_law() * each[all_x0()[:, 0]]).sum())
    assert abs(z_score(posterior.log_evidence.exp(), evidence)) < 4  # false alarm 6e-5


def computed():
    z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
    # Networks round so: their sums run in another order on another number of rows.
    chain = ReverseChain(TILTED, 2, given={"cond": z + 1e-9 * z.numel()})
    factor("zeros", Potential(lambda x: (x == 0).sum(-1)), chain.x0(pyro.sample("path", chain)))


def test_a_condition_may_round_otherwise_on_another_number_of_rows():
    posterior = SMC(computed, num_particles=50, ess_threshold=2.0).run(seed=0)
    assert len(posterior.samples["z"].unique()) < 50  # so that fewer rows are asked about
    assert posterior.exact


def test_a_clamp_follows_guesses_to_their_device():
    held = clamp(design, tokens=torch.tensor([1, 2]), mask=torch.tensor([True, False]))
    guesses = {"path": torch.zeros(1, 4, 1, 2, dtype=torch.int64, device="meta")}
    for holding in ([], ["path"]):
        held_there, _ = source_of(held, toy_chain(), holding=holding)._held(guesses)
        assert held_there["path"].is_meta


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
