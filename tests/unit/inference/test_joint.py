"""Programs of several sequences as one chain: what lies where, and what is refused."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from ppl_diffusion.denoisers import TableDenoiser
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.handlers import Steering, clamp
from ppl_diffusion.inference import SMC
from ppl_diffusion.inference._task import as_task
from ppl_diffusion.kernels import Absorbing, Cosine, OrderedKernel
from ppl_diffusion.potentials import Potential
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
    assert posterior.path.shape == (2, 5, posterior.num_steps + 1, 2)
    assert torch.equal(posterior.path[..., -1, :], posterior.x0)
    assert "'a', 'b' side by side" in posterior.target
    assert "latents level" in posterior.target
    assert ("uniformly random order" in posterior.target) == (kind == "ordered")
    posterior.to_arviz()
    without = SMC(pair, method="steering", num_particles=5, store_path=False).run(a, b, seed=0)
    assert set(without.samples) == {"level", "z"}


def test_one_plain_sequence_is_left_alone():
    chain = toy_chain()
    assert as_task(alone, None, (chain,)).chain is chain


def test_prompts_stay_and_labels_tell_particles_apart():
    a = toy_chain(num_steps=2, prompt=torch.tensor([-1, 2]))
    task = as_task(pair, None, (a, toy_chain(num_steps=2)), max_particles=100)
    assert task.chain.prompt.tolist() == [-1, 2, -1, -1, -1, -1, 0, 0, 0, 0, 0]
    states = task.chain.sample((3, 7))
    started = task.started(states)
    layout = task.potential.layout
    numbers = layout.labels(started[..., -1, :])
    assert numbers.flatten().tolist() == list(range(21))
    assert bool((layout.labels(started[..., 0, :]) == numbers).all())
    assert torch.equal(started[..., : layout.size], states[..., : layout.size])
    again = layout.labels(task.started(states)[..., -1, :])
    assert again.flatten().tolist() == list(range(21, 42))
    assert task.potential(started[..., -1, :]).shape == (3, 7)


def test_more_particles_than_labels_are_refused():
    task = as_task(pair, None, (toy_chain(), toy_chain()), max_particles=9)
    states = task.chain.sample((1, 9))[..., -1, :]
    task.started(states)
    with pytest.raises(ValueError, match=r"18 particles were started, .* labels for 9"):
        task.started(states)


def test_latents_that_were_not_drawn_are_missed():
    task = as_task(pair, None, (toy_chain(), toy_chain()))
    with pytest.raises(CapabilityError, match=r"without the latents \(level\)"):
        task.potential(torch.zeros(1, task.chain.length, dtype=torch.int64))


def test_tokens_of_a_larger_alphabet_are_impossible_and_never_asked_about():
    def narrow(x):
        assert int(x.max()) < 2
        return -x.sum(-1).double()

    def program(a, b):
        pyro.sample("a", a)
        pyro.factor("f", narrow(b.x0(pyro.sample("b", b))))

    potential = as_task(program, None, (toy_chain(), toy_chain(vocab_size=2))).potential
    rows = torch.tensor([[2, 2, 1, 0], [2, 2, 1, 2]])
    assert potential(rows).tolist() == [-1.0, -torch.inf]
    assert bool(torch.isfinite(potential.lookahead(rows)).all())


def test_hints_of_all_sites_are_the_lookahead():
    likes = [Potential(lambda x: (x == 0).sum(-1).double()), Potential(lambda x: -x.sum(-1))]

    def program(a, b):
        pyro.sample("a", a, infer={"steer": Steering(likes[0])})
        with pyro.plate("two", 2):
            pyro.sample("b", b, infer={"steer": likes[1]})

    potential = as_task(program, None, (toy_chain(), toy_chain())).potential
    assert potential.lookahead(torch.tensor([[0, 0, 1, 2, 0, 1]])).tolist() == [-2.0]


def test_a_clamp_is_one_of_the_row():
    held = clamp(several, tokens=torch.tensor([1, 0]), mask=torch.tensor([True, False]))
    potential = as_task(held, None, (toy_chain(), toy_chain(vocab_size=2))).potential
    allowed = torch.tensor([[1, 2, 1, 0], [1, 2, 0, 0], [0, 2, 0, 0]])
    assert (potential(allowed) > -torch.inf).tolist() == [True, False, False]
    without = as_task(several, None, (toy_chain(), toy_chain(vocab_size=2))).potential
    missing = (without.lookahead(allowed) - potential.lookahead(allowed)) / 2
    assert missing.tolist() == [0.0, 1.0, 2.0]


def late(chain):
    x = chain.x0(pyro.sample("a", chain))
    pyro.sample("level", dist.Normal((x == 0).sum(-1).double(), 1.0))


REFUSED = {
    "different time grids": (several, toy_chain(num_steps=3), toy_chain(num_steps=2)),
    "different noise or schedules": (several, toy_chain(), toy_chain("uniform")),
    "different kinds": (several, toy_chain("uniform"), toy_chain("uniform", kind="posterior")),
    "kernels of different kinds": (several, toy_chain(), ordered_chain()),
    "reveals groups or blocks": (several, *[ordered_chain(2, 4, group_size=2)] * 2),
    "the law of the latent 'level' depends on": (late, toy_chain()),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_one_chain_says_so(reason):
    program, *chains = REFUSED[reason]
    with pytest.raises(CapabilityError, match=f"{reason}.*use ppl_diffusion.inference.SMC"):
        as_task(program, None, tuple(chains))


def test_schedules_and_alphabets():
    cosine = toy_chain(Absorbing(3, Cosine()))
    with pytest.raises(CapabilityError, match="different noise or schedules"):
        as_task(several, None, (toy_chain(), cosine))
    task = as_task(several, None, (toy_chain(), toy_markov_chain(vocab_size=5, num_steps=3)))
    assert task.chain.kernel.process.vocab_size == 5
    assert task.chain.length == 7


def test_psi_parameters_of_sites_lie_side_by_side():
    a, b = toy_chain("uniform", kappa=0.9), toy_chain("uniform", kappa=[0.5, 0.7, 1.0])
    kappa = as_task(several, None, (a, b)).chain.kernel.kappa
    assert kappa.shape == (3, 4)
    assert kappa[1].tolist() == [0.9, 0.9, 0.7, 0.7]


def test_a_kernel_cannot_propose_a_row():
    chain = toy_chain()
    with pytest.raises(CapabilityError, match="a kernel moves one sequence"):
        SMC(several, method="importance-sampling", proposal=chain.kernel).run(chain, chain)
