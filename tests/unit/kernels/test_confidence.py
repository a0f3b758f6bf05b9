"""Confidence-based remasking: a dense definition, exact path densities, the carry, refusals."""

import itertools

import numpy as np
import pytest
import torch

from ppl_diffusion.denoisers import TableDenoiser
from ppl_diffusion.denoisers.prediction import HeadPrediction
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.kernels import FACTORISED, Absorbing, InterpolatingKernel, Uniform
from ppl_diffusion.kernels.confidence import CONFIDENCE, ConfidenceKernel
from ppl_diffusion.kernels.psi import remdm_loop
from ppl_diffusion.smc import FeynmanKac, run_smc
from ppl_diffusion.testing import (
    CountingDenoiser,
    KernelContract,
    chi_square_p_value,
    random_joint,
    state_index,
    toy_potential,
    z_score,
)

MASK = 2


def make(num_steps=3, length=2, vocab=MASK, **options):
    process = Absorbing(vocab)
    denoiser = TableDenoiser(random_joint(vocab, length, sharpness=1.5), process)
    grid = {} if "times" in options else {"num_steps": num_steps}
    return ConfidenceKernel(process, denoiser, **grid, **options)


class TestContract(KernelContract):
    """Of the kernel as it starts, with nothing decoded."""

    def make_kernel(self):
        return make()


def dense_remdm_conf(kernel, tokens, confidence, k):
    """The published step, (S,) rows: mask revealed tokens with softmax(-confidence) sigma."""
    a, b = kernel.alphas[k : k + 2]
    sigma_k = (1 - kernel.kappa[k]) * (1 - b)
    mask = kernel.process.vocab_size
    c = kernel.denoiser(tokens, float(kernel.times[k])).exp()
    decoded = torch.isfinite(confidence)
    share = torch.where(decoded, torch.softmax(-confidence, -1), 0.0).nan_to_num(0.0)
    rows = torch.zeros(*tokens.shape, mask + 1, dtype=torch.float64)
    for site in np.ndindex(tuple(tokens.shape)):
        if tokens[site] == mask:
            rows[site][:mask] = c[site] * (b - a) / (1 - a)
            rows[site][mask] = (1 - b) / (1 - a)
        else:
            sigma = share[site] * sigma_k
            rows[site][tokens[site]] += 1 - sigma
            rows[site][mask] += sigma
    return rows


