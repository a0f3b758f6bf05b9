"""The distribution contract on every distribution of the package."""

import pytest
import torch

from ppl_diffusion.denoisers.prediction import HeadPrediction
from ppl_diffusion.distributions import RevealStep, ReverseChain, StateStep, TokenStep
from ppl_diffusion.kernels import (
    Absorbing,
    ExtrapolatedKernel,
    LatentKernel,
    OrderedKernel,
    Path,
    Uniform,
)
from ppl_diffusion.testing import DistributionContract, toy_chain
from ppl_diffusion.testing.latent_toys import corr_bits


class TestMaskedChain(DistributionContract):
    def make_distribution(self):
        return toy_chain("absorbing", num_steps=2)


class TestUniformChain(DistributionContract):
    def make_distribution(self):
        return toy_chain("uniform", num_steps=2)


class TestPromptedChain(DistributionContract):
    def make_distribution(self):
        return toy_chain("absorbing", num_steps=2, prompt=torch.tensor([-1, 1]))


class TestBatchOfChains(DistributionContract):
    batch_shape = (2, 1)

    def make_distribution(self):
        return toy_chain("absorbing", num_steps=1).expand(self.batch_shape)


class TestMarginal(DistributionContract):
    def make_distribution(self):
        return toy_chain("uniform", num_steps=2).marginal()


class TestBatchOfMarginals(DistributionContract):
    batch_shape = (2, 1)

    def make_distribution(self):
        return toy_chain("absorbing", num_steps=2).marginal().expand(self.batch_shape)


class TestMaskedStep(DistributionContract):
    batch_shape = (2, 1)

    def make_distribution(self):
        tokens = torch.tensor([[[3, 3, 1]], [[0, 3, 3]]])
        log_probs = torch.randn(2, 1, 3, 3).log_softmax(-1)
        return TokenStep(Absorbing(3), tokens, log_probs, 0.2, 0.6, 0.9)


class TestUniformStep(DistributionContract):
    def make_distribution(self):
        log_probs = torch.randn(3, 4).log_softmax(-1)
        return TokenStep(Uniform(4), torch.tensor([3, 0, 1]), log_probs, 0.2, 0.6)


class TestStepWithFixedPositions(DistributionContract):
    batch_shape = (2,)

    def make_distribution(self):
        tokens, fixed = torch.tensor([[3, 3], [0, 3]]), torch.tensor([True, False])
        log_probs = torch.randn(2, 2, 3).log_softmax(-1)
        return TokenStep(Absorbing(3), tokens, log_probs, 0.2, 0.6, fixed=fixed)


class TestStepWithBroadcastArguments(DistributionContract):
    batch_shape = (2, 3)

    def make_distribution(self):
        tokens = torch.randint(3, (2, 1, 2))
        return TokenStep(Uniform(3), tokens, torch.randn(3, 2, 3).log_softmax(-1), 0.2, 0.6)


def ordered_chain(length=2, prompt=None, vocab_size=3, **options):
    masked = toy_chain("absorbing", vocab_size=vocab_size, length=length).kernel
    kernel = OrderedKernel(masked.process, masked.denoiser, length=length, **options)
    return ReverseChain(kernel, length, prompt=prompt)


class TestFirstHitting(DistributionContract):
    def make_distribution(self):
        return ordered_chain()


class TestBlocks(DistributionContract):
    def make_distribution(self):
        return ordered_chain(3, vocab_size=2, group_size=2, block=2)


class TestPromptedOrder(DistributionContract):
    batch_shape = (2, 1)

    def make_distribution(self):
        return ordered_chain(prompt=torch.tensor([-1, 1])).expand(self.batch_shape)


class TestFirstHittingMarginal(DistributionContract):
    def make_distribution(self):
        return ordered_chain(3).marginal()


class TestExtrapolatedChain(DistributionContract):
    def make_distribution(self):
        masked = toy_chain("absorbing").kernel
        return ReverseChain(ExtrapolatedKernel(masked.process, masked.denoiser, num_steps=2), 2)


def latent_chain(path, code=None):
    """A chain of two bits and a code beside them."""
    bits = Absorbing(2)
    kernel = LatentKernel(bits, bits, corr_bits(0.2).denoiser(), path)
    return ReverseChain(kernel, 2)


class TestTokensAndCodeAtOnce(DistributionContract):
    def make_distribution(self):
        return latent_chain(Path.joint(2))


