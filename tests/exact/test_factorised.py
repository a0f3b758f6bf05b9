"""Likelihoods of single positions: exact sums, with latents beside the tokens and without."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.inference import SMC
from ppl_diffusion.kernels import Absorbing, InterpolatingKernel, LatentKernel, Path, Uniform
from ppl_diffusion.models.latent import LatentDiffusion
from ppl_diffusion.potentials import factor
from ppl_diffusion.smc import FeynmanKac, PositionPotential, factorised, run_smc
from ppl_diffusion.testing import toy_chain
from ppl_diffusion.testing.latent_laws import LatentLaw
from ppl_diffusion.testing.latent_toys import corr_bits, random_latents
from ppl_diffusion.testing.oracles import z_score

BITS = Absorbing(2)
TOYS = corr_bits(0.05)
SOFT = torch.tensor([[0.3, -1.0], [-2.0, 0.5]], dtype=torch.float64)
FIRST = torch.tensor([[0.0, -math.inf], [0.0, 0.0]], dtype=torch.float64)  # x1 = 0


def chain_of(path, problem=TOYS):
    return ReverseChain(LatentKernel(BITS, BITS, problem.denoiser(), path), 2)


def evidence(path, log_l):
    """Z under the law of the path, by enumeration that knows no kernel."""
    law = LatentLaw.of(TOYS, path).tokens
    weight = torch.stack(torch.meshgrid(*log_l, indexing="ij")).sum(0).exp()
    return float((law * weight).sum()), law * weight


def run(chain, log_l, runs=4000, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    fk = factorised(chain, log_l)
    return run_smc(fk, 4, runs, ess_threshold=2.0, generator=generator, **options)


@pytest.mark.parametrize("log_l", [SOFT, FIRST], ids=["soft", "hard"])
@pytest.mark.parametrize(
    "path",
    [Path.joint(2), Path.joint(4), Path.ordered(2), Path.sequential(1, 1), Path.masked(2)],
    ids=str,
)
def test_evidence_and_posterior_are_those_of_the_path(path, log_l):
    """4 standard errors each: false alarm 6e-5."""
    posterior = run(chain_of(path), log_l)
    total, table = evidence(path, log_l)
    estimate = posterior.log_evidence.exp()
    assert abs(estimate.mean() - total) < 1e-9 or abs(z_score(estimate, total)) < 4
    agree = posterior.expectation(lambda x0: (x0[..., 0] == x0[..., 1]).double())
    wanted = float(table.diagonal().sum())
    assert abs(z_score(estimate * agree, wanted)) < 4


@pytest.mark.parametrize("log_l", [SOFT, FIRST], ids=["soft", "hard"])
def test_one_step_is_summed_exactly(log_l):
    """One particle, one step: the weight is the sum over all sequences, whatever was drawn."""
    posterior = run(chain_of(Path.masked(1)), log_l, runs=20)
    expected = math.log(evidence(Path.masked(1), log_l)[0])
    torch.testing.assert_close(
        posterior.log_evidence, torch.full((20,), expected, dtype=torch.float64)
    )


def test_a_condition_on_one_bit_has_the_spec_s_numbers():
    """JOINT, delta = .05: log Z = -log 2 exactly, P(x2 = 0 | x1 = 0) under the model."""
    for steps, wanted in ((2, 0.651875), (4, 0.765781)):
        posterior = run(chain_of(Path.joint(steps)), FIRST)
        estimate = posterior.log_evidence.exp()
        assert abs(estimate.mean() - 0.5) < 1e-9 or abs(z_score(estimate, 0.5)) < 4
        zero = posterior.expectation(lambda x0: (x0[..., 1] == 0).double())
        assert abs(z_score(zero * estimate, 0.5 * wanted)) < 4


def test_ordinary_chains_and_what_it_saves():
    chain = toy_chain("absorbing", vocab_size=3, length=3, num_steps=4)
    log_l = 1.5 * torch.randn(3, 3, generator=torch.Generator().manual_seed(3)).double()
    mine = run(chain, log_l, runs=1500)
    generator = torch.Generator().manual_seed(1)
    plain = run_smc(
        FeynmanKac(chain, PositionPotential(log_l), twist=None), 4, 1500, generator=generator
    )
    total = float((chain.marginal().log_prob(EVERY) + PositionPotential(log_l)(EVERY)).exp().sum())
    assert abs(z_score(mine.log_evidence.exp(), total)) < 4
    assert mine.log_evidence.exp().std() < 0.4 * plain.log_evidence.exp().std()


EVERY = torch.cartesian_prod(*[torch.arange(3)] * 3)


def test_rows_are_asked_once_for_twist_and_move():
    """The look-ahead and the next step read one call: rows are those of the bare chain."""
    chain = chain_of(Path.joint(3))
    rows = run(chain, SOFT, runs=3).num_evaluations
    generator = torch.Generator().manual_seed(0)
    bare = run_smc(
        FeynmanKac(chain, lambda x0: 0.0 * x0[..., 0].double(), None), 4, 3, generator=generator
    )
    assert rows <= bare.num_evaluations + 3 * 4


def test_the_mutant_that_forgets_the_twist_is_seen(monkeypatch):
    """Without the ratio of prediction and proposal the evidence is off."""
    from ppl_diffusion.smc.feynman_kac import BoundFeynmanKac

    move = BoundFeynmanKac.move
    monkeypatch.setattr(
        BoundFeynmanKac, "move", lambda self, *a: (move(self, *a)[0], torch.zeros(4000, 4))
    )
    posterior = run(chain_of(Path.joint(2)), SOFT)
    total, _ = evidence(Path.joint(2), SOFT)
    assert abs(z_score(posterior.log_evidence.exp(), total)) > 6


@pytest.mark.parametrize(
    ("log_l", "sentence"),
    [
        (torch.zeros(3, 2), r"must have shape \(2, 2\)"),
        (torch.full((2, 2), math.nan), "below"),
        (torch.tensor([[0.0, 0.0], [-math.inf, -math.inf]]), "position 1 excludes all tokens"),
    ],
)
def test_bad_tables_are_refused(log_l, sentence):
    with pytest.raises(ValueError, match=sentence):
        factorised(chain_of(Path.joint(2)), log_l)


def test_tokens_that_change_again_are_refused():
    with pytest.raises(CapabilityError, match="must be masked and stay"):
        factorised(toy_chain("uniform", vocab_size=2, length=2), SOFT)
    denoiser = toy_chain("absorbing", vocab_size=2, length=2).kernel.denoiser
    again = InterpolatingKernel(BITS, denoiser, num_steps=2, kappa=0.5)
    with pytest.raises(CapabilityError, match="must be masked and stay"):
        factorised(ReverseChain(again, 2), SOFT)
    assert Uniform(2).absorbing is False


# Codes that can be listed.


def small_prior(problem):
    return LatentDiffusion(problem.denoiser(), vocabulary="01", length=2)


def test_all_codes_have_the_law_of_their_chain():
    problem = random_latents(2, 2, num_slots=2, num_codes=3, seed=1)
    prior = small_prior(problem)
    codes, log_p = prior.code_law(4)
    assert codes.shape == (9, 2)
    torch.testing.assert_close(log_p.exp().sum(), torch.tensor(1.0, dtype=torch.float64))
    drawn = prior.latent_chain(4)
    drawn = drawn.x0(drawn.sample((20_000,)))
    share = (drawn[:, None] == codes).all(-1).double().mean(0)
    spread = (log_p.exp() * (1 - log_p.exp()) / 20_000).sqrt()
    assert bool(((share - log_p.exp()).abs() < 5 * spread).all())  # false alarm 5e-6


def test_an_enumerated_code_weighs_exactly():
    """Every code with its own weight: p(c) G(c) sums to Z without any noise."""
    prior = small_prior(TOYS)
    codes, log_p = prior.code_law(1)
    given = prior.token_chain(1, latent=codes)
    total = sum(
        float(log_p[i].exp() * run(one(prior, code), SOFT, runs=1).log_evidence.exp())
        for i, code in enumerate(codes)
    )
    assert total == pytest.approx(evidence(Path.sequential(1, 1), SOFT)[0], abs=1e-9)
    assert given.batch_shape == (2,)


def one(prior, code):
    return prior.token_chain(1, latent=code)


def test_a_listed_code_is_a_latent_of_a_program():
    prior = small_prior(TOYS)
    codes, log_p = prior.code_law(1)

    def program():
        code = codes[pyro.sample("which", dist.Categorical(logits=log_p))]
        chain = prior.token_chain(1, latent=code)
        factor("likelihood", PositionPotential(SOFT), chain.x0(pyro.sample("path", chain)))

    posterior = SMC(program, num_particles=8, num_runs=400).run(seed=2)
    total, _ = evidence(Path.sequential(1, 1), SOFT)
    assert abs(z_score(posterior.log_evidence.exp(), total)) < 4
