"""The chain of a continuous latent: its density, its gradients, and as a site of programs."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS

from ppl_diffusion.distributions import GaussianChain
from ppl_diffusion.errors import CapabilityError, IntractableLogProb
from ppl_diffusion.inference import SMC
from ppl_diffusion.kernels.latent_solvers import DDIM, DPMSolver
from ppl_diffusion.processes.gaussian import Gaussian
from ppl_diffusion.testing.latent_toys import corr_bits
from ppl_diffusion.testing.oracles import z_score

NOISE = Gaussian("linear", t_min=0.2)
BITS = corr_bits(0.1)
VECTORS = BITS.embedded(lambda x: 2.0 * x[:, :1, None] - 1.0)
DENOISER = VECTORS.denoiser(NOISE)


def chain(num_steps=2, **options):
    return GaussianChain(NOISE, DENOISER, 2, num_steps, **options)


def finished_law(points, **options):
    """Density of the finished latent on a grid, by quadrature of one step after the other."""
    own, mesh = chain(2, **options), float(points[1] - points[0])
    grid = torch.cartesian_prod(points, points, points)[..., None, None]
    density = own.log_prob(grid).exp().reshape([len(points)] * 3)
    return density.sum((0, 1)) * mesh**2


def test_the_density_is_one_in_total_and_that_of_samples():
    """The law of the finished latent by chi-square over eight cells; false alarm 1e-4."""
    points = torch.linspace(-5.0, 5.0, 101, dtype=torch.float64)
    law = finished_law(points)
    assert float(law.sum() * 0.1) == pytest.approx(1.0, abs=1e-4)
    own, generator = chain(2), pyro.set_rng_seed(5)
    assert generator is None
    drawn = own.latent(own.sample((20_000,)))[:, 0, 0].contiguous()
    edges = torch.tensor([-1.55, -1.05, -0.55, -0.05, 0.45, 0.95, 1.45], dtype=torch.float64)
    counts = torch.bincount(torch.bucketize(drawn, edges), minlength=8).double()
    cell = torch.bucketize(points, edges)
    share = torch.zeros(8, dtype=torch.float64).scatter_add(0, cell, law * 0.1)
    statistic = ((counts - 20_000 * share) ** 2 / (20_000 * share)).sum()
    assert float(statistic) < 29.9  # chi-square of seven degrees


@pytest.mark.parametrize("solver", [None, DDIM(eta=0.5), DPMSolver(2, sde=True)])
def test_log_prob_is_that_of_its_steps(solver):
    own = chain(3, solver=solver)
    path = own.sample((4,))
    assert path.shape == (4, 4, 1, 1)
    assert own.log_prob(path).shape == (4,)
    assert bool(own.log_prob(path).isfinite().all())
    torch.testing.assert_close(own.expand((3, 4)).log_prob(path), own.log_prob(path).expand(3, 4))


def test_gradients_reach_the_noise():
    own = chain(2, solver=DDIM())
    noise = torch.randn(5, 1, 1, dtype=torch.float64, requires_grad=True)
    own.latent(own.from_noise(noise)).sum().backward()
    assert bool((noise.grad != 0).all())
    value = chain(2).sample((3,)).requires_grad_()
    chain(2).log_prob(value).sum().backward()
    assert bool((value.grad != 0).any())


def test_expanding_and_refusing():
    own = chain().expand((2, 1)).expand((2, 3))
    assert own.sample((4,)).shape == (4, 2, 3, 3, 1, 1)
    with pytest.raises(ValueError, match="Cannot broadcast distribution of shape"):
        own.expand((2,))
    with pytest.raises(CapabilityError, match="the latent has codes"):
        GaussianChain(NOISE, BITS.denoiser(), 2, 2)
    with pytest.raises(IntractableLogProb, match="have no noise and no density"):
        chain(solver=DDIM()).log_prob(chain().sample())
    with pytest.raises(CapabilityError, match=r"from_noise: the steps of .* are random"):
        chain().from_noise(torch.zeros(1, 1))
    with pytest.raises(ValueError, match="must decrease from exactly 1"):
        chain([1.0, 0.5])


def test_a_prompt_is_read():
    """P(y > 0 | x1 = 1): the latent is +1 for it. False alarm 6e-5."""
    pyro.set_rng_seed(1)
    own = chain(8, prompt=torch.tensor([1, -1]))
    up = (own.latent(own.sample((2000,)))[:, 0, 0] > 0).double()
    assert float(up.mean()) > 0.97


def program(solver=None):
    """Read the second bit off the finished latent."""
    if solver is None:
        own = chain(2)
        latent = own.latent(pyro.sample("latent", own))
    else:
        own = chain(2, solver=solver)
        latent = own.latent(own.from_noise(pyro.sample("noise", own.noise())))
    latent = pyro.deterministic("z", latent[..., 0, 0])
    pyro.sample("y", dist.Normal(latent, 0.5), obs=torch.tensor(0.3).double())


def truth(solver=None):
    points = torch.linspace(-5.0, 5.0, 101, dtype=torch.float64)
    if solver is None:
        weight, z = finished_law(points), points
    else:
        own = chain(2, solver=solver)
        weight = own.noise().log_prob(points[:, None, None]).exp()
        z = own.latent(own.from_noise(points[:, None, None]))[:, 0, 0]
    weight = weight * dist.Normal(z, 0.5).log_prob(torch.tensor(0.3).double()).exp()
    return float(weight.sum() * 0.1), float((weight * z).sum() / weight.sum())


def test_nuts_moves_the_latent():
    """Mean of the posterior by quadrature; 5 standard errors of a chain thinned by five."""
    pyro.set_rng_seed(0)
    mcmc = MCMC(
        NUTS(program, max_tree_depth=4), num_samples=250, warmup_steps=80, disable_progbar=True
    )
    mcmc.run()
    z = mcmc.get_samples()["latent"][:, -1, 0, 0]
    error = float(z.std()) / (len(z) / 5) ** 0.5
    assert abs(float(z.mean()) - truth()[1]) < 5 * error


@pytest.mark.parametrize("solver", [None, DDIM()], ids=["noise", "no noise"])
def test_smc_takes_it_as_a_latent_and_renews_it(solver):
    """Tokens follow in a chain of their own elsewhere; here the latent alone is weighed."""
    from ppl_diffusion.denoisers import AtLatent
    from ppl_diffusion.distributions import ReverseChain
    from ppl_diffusion.kernels import Absorbing, InterpolatingKernel

    told = InterpolatingKernel(Absorbing(2), AtLatent(DENOISER), num_steps=2)

    def both():
        own = chain(2, solver=solver)
        site, law = ("latent", own) if solver is None else ("noise", own.noise())
        drawn = pyro.sample(site, law)
        latent = own.latent(drawn if solver is None else own.from_noise(drawn))
        tokens = ReverseChain(told, 2, given={"latent": latent})
        pyro.sample("path", tokens)
        pyro.deterministic("z", latent[..., 0, 0])
        pyro.sample("y", dist.Normal(latent[..., 0, 0], 0.5), obs=torch.tensor(0.3).double())

    posterior = SMC(both, num_particles=12, num_runs=150).run(seed=3)
    total, mean = truth(solver)
    estimate = posterior.log_evidence.exp()
    assert abs(z_score(estimate, total)) < 4
    assert abs(z_score(estimate * posterior.expectation(lambda s: s["z"]), total * mean)) < 4
