"""Every program on every Pyro program: several chains, plates, other latents, by enumeration.

All comparisons are 4 standard errors: false alarm 6e-5 each (two-sided).
"""

from functools import cache, partial

import pyro
import pyro.distributions as dist
import pytest
import torch

from ppl_diffusion.denoisers import TableDenoiser
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.handlers import clamp
from ppl_diffusion.inference import SMC, ParticleGibbs
from ppl_diffusion.kernels import Absorbing, OrderedKernel
from ppl_diffusion.potentials import factor
from ppl_diffusion.programs.bound import Bound
from ppl_diffusion.testing.oracles import ExactChain, z_score
from ppl_diffusion.testing.toys import random_joint, toy_chain, toy_potential

LEVELS = torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64)
RATES = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
Y = torch.tensor(3.0, dtype=torch.float64)
PAIR = toy_potential(3, 2, scale=1.5)


def ordered_chain(vocab_size, length, seed):
    process = Absorbing(vocab_size)
    denoiser = TableDenoiser(random_joint(vocab_size, length, seed=seed), process)
    return ReverseChain(OrderedKernel(process, denoiser, length=length), length)


A, B = ordered_chain(3, 2, 0), ordered_chain(2, 2, 5)
PLATED = toy_chain("uniform", num_steps=3, seed=2)
MASKED = toy_chain(num_steps=3, seed=3)


def zeros(x):
    return (x == 0).sum(-1).double()


# The three programs, each with its weighted table: probability, density, and what is averaged.


def coupled():
    """Two sites with different alphabets, which a factor brings together."""
    x = pyro.deterministic("x", A.x0(pyro.sample("a", A)), event_dim=1)
    z = pyro.deterministic("z", B.x0(pyro.sample("b", B)), event_dim=1)
    pyro.factor("meet", -1.5 * (zeros(x) - zeros(z) - 1).square())


def plated():
    """A chain in a plate, with a factor of each element and one of both."""
    with pyro.plate("element", 2):
        x = PLATED.x0(pyro.sample("path", PLATED))
        factor("each", PAIR, x)
    x = pyro.deterministic("x", x, event_dim=2)
    same = (x[..., :1, :] == x[..., 1:, :]).all(-1)  # keeps a dimension in place of the plate
    pyro.factor("same", 1.5 * same.double())


def assay(error=0.7):
    """A categorical latent in front of an observation of the sequence."""
    level = LEVELS[pyro.sample("level", dist.Categorical(RATES))]
    x = pyro.deterministic("x", MASKED.x0(pyro.sample("path", MASKED)), event_dim=1)
    pyro.sample("y", dist.Normal(level + zeros(x), error), obs=Y)


def every(*sizes):
    return torch.cartesian_prod(*[torch.arange(size) for size in sizes])


def chain_law(chain):
    return ExactChain.of(chain).x0_law()


@cache
def coupled_table(lockstep):
    x, z = every(3, 3), every(2, 2)
    law = A.kernel.denoiser.joint.reshape(-1, 1) * B.kernel.denoiser.joint.reshape(1, -1)
    density = -1.5 * (zeros(x)[:, None] - zeros(z) - 1).square()
    return law, density.exp(), zeros(x)[:, None].expand(law.shape)


@cache
def plated_table(lockstep):
    x, law = every(3, 3), chain_law(PLATED)
    each = law * PAIR(x).exp()
    same = torch.eye(len(x), dtype=torch.float64)
    pairs = zeros(x)[:, None] + zeros(x)
    return each[:, None] * each, (1.5 * same).exp(), pairs


@cache
def assay_table(lockstep, error=0.7):
    x = every(3, 3)
    law = MASKED.kernel.denoiser.joint.flatten() if lockstep else chain_law(MASKED)
    density = dist.Normal(LEVELS + zeros(x)[:, None], error).log_prob(Y)
    return law[:, None] * RATES, density.exp(), LEVELS.expand(len(x), 3) * zeros(x)[:, None]


PROGRAMS = {
    "coupled": (coupled, coupled_table, lambda s: zeros(s["x"])),
    "plated": (plated, plated_table, lambda s: zeros(s["x"]).sum(-1)),
    "assay": (assay, assay_table, lambda s: LEVELS[s["level"]] * zeros(s["x"])),
}
SIZE = {"num_particles": 8, "num_runs": 160}
METHODS = {
    "importance": partial(SMC, method="importance-sampling", **SIZE),
    "lineages": partial(SMC, method="guided-lineages", **SIZE),
    "steering": partial(SMC, method="steering", ess_threshold=0.9, **SIZE),
    "steering-max": partial(SMC, method="steering", kind="max", twist="persistent", **SIZE),
    "soft-value": partial(SMC, method="soft-value", num_children=3, **SIZE),
    "twisted": partial(SMC, method="twisted", ess_threshold=0.9, **SIZE),
    "reweighted": partial(SMC, method="twisted", proposal="reweighted", **SIZE),
    "corrector": partial(SMC, method="corrector", **SIZE),
    "corrector-twist": partial(SMC, method="corrector", twist="persistent", **SIZE),
    "tempering": partial(SMC, method="tempering", **SIZE),
    "smc": partial(SMC, **SIZE),
}
UNWEIGHTED = {
    "best": partial(SMC, method="best-of-n", num_particles=16, num_runs=4),
    "beam": partial(SMC, method="beam", num_particles=16, num_runs=4),
    "published": partial(SMC, method="soft-value", num_particles=16, weighted=False),
}


