"""Chains of learned noise: their law, and particle methods over them, against enumeration."""

import math

import pyro
import pytest
import torch
from bit_laws import joint_of

from ppl_diffusion.denoisers import DirectDenoiser, TableDenoiser
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.inference import SMC
from ppl_diffusion.kernels import Absorbing, DirectKernel, Uniform
from ppl_diffusion.models.forward_marginals import Marginals
from ppl_diffusion.potentials import Potential
from ppl_diffusion.processes.couplings import Maximum
from ppl_diffusion.smc import FeynmanKac, factorised, run_smc
from ppl_diffusion.testing import KernelContract, chi_square_p_value, state_index, toy_potential
from ppl_diffusion.testing.dense import all_states
from ppl_diffusion.testing.forward_learned_laws import ForwardLaw
from ppl_diffusion.testing.latent_toys import mix_prod
from ppl_diffusion.testing.oracles import z_score

JOINT = joint_of(mix_prod(2, 0.9))
STEPS = 3
PROCESSES = [Absorbing(2), Uniform(2)]
NAMES = ["masks", "uniform"]


def law_of(process, seed=0):
    """Return a random learned noise of two bits, exactly."""
    generator = torch.Generator().manual_seed(seed)
    shape = (STEPS - 1, 4, 2, process.num_states)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64)
    network = Marginals(lambda x: logits, process, STEPS)
    x = all_states(2, 2)
    return ForwardLaw(JOINT.reshape(-1), x, network(x), Maximum())


def denoiser_of(law, *, look="exact", spoil=0.0):
    """Return the best reverse chain of a law, and a look-ahead beside it."""
    size, num = law.marginals.shape[-1], law.num_steps
    best = torch.stack([_laws(law.target(t)) for t in range(1, num + 1)])
    best = (1 - spoil) * best + spoil / size
    joints = [law.law[:, None] * law.law_at(t) for t in range(num + 1)]
    clean = torch.nn.functional.one_hot(law.x, 2).to(torch.float64)
    seen = torch.stack([torch.einsum("xz,xlv->zlv", j, clean) for j in joints])
    seen = seen + 1e-12
    seen = seen / seen.sum(-1, keepdim=True)
    if look == "none":
        seen = torch.full_like(seen, 0.5)
    if look == "wrong":
        seen = (seen + 0.2).flip(-1) / 1.4

    def picked(tables, tokens, t):
        step = (torch.as_tensor(t) * num).round().long().expand(tokens.shape[:-1])
        return tables[step, state_index(tokens, size)].log()

    best = torch.cat([best[:1], best])  # nothing is asked at time zero
    return DirectDenoiser(
        lambda tokens, t: picked(best, tokens, t),
        lambda tokens, t: picked(seen, tokens, t),
        vocab_size=2,
        num_states=size,
    )


def _laws(target):
    v, mass = target
    return torch.where((mass > 0)[:, None, None], v, 1.0 / v.shape[-1])


def chain_of(process, **options):
    law = law_of(process)
    return law, ReverseChain(DirectKernel(process, denoiser_of(law, **options), STEPS), 2)


class TestMasks(KernelContract):
    def make_kernel(self):
        return chain_of(Absorbing(2))[1].kernel


class TestUniform(KernelContract):
    def make_kernel(self):
        return chain_of(Uniform(2))[1].kernel


def clean_law(law):
    """Return what the chain samples, over the clean sequences."""
    inside = (law.states() < 2).all(-1)
    sampled = law.sampled()
    assert float(sampled[~inside].sum()) == pytest.approx(0, abs=1e-12)
    return sampled[inside]


@pytest.mark.parametrize("process", PROCESSES, ids=NAMES)
def test_the_chain_samples_what_the_law_says(process):
    """Chi-square of level 1e-4; a head with 30 % of noise fails it."""
    for spoil, fits in ((0.0, True), (0.3, False)):
        law, drawn = chain_of(process, spoil=spoil)
        x0 = drawn.x0(drawn.sample((20_000,), generator=torch.Generator().manual_seed(1)))
        counts = torch.bincount(state_index(x0, 2), minlength=4)
        assert (chi_square_p_value(counts, clean_law(law)) > 1e-4) is fits


