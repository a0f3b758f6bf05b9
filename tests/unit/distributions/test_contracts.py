"""The distribution contract on every distribution of the package."""

import pytest
import torch

from ppl_diffusion.distributions import ReverseChain, TokenStep
from ppl_diffusion.kernels import Absorbing, Uniform
from ppl_diffusion.testing import DistributionContract, toy_chain


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
