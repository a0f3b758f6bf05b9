"""Particles over tokens and a latent together, held to enumeration (4 standard errors: 6e-5 each).

Two noisy copies of a bit and their code, on paths that draw them at once and in turns: what is
conditioned is the law of the *path*, which knows less of the dependence than the data.
"""

import itertools

import pyro
import pytest
import torch

from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.handlers import clamp
from ppl_diffusion.inference import SMC
from ppl_diffusion.kernels import Absorbing, LatentKernel, Path
from ppl_diffusion.potentials import Potential, factor
from ppl_diffusion.processes.gaussian import Gaussian
from ppl_diffusion.programs import Bound
from ppl_diffusion.smc.feynman_kac import take_particles
from ppl_diffusion.testing.latent_laws import LatentLaw
from ppl_diffusion.testing.latent_quadrature import ScalarLatent, ancestral
from ppl_diffusion.testing.latent_toys import corr_bits, random_latents

BINARY = Absorbing(2)
PATHS = {"joint": Path.joint(4), "short": Path.joint(2), "seq": Path.sequential(1, 2)}
METHODS = {
    "twisted": {},
    "guided-lineages": {},
    "smc": {"twist": "persistent", "ess_threshold": 2.0},  # resamples at every step
    "soft-value": {},
    "steering": {"twist": "persistent", "ess_threshold": 2.0},
    "importance-sampling": {},
}
SIZE = {"num_particles": 16, "num_runs": 300}


def chain_of(problem, path):
    codes = Absorbing(problem.latent.shape[-1])
    kernel = LatentKernel(Absorbing(problem.vocab_size), codes, problem.denoiser(), path)
    return ReverseChain(kernel, problem.length)


def program_of(chain, potential=None):
    def program():
        path = pyro.sample("path", chain)
        x = pyro.deterministic("x", chain.x0(path), event_dim=1)
        pyro.deterministic("code", chain.latent(path), event_dim=1)
        if potential is not None:
            factor("goal", potential, x)

    return program


def require_mean(values, expected):
    error = float(values.std()) / len(values) ** 0.5
    assert abs(float(values.mean()) - expected) < 4 * error + 1e-9


def require_table(posterior, weight):
    """Hold ``Z`` and ``Z E[1{x, c}]`` to a table of unnormalised weights, cell by cell."""
    estimate = posterior.log_evidence.exp()
    require_mean(estimate, float(weight.sum()))
    state = torch.cat([posterior.samples["x"], posterior.samples["code"].long()], -1)
    own = torch.where(posterior.alive[:, None], posterior.weights, 0.0)
    for cell in itertools.product(*map(range, weight.shape)):
        here = (state == torch.tensor(cell)).all(-1)
        require_mean(estimate * (own * here).sum(-1), float(weight[cell]))


FIRST_IS_ZERO = torch.tensor([1.0, 0.0], dtype=torch.float64)
KNOWN = [("joint", 0.765781), ("short", 0.651875), ("seq", 0.905)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("name", "agrees"), KNOWN)
def test_tokens_that_are_known(name, agrees, method):
    problem = corr_bits(0.05)
    joint = LatentLaw.of(problem, PATHS[name]).joint
    weight = joint * FIRST_IS_ZERO[:, None, None]
    assert float(weight.sum()) == pytest.approx(0.5)
    assert float(weight[0, 0].sum() / weight.sum()) == pytest.approx(agrees, abs=1e-6)
    held = clamp(
        program_of(chain_of(problem, PATHS[name])),
        tokens=torch.tensor([0, 0]),
        mask=torch.tensor([True, False]),
    )
    posterior = SMC(held, method=method, **SIZE, **METHODS[method]).run(seed=5)
    assert posterior.exact
    require_table(posterior, weight)


def tilt(problem, seed=3):
    shape = [problem.vocab_size] * problem.length
    generator = torch.Generator().manual_seed(seed)
    return 1.5 * torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("path", [Path.joint(3), Path.ordered(2), Path.sequential(2, 2)], ids=str)
def test_a_reward_tilts_tokens_and_latent_together(path, method):
    """Two slots of codes, three tokens; the potential reads the tokens alone."""
    problem = random_latents(2, 2, 2, 2, seed=8, sharpness=1.5)
    table = tilt(problem)
    weight = LatentLaw.of(problem, path).joint * table.exp()[..., None, None]
    program = program_of(chain_of(problem, path), Potential(lambda x: table[x.unbind(-1)]))
    posterior = SMC(program, method=method, **SIZE, **METHODS[method]).run(seed=6)
    require_table(posterior, weight)


def test_a_bare_chain_and_a_potential():
    problem, path = corr_bits(0.05), Path.joint(3)
    table = tilt(problem)
    weight = LatentLaw.of(problem, path).tokens * table.exp()
    chain = chain_of(problem, path)
    posterior = SMC(chain, Potential(lambda x: table[x.unbind(-1)]), **SIZE).run(seed=1)
    require_mean(posterior.log_evidence.exp(), float(weight.sum()))
    assert int(posterior.x0.max()) < 2


@pytest.mark.parametrize("path", [Path.sequential(2, 1), Path.joint(2)], ids=str)
def test_a_reward_beside_a_continuous_latent(path):
    problem = corr_bits(0.05).embedded(lambda x: 1.0 - 2.0 * x[:, :1, None].double())
    process, table = Gaussian(), tilt(problem)
    rule = ScalarLatent(problem, process, num_points=801)
    weight = rule.tokens(path, ancestral(process)) * table.exp()
    kernel = LatentKernel(BINARY, process, problem.denoiser(process), path)
    program = program_of(ReverseChain(kernel, 2), Potential(lambda x: table[x.unbind(-1)]))
    posterior = SMC(program, twist="persistent", **SIZE).run(seed=2)
    estimate = posterior.log_evidence.exp()
    require_mean(estimate, float(weight.sum()))
    for cell in itertools.product(range(2), repeat=2):
        here = (posterior.samples["x"] == torch.tensor(cell)).all(-1)
        require_mean(estimate * (posterior.weights * here).sum(-1), float(weight[cell]))


def test_a_latent_left_behind_by_its_particle_is_found_out(monkeypatch):
    """A mutant: tokens are resampled, the latents beside them stay where they were."""

    def latents_stay(state, ancestors):
        moved = take_particles(state, ancestors)
        for name, carry in state["sites"].items():
            moved["sites"][name]["latent"] = carry["latent"]
        return moved

    problem, path = corr_bits(0.05), Path.sequential(1, 2)
    table = 4.0 * torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    weight = LatentLaw.of(problem, path).joint * table.exp()[..., None]
    program = program_of(chain_of(problem, path), Potential(lambda x: table[x.unbind(-1)]))
    monkeypatch.setattr(Bound, "gather", staticmethod(latents_stay))
    posterior = SMC(program, twist="persistent", ess_threshold=2.0, **SIZE).run(seed=4)
    with pytest.raises(AssertionError):
        require_table(posterior, weight)
