"""Models of other people, both at once: a masked language model steered by a classifier."""

import pyro
import pytest
import torch

from ppl_diffusion.denoisers import MaskedLanguageModel
from ppl_diffusion.handlers import clamp
from ppl_diffusion.inference import SMC
from ppl_diffusion.models import MaskedDiffusion
from ppl_diffusion.potentials import PretrainedClassifier

transformers = pytest.importorskip("transformers")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "food", "staff"]
OURS = ["food", "staff", "good", "bad"]


@pytest.fixture(scope="module")
def networks():
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=12,
        initializer_range=0.7,
    )
    ids = [WORDS.index(word) for word in OURS]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        denoiser = MaskedLanguageModel(
            transformers.BertForMaskedLM(config), ids, 4, before=[2], after=[3]
        )
        classifier = PretrainedClassifier(
            transformers.BertForSequenceClassification(config), ids, before=[2], after=[3]
        )
    return MaskedDiffusion(denoiser, vocabulary=OURS, length=5, name="bert"), classifier


@pytest.mark.parametrize("method", ["aps", "aps-smc"])
def test_a_prompt_is_kept_and_claims_are_honest(networks, method):
    prior, classifier = networks
    chain = prior.chain(5, prompt=torch.tensor([0, -1, -1, -1, -1]))
    posterior = SMC(chain, classifier.reward(1), method=method, num_particles=8).run(seed=0)
    assert bool((posterior.x0[..., 0] == 0).all())
    assert posterior.exact == (method == "aps-smc")


def test_the_reward_steers(networks):
    prior, classifier = networks
    reward, chain = classifier.reward(1, temperature=0.05), prior.chain(5)
    posterior = SMC(chain, reward, method="aps-smc", num_particles=32).run(seed=0)
    drawn = chain.x0(chain.sample((256,), generator=torch.Generator().manual_seed(0)))
    steered = (posterior.log_weights.exp() * posterior.log_potential).sum()
    assert float(steered) > float(reward(drawn).mean()) + 0.5


def test_words_are_held_by_a_clamp(networks):
    prior, classifier = networks
    reward, chain = classifier.reward(1), prior.chain(5)

    def review():
        x = chain.x0(pyro.sample("path", chain))
        pyro.factor("praise", reward(x))

    held = clamp(
        review, tokens=torch.tensor([1, 0, 0, 0, 3]), mask=torch.tensor([1, 0, 0, 0, 1]) > 0
    )
    for method in ("aps", "aps-smc"):
        posterior = SMC(held, method=method, guide=reward, num_particles=8).run(seed=0)
        assert bool((posterior.x0[..., [0, 4]] == torch.tensor([1, 3])).all())
