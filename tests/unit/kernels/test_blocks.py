"""A kernel whose steps draw a continuous latent beside the tokens, in one file: contract and SMC.

The latent is a random walk that is pulled by the tokens; the prediction of the tokens is shifted by
the latent of the step before.
"""

import pyro
import pytest
import torch
from pyro.distributions import Normal

from ppl_diffusion import handlers
from ppl_diffusion.denoisers import TableDenoiser
from ppl_diffusion.distributions import BlockStep, ReverseChain
from ppl_diffusion.errors import IntractableLogProb
from ppl_diffusion.kernels import (
    FACTORISED,
    SAMPLE_ONLY,
    Absorbing,
    BlockSpec,
    InterpolatingKernel,
    Uniform,
    tokens_of,
)
from ppl_diffusion.smc import FeynmanKac, run_smc
from ppl_diffusion.smc.conditional import conditional_smc
from ppl_diffusion.smc.feynman_kac import BoundFeynmanKac
from ppl_diffusion.testing import KernelContract, all_states, random_joint, z_score

SIZE, LENGTH, SD = 2, 2, 1.0
SLOPE = torch.tensor([-2.0, 2.0], dtype=torch.float64)


class LatentKernel(InterpolatingKernel):
    """Tokens from a prediction shifted by the carried latent; a new latent beside them."""

    markov = False
    blocks = {"latent": BlockSpec(())}  # noqa: RUF012

    def start_carry(self, tokens, generator=None, *, given=None):
        carry = super().start_carry(tokens, generator, given=given)
        return {**carry, "latent": torch.zeros(tokens.shape[:-1], dtype=torch.float64)}

    def step(self, carry, k, *, fixed=None):
        own = super().step(carry, k, fixed=fixed)
        shift = carry["latent"][..., None, None] * SLOPE
        tokens = own.with_log_probs(torch.log_softmax(own.log_probs + shift, -1))
        pull = 0.5 * (carry["tokens"] == 1).sum(-1)
        return BlockStep({"tokens": tokens, "latent": Normal(0.9 * carry["latent"] + pull, SD)})


def make(process=None, num_steps=4):
    process = process or Absorbing(SIZE)
    table = TableDenoiser(random_joint(SIZE, LENGTH, sharpness=0.5), process)
    return LatentKernel(process, table, num_steps=num_steps)


def quadrature(low=-7.0, high=9.0, num=33):
    """Equal weights: for a smooth density that ends at zero the error is far below 1e-8."""
    points = torch.linspace(low, high, num, dtype=torch.float64)
    return points, torch.full((num,), (high - low) / (num - 1), dtype=torch.float64)


class LatentContract(KernelContract):
    tolerance = 1e-6

    def block_grid(self, name):
        return quadrature()


class TestAbsorbing(LatentContract):
    def make_kernel(self):
        return make(num_steps=2)


class TestUniform(LatentContract):
    def make_kernel(self):
        return make(Uniform(SIZE), num_steps=2)


def potential(x0):
    """Tokens that agree, which only a latent behind both brings about."""
    return 2.0 * (x0[..., 0] == x0[..., 1]) - 0.5 * (x0[..., 1] == 0).to(torch.float64)


def twist(carry, k):
    """Looks at the latent too, so that a latent and its particle must stay together."""
    return 1.5 * torch.tanh(carry["latent"]) + 0.2 * (carry["tokens"] == 1).sum(-1)


def evidence(kernel, log_g):
    """Z by enumeration of the tokens and quadrature of the latents, backwards in time."""
    states, (points, weights) = (
        all_states(kernel.process.num_states, LENGTH),
        quadrature(-11.0, 13.0, num=121),
    )
    clean = (states < SIZE).all(-1)
    ahead = torch.where(clean, log_g(states.clamp_max(SIZE - 1)).exp(), 0.0)
    ahead = ahead[:, None].expand(-1, len(points))  # E[G | tokens, latent]
    tokens, latent = (
        x.flatten(0, 1)
        for x in (states[:, None].expand(-1, len(points), -1), points.expand(len(states), -1))
    )
    for k in reversed(range(kernel.num_steps)):
        step = kernel.step({"tokens": tokens, "latent": latent}, k)
        moves = step.blocks["tokens"].log_prob(states[:, None]).exp()  # (to, from)
        drift = step.blocks["latent"].log_prob(points[:, None]).exp() * weights[:, None]
        ahead = torch.einsum("sf,zf,sz->f", moves, drift, ahead).reshape(len(states), -1)
    # A chain starts at latent 0, which is a point of the grid.
    start = ahead[:, int((points.abs()).argmin())]
    return float(kernel.prior_log_prob(states).exp() @ start)


