"""Programs of several chains: what particles hold, how they move, and what is refused."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from ppl_diffusion.denoisers import TableDenoiser
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.handlers import Steering, clamp
from ppl_diffusion.inference import SMC
from ppl_diffusion.kernels import Absorbing, Cosine, OrderedKernel
from ppl_diffusion.potentials import Potential
from ppl_diffusion.programs import Program
from ppl_diffusion.programs.schedule import Item
from ppl_diffusion.programs.sources import ProgramSource
from ppl_diffusion.testing.oracles import z_score
from ppl_diffusion.testing.toys import random_joint, toy_chain, toy_markov_chain


def ordered_chain(vocab_size=3, length=2, seed=0, **options):
    process = Absorbing(vocab_size)
    denoiser = TableDenoiser(random_joint(vocab_size, length, seed=seed), process)
    return ReverseChain(OrderedKernel(process, denoiser, length=length, **options), length)


def pair(a, b):
    """One site, and one in a plate of two, and a latent."""
    level = pyro.sample("level", dist.Normal(torch.zeros(()).double(), 1.0))
    x = a.x0(pyro.sample("a", a))
    with pyro.plate("two", 2):
        z = pyro.deterministic("z", b.x0(pyro.sample("b", b)), event_dim=1)
        pyro.sample("y", dist.Normal(level + (z == 0).sum(-1), 1.0), obs=torch.zeros(2).double())
    pyro.factor("f", (x == 0).sum(-1).double())


def alone(chain):
    pyro.factor("f", -chain.x0(pyro.sample("a", chain)).sum(-1).double())


def several(*chains):
    for i, chain in enumerate(chains):
        pyro.factor(f"f{i}", -chain.x0(pyro.sample(f"c{i}", chain)).sum(-1).double())


@pytest.mark.parametrize("kind", ["grid", "ordered"])
def test_every_site_has_its_own_values_and_a_path_of_its_own_chain(kind):
    if kind == "grid":
        a, b = toy_chain(num_steps=4), toy_chain(num_steps=4, vocab_size=2, length=3)
    else:
        a, b = ordered_chain(), ordered_chain(2, 3)
    program = SMC(pair, method="steering", num_particles=5, num_runs=2)
    posterior = program.run(a, b, seed=0)
    samples = posterior.samples
    shapes = {name: tuple(value.shape[2:]) for name, value in samples.items()}
    steps = b.num_steps + 1
    assert shapes == {"level": (), "a": (a.num_steps + 1, 2), "b": (2, steps, 3), "z": (2, 3)}
    assert torch.equal(samples["b"][..., -1, :], samples["z"])
    assert torch.equal(samples["a"][..., -1, :], posterior.x0)
    for site, chain in (("a", a), ("b", b)):
        assert bool(torch.isfinite(chain.log_prob(samples[site])).all())
    assert posterior.num_steps == max(a.num_steps, b.num_steps)
    assert posterior.path.shape == (2, 5, a.num_steps + 1, 2)
    assert torch.equal(posterior.path[..., -1, :], posterior.x0)
    named = f"'a' ({a.num_steps} steps), 'b' ({b.num_steps} steps)"
    assert named in posterior.target
    assert "latents level" in posterior.target
    posterior.to_arviz()
    without = SMC(pair, method="steering", num_particles=5, store_path=False).run(a, b, seed=0)
    assert set(without.samples) == {"level", "z"}


def test_prompts_stay_and_every_particle_has_its_own_latents():
    a = toy_chain(num_steps=2, prompt=torch.tensor([-1, 2]))
    run = SMC(pair, num_particles=7, num_runs=3).bind((a, toy_chain(num_steps=2)), {})
    state = run.start(None)
    tokens = state["sites"]["a"]["tokens"]
    assert tokens.shape == (3, 7, 2)
    assert bool((tokens[..., 1] == 2).all())
    level = state["latents"]["level"]
    assert level.shape == (3, 7)
    assert len(level.unique()) == 21
    torch.testing.assert_close(state["log_r"], dist.Normal(0.0, 1.0).log_prob(level))
    ancestors = torch.tensor([[0, 0, 1, 2, 3, 6, 6]]).expand(3, -1)
    moved = run.gather(state, ancestors)
    for name in ("latents", "sites"):
        before, after = state[name], moved[name]
        assert before.keys() == after.keys()
    assert torch.equal(moved["latents"]["level"], level.gather(1, ancestors))
    assert torch.equal(moved["log_r"], state["log_r"].gather(1, ancestors))
    assert not torch.equal(run.start(None)["latents"]["level"], level)


def source_of(program, *chains):
    return ProgramSource(Program(program, chains), set())


def state_of(source, rows):
    """Finished states of two sites of two positions, from rows ``(B, 4)``."""
    names = [site.name for site in source.chains]
    tokens = dict(zip(names, rows[None].split(2, -1), strict=True))
    sites = {name: {"tokens": own} for name, own in tokens.items()}
    return {"sites": sites, "latents": {}, "log_r": torch.zeros(1, len(rows)).double()}


def potential(source, rows):
    return source.final(state_of(source, rows))[0][0]


def lookahead(source, rows):
    sites = state_of(source, rows)["sites"]
    fills = {name: own["tokens"][:, :, None] for name, own in sites.items()}
    return source.look(fills, state_of(source, rows))[0, :, 0]


def test_sites_are_asked_about_tokens_of_their_own_alphabet():
    def narrow(x):
        assert int(x.max()) < 2
        return -x.sum(-1).double()

    def program(a, b):
        pyro.sample("a", a)
        pyro.factor("f", narrow(b.x0(pyro.sample("b", b))))

    chains = toy_chain(), toy_chain(vocab_size=2)
    source = source_of(program, *chains)
    assert potential(source, torch.tensor([[2, 2, 1, 0]])).tolist() == [-1.0]
    assert lookahead(source, torch.tensor([[2, 2, 1, 0]])).tolist() == [-1.0]
    for method in ("smc", "steering", "twisted", "soft-value", "tempering"):
        posterior = SMC(program, method=method, num_particles=8).run(*chains, seed=0)
        assert bool(posterior.log_evidence.isfinite().all())


def test_hints_of_all_sites_are_the_lookahead():
    likes = [Potential(lambda x: (x == 0).sum(-1).double()), Potential(lambda x: -x.sum(-1))]

    def program(a, b):
        pyro.sample("a", a, infer={"steer": Steering(likes[0])})
        with pyro.plate("two", 2):
            pyro.sample("b", b, infer={"steer": likes[1]})

    source = source_of(program, toy_chain(), toy_chain())
    fills = {"a": torch.tensor([0, 0]), "b": torch.tensor([[1, 2], [0, 1]])}
    fills = {name: own[None, None, None] for name, own in fills.items()}
    assert source.look(fills, {"latents": {}}).tolist() == [[[-2.0]]]


def test_a_clamp_is_one_of_every_site():
    held = clamp(several, tokens=torch.tensor([1, 0]), mask=torch.tensor([True, False]))
    chains = toy_chain(), toy_chain(vocab_size=2)
    source, without = source_of(held, *chains), source_of(several, *chains)
    allowed = torch.tensor([[1, 2, 1, 0], [1, 2, 0, 0], [0, 2, 0, 0]])
    assert (potential(source, allowed) > -torch.inf).tolist() == [True, False, False]
    missing = (lookahead(without, allowed) - lookahead(source, allowed)) / 2
    assert missing.tolist() == [0.0, 1.0, 2.0]


def late(chain):
    x = chain.x0(pyro.sample("a", chain))
    pyro.sample("level", dist.Normal((x == 0).sum(-1).double(), 1.0))


UNLIKE = {
    "time grids": (toy_chain(num_steps=3), toy_chain(num_steps=2)),
    "noise": (toy_chain(), toy_chain("uniform")),
    "schedules": (toy_chain(), toy_chain(Absorbing(3, Cosine()))),
    "kinds": (toy_chain("uniform"), toy_chain("uniform", kind="posterior")),
    "kernels": (toy_chain(), ordered_chain()),
    "groups": (ordered_chain(2, 4, group_size=2), ordered_chain(2, 4, group_size=2)),
    "alphabets": (toy_chain(), toy_markov_chain(vocab_size=5, length=3, num_steps=3)),
    "psi": (toy_chain("uniform", kappa=0.9), toy_chain("uniform", kappa=[0.5, 0.7, 1.0])),
}
METHODS = ["smc", "steering", "twisted", "soft-value", "tempering", "importance-sampling"]


def mean_potential(chain):
    """``E exp(-sum of tokens)``, by following the chain's law from state to state."""
    kernel, size = chain.kernel, chain.kernel.process.vocab_size
    states = torch.cartesian_prod(*[torch.arange(kernel.process.num_states)] * chain.length)
    law = kernel.prior_log_prob(states, chain.prompt).exp()
    for k in range(kernel.num_steps):
        step = kernel.step({"tokens": states[:, None]}, k, fixed=chain.fixed)
        law = law @ step.log_prob(states).exp()
    clean = (states < size).all(-1)
    return float((law * (-states.sum(-1).double()).exp())[clean].sum())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", UNLIKE)