@pytest.mark.parametrize("process", PROCESSES, ids=NAMES)
@pytest.mark.parametrize("look", ["exact", "none", "wrong"])
@pytest.mark.parametrize("twist", [None, "argmax", "persistent"])
def test_evidence_is_unbiased_whatever_the_look_ahead(process, look, twist):
    """Four standard errors, 6e-5 per case; seeds are fixed."""
    potential = toy_potential(2, 2, scale=2.0)
    law, chain = chain_of(process, look=look)
    exact = float(clean_law(law) @ potential(all_states(2, 2)).exp())
    post = run_smc(
        FeynmanKac(chain, potential, twist=twist),
        8,
        1000,
        generator=torch.Generator().manual_seed(2),
        ess_threshold=0.7,
        store_path=False,
    )
    assert post.exact
    assert abs(z_score(post.log_evidence.exp(), exact)) < 4
    spoilt = chain_of(process, spoil=0.2)[1]
    post = run_smc(FeynmanKac(spoilt, potential, twist=None), 8, 4000, store_path=False)
    assert abs(z_score(post.log_evidence.exp(), exact)) > 4


def test_a_good_look_ahead_lowers_the_variance_and_a_wrong_one_raises_it():
    """Of masks that are revealed in turn; the variances are a factor of two apart."""
    shown = torch.tensor([[0.7, 0.7], [0.3, 0.3]], dtype=torch.float64).logit()
    network = Marginals(
        lambda x: shown[:, None].expand(2, len(x), 2),
        Absorbing(2),
        STEPS,
        masks_only=True,
    )
    x = all_states(2, 2)
    law = ForwardLaw(JOINT.reshape(-1), x, network(x), Maximum())
    potential = Potential(lambda x0: 4.0 * x0.sum(-1).double(), name="ones")
    spread = {}
    for look in ("exact", "wrong"):
        chain = ReverseChain(DirectKernel(Absorbing(2), denoiser_of(law, look=look), STEPS), 2)
        model = FeynmanKac(chain, potential, twist="argmax")
        source = torch.Generator().manual_seed(3)
        post = run_smc(model, 16, 2000, generator=source, ess_threshold=0.9, store_path=False)
        spread[look] = float(post.log_evidence.var())
    assert 2 * spread["exact"] < spread["wrong"]


def test_a_program_with_an_observed_token_as_a_likelihood():
    """A token that was read with errors: four standard errors of the evidence."""
    law, chain = chain_of(Absorbing(2))
    error = torch.tensor([[0.9, 0.1], [0.2, 0.8]])

    def program():
        x0 = chain.x0(pyro.sample("path", chain))
        read = pyro.distributions.Categorical(error[x0[..., 0]])
        pyro.sample("read", read, obs=torch.tensor(1))

    post = SMC(program, num_particles=16, num_runs=400).run(seed=4)
    exact = float(clean_law(law) @ error[all_states(2, 2)[:, 0], 1].double())
    assert abs(z_score(post.log_evidence.exp(), exact)) < 4


def test_every_row_of_the_network_is_counted_once():
    _, chain = chain_of(Absorbing(2))
    post = run_smc(FeynmanKac(chain, toy_potential(2, 2), twist="argmax"), 8, 4, store_path=False)
    assert 0 < post.num_evaluations <= 8 * 4 * STEPS


def test_what_a_chain_of_learned_noise_cannot_is_refused():
    law, chain = chain_of(Absorbing(2))
    prompted = ReverseChain(chain.kernel, 2, prompt=torch.tensor([1, -1]))
    with pytest.raises(CapabilityError, match="give it as a likelihood"):
        prompted.sample()
    with pytest.raises(CapabilityError, match="no prediction of clean tokens"):
        chain.kernel.cavity_log_probs({"tokens": torch.zeros(1, 2).long()}, 0)
    process = Absorbing(2)
    other = TableDenoiser(JOINT, process)
    with pytest.raises(CapabilityError, match="output_size = 5, but has no output_size"):
        DirectKernel(process, other, 2)
    short = denoiser_of(law)
    short.look_ahead = lambda tokens, t: torch.zeros(*tokens.shape, 1)
    kernel = DirectKernel(process, short, STEPS)
    with pytest.raises(ValueError, match="expected"):
        ReverseChain(kernel, 2).sample()
    assert math.isfinite(float(chain.log_prob(chain.sample())))