def scores(posterior, name, *args, lockstep=False):
    """Return z-scores of the evidence, and of the evidence times an expectation (both unbiased)."""
    _, table, value = PROGRAMS[name]
    law, density, values = table(lockstep, *args)
    estimate = posterior.log_evidence.exp()
    mean = posterior.expectation(value)
    mean = torch.where(posterior.alive, mean, 0.0)
    evidence = float((law * density).sum())
    return (
        z_score(estimate, evidence),
        z_score(estimate * mean, float((law * density * values).sum())),
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", PROGRAMS)
def test_evidence_and_expectations(name, method):
    posterior = METHODS[method](PROGRAMS[name][0]).run(seed=1)
    z = scores(posterior, name, lockstep=method.startswith("corrector"))
    assert max(map(abs, z)) < 4
    assert posterior.exact
    assert posterior.is_program
    assert name in posterior.target
    assert posterior.num_evaluations > 0
    assert posterior.num_potential_calls > 0
    assert posterior.ess.shape == (160, posterior.num_steps)
    assert posterior.ancestors.shape == (posterior.num_steps, 160, 8)
    assert posterior.x0.shape[:2] == (160, 8)


@pytest.mark.parametrize("name", PROGRAMS)
def test_methods_without_a_law_run_and_say_so(name):
    for make in UNWEIGHTED.values():
        posterior = make(PROGRAMS[name][0]).run(seed=2)
        assert not posterior.exact
        assert "log_evidence" in posterior.target
        best = posterior.log_potential.max(-1).values
        assert bool((best > -torch.inf).all())


@pytest.mark.parametrize("name", ["coupled", "plated"])
def test_particle_gibbs_over_all_sequences(name):
    program, table, value = PROGRAMS[name]
    gibbs = ParticleGibbs(program, num_particles=8, num_runs=150, num_samples=2, num_warmup=4)
    posterior = gibbs.run(seed=4)
    law, density, values = table(False)
    mean = float((law * density * values).sum() / (law * density).sum())
    assert abs(z_score(value(posterior.samples).mean(1), mean)) < 4  # chains are independent


def test_a_latent_left_behind_by_its_particle_is_found_out(monkeypatch):
    gather = Bound.gather

    def latents_stay(state, ancestors):
        return {**gather(state, ancestors), "latents": state["latents"]}

    monkeypatch.setattr(Bound, "gather", staticmethod(latents_stay))
    many = SMC(
        assay, method="steering", num_particles=32, num_runs=800, ess_threshold=2.0, moves=None
    )
    assert max(map(abs, scores(many.run(0.3, seed=1), "assay", 0.3))) > 6


def test_a_latent_whose_law_is_counted_twice_is_found_out(monkeypatch):
    start = Bound.start
    free = {"log_r": torch.zeros(SIZE["num_runs"], SIZE["num_particles"]).double()}
    monkeypatch.setattr(Bound, "start", lambda self, *args: {**start(self, *args), **free})
    z = scores(SMC(assay, method="steering", moves=None, **SIZE).run(seed=1), "assay")
    assert max(map(abs, z)) > 6


def test_a_clamp_is_held_in_every_element_of_a_plate():
    held = clamp(plated, tokens=torch.tensor([1, 0]), mask=torch.tensor([True, False]))
    law, density, _ = plated_table(False)
    one = (every(3, 3)[:, 0] == 1).double()
    evidence = float((law * density * one[:, None] * one).sum())
    for method in ("steering", "soft-value", "importance", "twisted", "corrector"):
        posterior = METHODS[method](held).run(seed=3)
        assert abs(z_score(posterior.log_evidence.exp(), evidence)) < 4
        alive = posterior.log_weights > -torch.inf
        assert bool((posterior.samples["x"][..., 0][alive] == 1).all())
        # Those that move by the chain hold the tokens; the others find out at the end.
        assert bool(alive.all()) == (method in ("steering", "soft-value", "importance"))


@pytest.mark.parametrize("process", ["absorbing", "uniform", "ordered"])
@pytest.mark.parametrize("method", ["importance", "steering", "steering-max", "soft-value"])
def test_methods_that_move_by_the_chain_hold_a_clamp(process, method):
    """The conditioned evidence and every particle within the clamp; 4 s.e., 6e-5 a case."""
    chain = A if process == "ordered" else toy_chain(process, num_steps=3, seed=4)

    def program():
        factor("pair", PAIR, chain.x0(pyro.sample("path", chain)))

    ordered = process == "ordered"
    law = chain.kernel.denoiser.joint.flatten() if ordered else chain_law(chain)
    sequences = every(3, 3)
    evidence = float((law * PAIR(sequences).exp() * (sequences[:, 1] == 2)).sum())
    held = clamp(program, tokens=torch.tensor([0, 2]), mask=torch.tensor([False, True]))
    posterior = METHODS[method](held).run(seed=6)
    assert abs(z_score(posterior.log_evidence.exp(), evidence)) < 4
    assert bool((posterior.x0[..., 1] == 2).all())


@pytest.mark.parametrize("process", ["absorbing", "uniform", "ordered"])
@pytest.mark.parametrize("method", METHODS)
def test_bare_chains_with_plates(process, method):
    alone = A if process == "ordered" else toy_chain(process, num_steps=3, seed=4)
    make = METHODS[method]
    law = chain_law(alone) if process == "uniform" else None
    if law is None:
        lockstep = process == "ordered" or method.startswith("corrector")
        law = alone.kernel.denoiser.joint.flatten() if lockstep else chain_law(alone)
    posterior = make(alone.expand([2]), PAIR).run(seed=5)
    assert posterior.x0.shape == (160, 8, 2, 2)
    one = float((law * PAIR(every(3, 3)).exp()).sum())
    assert abs(z_score(posterior.log_evidence.exp(), one**2)) < 4