def test_unlike_chains_move_side_by_side(name, method):
    """By enumeration, four standard errors: 6e-5 a case."""
    chains = UNLIKE[name]
    evidence = mean_potential(chains[0]) * mean_potential(chains[1])
    posterior = SMC(several, method=method, num_particles=8, num_runs=200).run(*chains, seed=1)
    assert abs(z_score(posterior.log_evidence.exp(), evidence)) < 4
    assert posterior.exact


@pytest.mark.parametrize("method", METHODS)
def test_a_latent_after_the_sequence_weighs_nothing_by_itself(method):
    chain = toy_chain()
    posterior = SMC(late, method=method, num_particles=8, num_runs=5).run(chain, seed=1)
    torch.testing.assert_close(posterior.log_evidence, torch.zeros(5).double())
    shift = posterior.samples["level"] - (posterior.x0 == 0).sum(-1)
    assert abs(z_score(shift.flatten(), 0.0)) < 4


def backwards(steps, generator=None):
    return [(Item(site, k),) for site, n in steps.items() for k in reversed(range(n))]


def hurried(steps, generator=None):
    return [tuple(Item(site, k) for k in range(n)) for site, n in steps.items()]


@pytest.mark.parametrize("schedule", ["lockstep", "sequential", "interleaved"])
@pytest.mark.parametrize("method", METHODS[:4])
def test_the_order_of_moves_is_no_part_of_the_target(schedule, method):
    chains = UNLIKE["noise"]
    evidence = mean_potential(chains[0]) * mean_potential(chains[1])
    options = {"method": method, "schedule": schedule, "num_particles": 8, "num_runs": 200}
    posterior = SMC(several, **options).run(*chains, seed=2)
    assert abs(z_score(posterior.log_evidence.exp(), evidence)) < 4  # false alarm 6e-5
    steps = sum(chain.num_steps for chain in chains)
    assert posterior.num_steps == (steps // 2 if schedule == "lockstep" else steps)
    for name, chain in zip(("c0", "c1"), chains, strict=True):
        assert bool(torch.isfinite(chain.log_prob(posterior.samples[name])).all())


def test_schedules_that_skip_or_hurry_or_turn_back_are_refused():
    with pytest.raises(ValueError, match="unknown schedule 'zigzag'; choose one of lockstep"):
        SMC(several, schedule="zigzag")
    chains = toy_chain(), toy_chain()
    for wrong in (backwards, hurried, lambda steps, generator=None: []):
        with pytest.raises(ValueError, match="must be made once, in its own order"):
            SMC(several, schedule=wrong).run(*chains)


def test_a_kernel_cannot_propose_for_several_chains():
    chain = toy_chain()
    with pytest.raises(CapabilityError, match="a proposal moves one chain, and there are several"):
        SMC(several, method="importance-sampling", proposal=chain.kernel).run(chain, chain)