METHODS = ("smc", "importance-sampling", "soft-value", "tempering", "refinement", "steering")
REFUSED = ("twisted", "corrector", "split-gibbs", "guided-lineages")


@pytest.mark.parametrize("process", PROCESSES, ids=NAMES)
@pytest.mark.parametrize("method", METHODS)
def test_methods_that_need_samples_and_densities_alone_are_exact(method, process):
    """Four standard errors of the evidence, 6e-5 per case; seeds are fixed."""
    law, chain = chain_of(process)
    potential = toy_potential(2, 2, scale=2.0)
    exact = float(clean_law(law) @ potential(all_states(2, 2)).exp())
    post = SMC(chain, potential, method=method, num_particles=16, num_runs=300).run(seed=5)
    assert post.exact
    assert abs(z_score(post.log_evidence.exp(), exact)) < 4


@pytest.mark.parametrize("method", REFUSED)
def test_methods_that_tilt_a_prediction_are_refused(method):
    _, chain = chain_of(Uniform(2))
    with pytest.raises(CapabilityError):
        SMC(chain, toy_potential(2, 2), method=method, num_particles=4).run(seed=0)


@pytest.mark.parametrize("process", PROCESSES, ids=NAMES)
@pytest.mark.parametrize("log_l", [[[0.3, -1.0], [-2.0, 0.5]], [[0.0, -math.inf], [0.0, 0.0]]],
                         ids=["soft", "known"])  # fmt: skip
@pytest.mark.parametrize("look", ["exact", "wrong"])
def test_likelihoods_of_positions_are_exact_at_the_last_step(process, log_l, look):
    """A known token is such a likelihood. Four standard errors, 6e-5; seeds are fixed."""
    law, chain = chain_of(process, look=look)
    log_l = torch.tensor(log_l, dtype=torch.float64)
    table = clean_law(law).reshape(2, 2) * (log_l[0][:, None] + log_l[1]).exp()
    generator = torch.Generator().manual_seed(2)
    posterior = run_smc(factorised(chain, log_l), 4, 3000, ess_threshold=2.0, generator=generator)
    estimate = posterior.log_evidence.exp()
    assert abs(z_score(estimate, float(table.sum()))) < 4
    agree = posterior.expectation(lambda x0: (x0[..., 0] == x0[..., 1]).double())
    assert abs(z_score(estimate * agree, float(table.diagonal().sum()))) < 4


@pytest.mark.parametrize("process", PROCESSES, ids=NAMES)
def test_the_last_look_ahead_is_the_exact_sum(process):
    """Without it the evidence is as unbiased, and noisier."""
    law, chain = chain_of(process, look="wrong")
    log_l = torch.tensor([[0.3, -1.0], [-2.0, 0.5]], dtype=torch.float64)
    last, states = chain.num_steps - 1, law.states()[:, None]
    fk, carry, shape = factorised(chain, log_l), chain.kernel.resume(states), states.shape[:2]
    clean = chain.kernel.step(carry, last).log_probs[..., :2] + log_l
    wanted = torch.logsumexp(clean, -1).sum(-1)
    torch.testing.assert_close(fk.twist(carry, last, shape), wanted, rtol=0, atol=1e-12)
    before = fk.twist(carry, last - 1, shape)
    assert float((before - wanted).abs().max()) > 0.1


def test_a_single_step_of_known_likelihoods_has_no_noise():
    """With one step the sum over all sequences is the evidence of every particle."""
    head = torch.tensor([0.2, 0.3, 0.5]).log().double()
    made = DirectDenoiser(
        lambda tokens, t: head.expand(*tokens.shape, 3),
        lambda tokens, t: torch.full((*tokens.shape, 2), 0.5).log(),
        vocab_size=2,
        num_states=3,
    )
    chain = ReverseChain(DirectKernel(Absorbing(2), made, 1), 2)
    log_l = torch.tensor([[0.3, -1.0], [-2.0, 0.5]], dtype=torch.float64)
    found = run_smc(factorised(chain, log_l), 2, 5, generator=torch.Generator().manual_seed(0))
    clean = torch.tensor([0.4, 0.6]).double()
    wanted = (clean * log_l.exp()).sum(-1).prod().log()
    torch.testing.assert_close(found.log_evidence, wanted.expand(5), rtol=0, atol=1e-6)