def run(fk, runs=12000, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return run_smc(fk, 4, runs, ess_threshold=2.0, generator=generator)


@pytest.mark.parametrize("process", [Absorbing, Uniform])
@pytest.mark.parametrize("ahead", [None, twist], ids=["bootstrap", "twisted"])
def test_smc_carries_the_latent_exactly(process, ahead):
    """E[Z_hat] = Z, resampled at every step: 4 standard errors, false-alarm rate 6e-5 each."""
    kernel = make(process(SIZE))
    post = run(FeynmanKac(ReverseChain(kernel, LENGTH), potential, twist=ahead))
    assert abs(z_score(post.log_evidence.exp(), evidence(kernel, potential))) < 4


class Forgetful(FeynmanKac):
    """The mutant: a resampled particle keeps the latent of its place, not of its ancestor."""

    def bind(self, **options):
        bound = super().bind(**options)
        bound.gather = lambda carry, ancestors: {
            **BoundFeynmanKac.gather(bound, carry, ancestors),
            "latent": carry["latent"],
        }
        return bound


def test_a_latent_that_is_not_gathered_is_seen():
    kernel = make()
    post = run(Forgetful(ReverseChain(kernel, LENGTH), potential, twist=twist))
    assert abs(z_score(post.log_evidence.exp(), evidence(kernel, potential))) > 6


def test_quadrature_is_the_enumeration_where_nothing_depends_on_the_latent():
    """log G = 0 gives one; so the evidence above is no tautology."""
    kernel = make()
    assert evidence(kernel, lambda x0: 0.0 * x0[..., 0].double()) == pytest.approx(1.0, abs=1e-6)
    assert evidence(kernel, potential) > 1.2


def test_a_path_packs_tokens_and_latent():
    chain = ReverseChain(make(), LENGTH)
    path = chain.sample((5,))
    assert path.shape == (5, 5, LENGTH + 1)
    assert path.dtype == torch.float64
    assert chain.x0(path).dtype == torch.int64
    assert torch.equal(chain.latent(path), path[:, -1, LENGTH])
    assert torch.equal(chain.latent(path, k=0), torch.zeros(5, dtype=torch.float64))
    steps, carry = (
        torch.zeros(5, dtype=torch.float64),
        chain.kernel.start_carry(path[:, 0, :2].long()),
    )
    for k in range(chain.num_steps):
        value = {"tokens": path[:, k + 1, :2].long(), "latent": path[:, k + 1, 2]}
        step = chain.kernel.step(carry, k)
        steps = steps + step.log_prob(value)
        carry = chain.kernel.advance(carry, value, k, step=step)
    torch.testing.assert_close(chain.log_prob(path), steps)
    torch.testing.assert_close(chain.log_prob(path.clone()), steps)
    moved = path.clone()
    moved[:, 0, 2] = 1.0  # the latent starts at zero
    assert bool((chain.log_prob(moved) == -torch.inf).all())
    with pytest.raises(ValueError, match="draws latent beside its tokens, and no 'noise'"):
        chain.block(path, "noise")


def test_the_clean_sequence_alone_has_no_density():
    chain = ReverseChain(make(), LENGTH)
    x0 = chain.x0(chain.sample((5,)))
    for what in ("log_prob", "log_prob_bound", "log_prob_estimate"):
        with pytest.raises(IntractableLogProb):
            getattr(chain.marginal(), what)(x0)
    assert chain.kernel.claim == "FACTORISED with latent"


def test_an_unrolled_chain_has_a_site_for_every_block():
    chain = ReverseChain(make(), LENGTH)
    trace = pyro.poutine.trace(handlers.unroll(lambda: pyro.sample("x", chain))).get_trace()
    path = trace.nodes["x"]["value"]
    for k in range(1, 5):
        assert torch.equal(trace.nodes[f"x_tok_{k}"]["value"], chain.tokens(path)[k])
        assert torch.equal(trace.nodes[f"x_lat_{k}"]["value"], path[k, 2])
    torch.testing.assert_close(trace.log_prob_sum(), chain.log_prob(path.clone()))


def test_conditional_smc_holds_the_latent_of_its_path():
    chain = ReverseChain(make(), LENGTH)
    path = chain.sample((3,))
    run = conditional_smc(FeynmanKac(chain, potential), retained=path, num_particles=4)
    assert torch.equal(run.trace.path()[:, 0], path)
    assert run.path.shape == path.shape


def test_a_block_step_is_the_product_of_its_blocks():
    kernel = make()
    carry = kernel.init_carry((3,), LENGTH)
    step = kernel.step(carry, 0)
    value = step.sample((2,), generator=torch.Generator().manual_seed(1))
    again = step.sample((2,), generator=torch.Generator().manual_seed(1))
    assert all(torch.equal(value[name], again[name]) for name in ("tokens", "latent"))
    assert tokens_of(value).shape == (2, 3, LENGTH)
    assert value["latent"].shape == (2, 3)
    parts = [step.blocks[name].log_prob(value[name]) for name in ("tokens", "latent")]
    assert torch.equal(step.log_prob(value), parts[0] + parts[1])
    before = torch.random.get_rng_state()
    step.sample(generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.random.get_rng_state(), before)


class Random(InterpolatingKernel):
    """A mutant: its start draws a latent that shifts all predictions, and nobody scores it."""

    markov = False

    def start_carry(self, tokens, generator=None, *, given=None):
        carry = super().start_carry(tokens, generator, given=given)
        shift = torch.randn(tokens.shape[:-1], generator=generator, dtype=torch.float64)
        return {**carry, "shift": shift}

    def step(self, carry, k, *, fixed=None):
        own = super().step(carry, k, fixed=fixed)
        shift = carry["shift"][..., None, None] * SLOPE
        return own.with_log_probs(torch.log_softmax(own.log_probs + shift, -1))


class Noisy(InterpolatingKernel):
    """A mutant: the prediction has fresh noise in every call, whatever its density says."""

    def step(self, carry, k, *, fixed=None):
        own = super().step(carry, k, fixed=fixed)
        noise = torch.randn(own.log_probs.shape, dtype=torch.float64)
        return own.with_log_probs(torch.log_softmax(own.log_probs + noise, -1))


class Leaky(InterpolatingKernel):
    """A mutant: every step is normalised but the last, which loses a tenth."""

    def step(self, carry, k, *, fixed=None):
        own = super().step(carry, k, fixed=fixed)
        if k == self.num_steps - 1:
            whole = own.log_prob
            own.log_prob = lambda value: whole(value) - 0.1
        return own


def mutant(kind):
    process = Absorbing(SIZE)
    return kind(process, TableDenoiser(random_joint(SIZE, LENGTH), process), num_steps=2)


@pytest.mark.parametrize(
    ("kind", "check"),
    [
        (Random, "test_path_density_is_a_function_of_the_path"),
        (Noisy, "test_the_density_is_a_function_of_carry_and_value"),
        (Noisy, "test_path_density_is_a_function_of_the_path"),
        (Leaky, "test_every_step_is_normalised"),
        (Leaky, "test_paths_have_mass_one"),
    ],
)
def test_a_kernel_without_a_density_cannot_claim_one(kind, check):
    """The contract fails a random or leaking density, unless the kernel says SAMPLE_ONLY."""
    kernel, contract = mutant(kind), KernelContract()
    assert kernel.capability == FACTORISED
    with pytest.raises(AssertionError):
        getattr(contract, check)(kernel)
    kernel.capability = SAMPLE_ONLY
    with pytest.raises(pytest.skip.Exception):
        getattr(contract, check)(kernel)


def test_a_latent_counted_without_its_density_is_seen():
    """A step that draws a latent and scores the tokens alone has no total mass of one."""

    class Unscored(LatentKernel):
        def step(self, carry, k, *, fixed=None):
            step = super().step(carry, k, fixed=fixed)
            step.log_prob = lambda value: step.blocks["tokens"].log_prob(value["tokens"])
            return step

    process = Absorbing(SIZE)
    kernel = Unscored(process, TableDenoiser(random_joint(SIZE, LENGTH), process), num_steps=2)
    for check in ("test_every_step_is_normalised", "test_paths_have_mass_one"):
        with pytest.raises(AssertionError):
            getattr(LatentContract(), check)(kernel)