class TestCodeFirst(DistributionContract):
    batch_shape = (2, 1)

    def make_distribution(self):
        return latent_chain(Path.sequential(1, 1)).expand(self.batch_shape)


class TestRevealStep(DistributionContract):
    batch_shape = (2, 1)

    def make_distribution(self):
        tokens = torch.tensor([[[3, 3, 1]], [[0, 3, 3]]])
        log_probs = torch.randn(2, 1, 3, 3).log_softmax(-1)
        return RevealStep(tokens, log_probs, torch.tensor([True, True, False]), 1)


class TestRevealStepOfKnownOrder(DistributionContract):
    batch_shape = (2,)

    def make_distribution(self):
        tokens, fixed = torch.tensor([3, 3, 1]), torch.tensor([True, False, False])
        log_probs, order = torch.randn(3, 3).log_softmax(-1), torch.rand(2, 3)
        eligible = torch.ones(2, 3, dtype=torch.bool)
        return RevealStep(tokens, log_probs.expand(2, 3, 3), eligible, 2, order=order, fixed=fixed)


class TestStateStep(DistributionContract):
    batch_shape = (2, 1)

    def make_distribution(self):
        return StateStep(torch.randn(2, 1, 3, 4), tokens=torch.tensor([3, 0, 1]))


class TestStateStepWithFixedPositions(DistributionContract):
    def make_distribution(self):
        fixed = torch.tensor([False, True, False])
        return StateStep(torch.randn(3, 4), tokens=torch.tensor([3, 0, 1]), fixed=fixed)


def hidden_prediction(*batch, sites=3):
    """Return a prediction of three tokens that is kept as hidden states."""
    hidden = torch.randn(*batch, sites, 3, dtype=torch.float64)
    return HeadPrediction(hidden, lambda rows: rows.log_softmax(-1), 3)


class TestSparseMaskedStep(DistributionContract):
    batch_shape = (2, 1)

    def make_distribution(self):
        tokens = torch.tensor([[[3, 3, 1]], [[0, 3, 3]]])
        kappa = torch.tensor([1.0, 0.9, 0.5], dtype=torch.float64)
        return TokenStep(Absorbing(3), tokens, hidden_prediction(2, 1), 0.2, 0.6, kappa)


class TestSparseUniformStep(DistributionContract):
    batch_shape = (2,)

    def make_distribution(self):
        fixed = torch.tensor([False, True, False])
        tokens = torch.tensor([2, 0, 1])
        return TokenStep(Uniform(3), tokens, hidden_prediction(2), 0.2, 0.6, 0.7, fixed=fixed)


class TestSparseRevealStep(DistributionContract):
    batch_shape = (2, 1)

    def make_distribution(self):
        tokens = torch.tensor([[[3, 3, 1]], [[0, 3, 3]]])
        return RevealStep(tokens, hidden_prediction(2, 1), torch.ones(3).bool(), 1)


class Forgetful(ReverseChain):
    """Scores without broadcasting, and expands to anything."""

    def log_prob(self, value):
        return self._path_log_prob(value.long())

    def expand(self, batch_shape, _instance=None):
        new = Forgetful(self.kernel, self.length)
        new._batch_shape = torch.Size(batch_shape)
        return new


def test_contract_has_power():
    """A ``log_prob`` that forgets to broadcast fails; so does an ``expand`` that un-expands."""
    contract, chain = DistributionContract(), toy_chain(num_steps=1)
    forgetful = Forgetful(chain.kernel, 2)
    with pytest.raises(AssertionError):
        contract.test_small_values_broadcast_against_big_distributions(forgetful)
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        contract.test_expand_refuses_to_shrink(forgetful, (2, 1), (4, 3))
    contract.test_small_values_broadcast_against_big_distributions(chain)


@pytest.mark.parametrize("large", [True, False])
def test_infer_shapes(large):
    chain = toy_chain(num_steps=5, length=4)
    assert chain.infer_shapes(chain.kernel, 4) == (chain.batch_shape, chain.event_shape)
    with pytest.raises(NotImplementedError, match="needs the kernel and the length themselves"):
        type(chain).infer_shapes((), ())
    tokens = (2, 1, 6) if large else (6,)
    batch, event = TokenStep.infer_shapes((), tokens, (3, 6, 5), (), ())
    assert (batch, event) == (((2, 3) if large else (3,)), (6,))