def random_carry(kernel, rows=30, length=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mask = kernel.process.vocab_size
    tokens = torch.randint(mask + 1, (rows, length), generator=generator)
    confidence = torch.rand(rows, length, generator=generator, dtype=torch.float64)
    prompt = torch.rand(rows, length, generator=generator) < 0.3
    confidence[(tokens == mask) | prompt] = torch.inf
    return {"tokens": tokens, CONFIDENCE: confidence}


@pytest.mark.parametrize("options", [{}, {"kappa": 0.3}, {"kappa": 1.0}], ids=str)
def test_steps_equal_the_published_definition(options):
    kernel = make(num_steps=4, **options)
    carry = random_carry(kernel)
    for k in range(4):
        rows = dense_remdm_conf(kernel, carry["tokens"], carry[CONFIDENCE], k)
        step = kernel.step(carry, k)
        torch.testing.assert_close(step.dense_log_probs().exp(), rows, rtol=0, atol=1e-12)


def test_definition_has_power():
    """Spreading evenly, which ignores the confidences, is far outside the tolerance."""
    kernel = make(num_steps=4)
    carry = random_carry(kernel)
    even = {**carry, CONFIDENCE: torch.where(torch.isfinite(carry[CONFIDENCE]), 0.5, torch.inf)}
    right, wrong = (kernel.step(c, 2).dense_log_probs().exp() for c in (carry, even))
    assert float((right - wrong).abs().max()) > 0.02


def test_least_confident_is_masked_first():
    kernel = make(num_steps=4)
    carry = {"tokens": torch.tensor([[0, 1]]), CONFIDENCE: torch.tensor([[0.9, 0.1]]).double()}
    kappa = kernel.site_kappa(carry, 2)[0]
    assert kappa[1] < kappa[0]


def all_paths(kernel, length):
    states = list(itertools.product(range(kernel.process.num_states), repeat=length))
    paths = itertools.product(states, repeat=kernel.num_steps)
    start = [(kernel.process.vocab_size,) * length]
    return torch.tensor([start + list(path) for path in paths])


@pytest.mark.parametrize("prompt", [None, torch.tensor([1, -1])], ids=["free", "prompt"])
def test_path_density_is_normalised_and_sampled(prompt):
    """Sum over all paths, and chi-square of 20000 sampled paths at level 1e-4."""
    chain = ReverseChain(make(), 2, prompt=prompt)
    paths = all_paths(chain.kernel, 2)
    if prompt is not None:
        paths[:, 0, 0] = 1
    probs = chain.log_prob(paths).exp()
    assert float(probs.sum()) == pytest.approx(1, abs=1e-12)
    drawn = chain.sample((20_000,), generator=torch.Generator().manual_seed(0))
    index = state_index(drawn.flatten(1), 3)
    order = state_index(paths.flatten(1), 3)
    position = torch.full((3**8,), -1)
    position[order] = torch.arange(len(paths))
    counts = torch.bincount(position[index], minlength=len(paths))
    assert chi_square_p_value(counts, probs) > 1e-4
    remasked = (drawn[:, :-1] < MASK) & (drawn[:, 1:] == MASK)
    assert bool(remasked.any())
    if prompt is not None:
        assert not bool(remasked[..., 0].any())


@pytest.mark.parametrize("remembers", [True, False])
def test_particles_carry_their_confidences(remembers):
    """``E[Z_hat] = Z`` of enumerated paths with resampling, 4.5 s.e. (7e-6); forgetting is seen."""

    class Forgetful(ConfidenceKernel):
        def advance(self, carry, tokens, k, *, step=None):
            moved = super().advance(carry, tokens, k, step=step)
            return {**moved, CONFIDENCE: torch.full_like(moved[CONFIDENCE], torch.inf)}

    right = make(kappa=-0.1, times=[1.0, 0.5, 0.5, 0.5, 0.0])
    potential = toy_potential(MASK, scale=2.0)
    paths = all_paths(right, 2)
    probs = ReverseChain(right, 2).log_prob(paths).exp()
    clean = (paths[:, -1] < MASK).all(-1)
    evidence = float((probs[clean] * potential(paths[clean, -1]).exp()).sum())
    kind = ConfidenceKernel if remembers else Forgetful
    kernel = kind(right.process, right.denoiser, times=right.times, kappa=right.kappa)
    generator = torch.Generator().manual_seed(0)
    fk = FeynmanKac(ReverseChain(kernel, 2), potential, twist="argmax")
    post = run_smc(fk, 4, 3000, generator=generator, store_path=False, ess_threshold=0.9)
    z = z_score(post.log_evidence.exp() / evidence, 1.0)
    assert (abs(z) < 4.5) == remembers


def test_sampled_density_equals_replayed_density():
    chain = ReverseChain(make(num_steps=5, length=3, vocab=3), 3)
    path = chain.sample((200,))
    torch.testing.assert_close(chain.log_prob(path), chain.log_prob(path.clone()))


def test_carry_remembers_probabilities_of_decoding():
    """Set where a mask becomes a token, kept while it stays, forgotten when it is masked."""
    kernel = make(num_steps=5)
    carry = kernel.init_carry((1,), 2)
    assert bool(torch.isinf(carry[CONFIDENCE]).all())
    step = kernel.step(carry, 0)
    carry = kernel.advance(carry, torch.tensor([[1, MASK]]), 0, step=step)
    first = kernel.denoiser(torch.tensor([[MASK, MASK]]), 1.0).exp()[0, 0, 1]
    assert float(carry[CONFIDENCE][0, 0]) == pytest.approx(float(first), abs=1e-12)
    assert torch.isinf(carry[CONFIDENCE][0, 1])
    moved = kernel.advance(carry, torch.tensor([[1, 0]]), 1)
    second = kernel.denoiser(torch.tensor([[1, MASK]]), 0.8).exp()[0, 1, 0]
    expected = torch.stack([first, second])[None]
    torch.testing.assert_close(moved[CONFIDENCE], expected, rtol=0, atol=1e-12)
    gone = kernel.advance(moved, torch.tensor([[MASK, 0]]), 2)
    assert torch.isinf(gone[CONFIDENCE][0, 0])
    assert float(gone[CONFIDENCE][0, 1]) == pytest.approx(float(second), abs=1e-12)


def test_step_in_hand_saves_the_network_call():
    """A chain costs at most one call per step, with the step in hand; the last needs none."""
    kernel = make(num_steps=4)
    counter = CountingDenoiser(kernel.denoiser)
    kernel = kernel.with_denoiser(counter)
    ReverseChain(kernel, 2).sample((50,))
    assert counter.calls == 4
    carry = kernel.init_carry((50,), 2)
    before = counter.calls
    kernel.advance(carry, torch.zeros(50, 2, dtype=torch.int64), 3)
    assert counter.calls == before
    kernel.advance(carry, torch.zeros(50, 2, dtype=torch.int64), 2)
    assert counter.calls == before + 1


class Narrow:
    """A network of two hidden units and six tokens."""

    vocab_size, kind, time_free, hidden_size = 6, "cavity", True, 2

    def hidden(self, tokens, t):
        return torch.stack([tokens.sin(), tokens.flip(-1).cos()], -1)

    def head(self, rows):
        weight = torch.linspace(-2, 2, 12, dtype=torch.float64).reshape(2, 6)
        return (rows.double() @ weight).log_softmax(-1)

    def __call__(self, tokens, t):
        return self.head(self.hidden(tokens, t))


def test_sparse_heads_give_the_same_confidences():
    """The head runs for the decoded positions only; the table gives the same numbers."""
    kernel = ConfidenceKernel(Absorbing(6), Narrow(), num_steps=3)
    carry = kernel.init_carry((50,), 4)
    step = kernel.step(carry, 0)
    assert isinstance(step.prediction, HeadPrediction)
    tokens = step.sample()
    table = step.with_log_probs(step.log_probs)
    sparse, dense = (kernel.advance(carry, tokens, 0, step=s)[CONFIDENCE] for s in (step, table))
    assert bool(torch.isfinite(sparse).any())
    torch.testing.assert_close(sparse, dense, rtol=0, atol=1e-14)


def test_without_remasking_it_is_the_ancestral_kernel():
    kernel = make(num_steps=4, kappa=1.0)
    plain = InterpolatingKernel(kernel.process, kernel.denoiser, num_steps=4)
    uniforms = torch.rand(2, 30, 2, dtype=torch.float64)
    carry = random_carry(kernel)
    for k in range(4):
        mine, theirs = kernel.step(carry, k), plain.step({"tokens": carry["tokens"]}, k)
        assert torch.equal(mine.draw(*uniforms), theirs.draw(*uniforms))


def test_default_remasks_as_much_as_a_marginal_allows():
    kernel = make(num_steps=8)
    a, b = kernel.alphas[:-1], kernel.alphas[1:]
    sigma = (1 - kernel.kappa) * (1 - b)
    ratio = np.divide(1 - b, a, out=np.ones(8), where=a > 0)
    np.testing.assert_allclose(sigma, np.minimum(1, ratio), atol=1e-12)


def test_takes_psi_schedules():
    process = Absorbing(MASK)
    psi = remdm_loop(process.schedule, 20, eta=0.05)
    kernel = ConfidenceKernel(process, make().denoiser, psi=psi)
    np.testing.assert_array_equal(kernel.times, psi.times)
    again = kernel.with_denoiser(kernel.denoiser)
    assert again.same_as(kernel)
    assert not again.same_as(make(num_steps=20))


def test_says_what_it_is():
    kernel = make()
    assert kernel.capability == FACTORISED
    assert kernel.markov is False
    assert InterpolatingKernel.markov is True
    assert "ConfidenceKernel(Absorbing(" in repr(kernel)


def test_other_processes_are_refused():
    process = Uniform(3)
    denoiser = TableDenoiser(random_joint(3, 2), process)
    with pytest.raises(CapabilityError, match="cannot; use an Absorbing process"):
        ConfidenceKernel(process, denoiser, num_steps=3)
