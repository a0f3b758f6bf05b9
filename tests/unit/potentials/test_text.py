"""Classifiers as potentials of embeddings, and those of other people on a tiny random BERT."""

import pytest
import torch
from tiny_bert import save_tiny_bert, tiny_bert

from ppl_diffusion.potentials import ClassifierReward, PretrainedClassifier
from ppl_diffusion.testing import PotentialContract

transformers = pytest.importorskip("transformers")

LETTERS = "ACGT-"


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """Return a folder with a tiny random classifier over letters, and its tokeniser."""
    options = {"num_labels": 3, "initializer_range": 0.5}
    model = tiny_bert(transformers, "BertForSequenceClassification", **options)
    return save_tiny_bert(transformers, tmp_path_factory.mktemp("bert"), model)


@pytest.fixture
def classifier(bert):
    return PretrainedClassifier.from_pretrained(bert, LETTERS, padding="-", local_files_only=True)


def toy_reward(**options):
    table = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(3, 2, generator=torch.Generator().manual_seed(1))
    return ClassifierReward(lambda e: e.mean(-2) @ weight.to(e), table, 1, **options)


class TestToyReward(PotentialContract):
    tolerance = 1e-6

    def make_potential(self):
        return toy_reward()

    def make_sequences(self):
        return torch.randint(4, (24, 6), generator=torch.Generator().manual_seed(3))


def test_the_reward_is_the_log_probability_over_the_temperature():
    rows = torch.randint(4, (5, 6), generator=torch.Generator().manual_seed(2))
    warm, cold = toy_reward(), toy_reward(temperature=0.25)
    log_p = warm.logits(warm.codebook[rows]).log_softmax(-1)[:, 1].double()
    torch.testing.assert_close(warm(rows), log_p)
    torch.testing.assert_close(cold(rows), 4 * log_p)


def test_wrong_rewards_are_refused():
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        toy_reward(temperature=0.0)
    table = torch.zeros(4, 3)
    with pytest.raises(ValueError, match="label must be a class from 0 up, got -1"):
        ClassifierReward(lambda e: e.sum(-2), table, -1)
    for label in ("good", 1.7):
        with pytest.raises(ValueError, match=f"a class from 0 up, got {label!r}; give its number"):
            ClassifierReward(lambda e: e.sum(-2), table, label)
    with pytest.raises(ValueError, match="has 3 classes and the label is 3; give one from 0 to 2"):
        ClassifierReward(lambda e: e.sum(-2), table, 3).embedded(table[None])


def test_a_pretrained_classifier_says_the_same_at_embeddings_as_at_ids(classifier):
    tokens = torch.tensor([[0, 1, 2, 3, 0], [2, 2, 1, 0, 3]])
    ids = torch.tensor([8, 7, 6, 5])[tokens]  # A, C, G, T of the model
    whole = torch.cat([torch.full((2, 1), 2), ids, torch.full((2, 1), 3)], 1)
    wanted = classifier.model(input_ids=whole).logits
    torch.testing.assert_close(classifier(classifier.codebook[tokens]), wanted)
    reward = classifier.reward(2, temperature=0.5)
    torch.testing.assert_close(reward(tokens), 2 * wanted.log_softmax(-1)[:, 2].double())


def test_nothing_is_seen_behind_the_first_padding(classifier):
    short = torch.tensor([[0, 1, 4, 4, 4], [0, 1, 4, 2, 3]])
    one, other = classifier(classifier.codebook[short])
    torch.testing.assert_close(one, other)
    full = classifier(classifier.codebook[torch.tensor([[0, 1, 2, 2, 3]])])
    assert not torch.allclose(one, full)


def test_a_gradient_reaches_the_embeddings(classifier):
    point = classifier.codebook[torch.tensor([[0, 1, 2]])].clone().requires_grad_(True)
    classifier.reward(0).embedded(point).sum().backward()
    assert point.grad is not None
    assert bool((point.grad.abs().sum(-1) > 0).all())


def test_what_the_model_does_not_know_is_refused(bert, classifier):
    with pytest.raises(ValueError, match="PretrainedClassifier: '-' is no token of the model"):
        PretrainedClassifier.from_pretrained(bert, LETTERS, local_files_only=True)
    with pytest.raises(ValueError, match="the model has the ids 0 to 8, but ours include 9"):
        PretrainedClassifier(classifier.model, [5, 9])
    with pytest.raises(ValueError, match="have the id 5 of the model"):
        PretrainedClassifier(classifier.model, [5, 5])
    with pytest.raises(ValueError, match="padding '_' is not in the vocabulary"):
        PretrainedClassifier.from_pretrained(bert, "ACGT", padding="_", local_files_only=True)
    with pytest.raises(ValueError, match="positions for 12; give at most 10 tokens"):
        classifier(classifier.codebook[torch.zeros(11, dtype=torch.int64)])


def test_a_model_of_another_kind_is_refused(tmp_path):
    folder = save_tiny_bert(transformers, tmp_path, tiny_bert(transformers, "BertForMaskedLM"))
    with pytest.raises(ValueError, match=r"PretrainedClassifier: .* no weights for 'classifier"):
        PretrainedClassifier.from_pretrained(folder, "ACGT", local_files_only=True)


def test_padding_needs_a_model_with_padding(bert, monkeypatch):
    monkeypatch.setattr(transformers.BertTokenizer, "pad_token_id", None, raising=False)
    with pytest.raises(ValueError, match="the model has no padding; choose another"):
        PretrainedClassifier.from_pretrained(bert, LETTERS, padding="-", local_files_only=True)


def test_the_tokeniser_is_looked_for_where_the_model_is(tmp_path):
    model = tiny_bert(transformers, "BertForSequenceClassification")
    save_tiny_bert(transformers, tmp_path / "inside", model)
    found = PretrainedClassifier.from_pretrained(tmp_path, "ACGT", subfolder="inside")
    assert len(found.codebook) == 4
