"""Hidden states of a pretrained encoder: pooling, padding, and files, on a tiny random BERT."""

import sys

import pytest
import torch
from tiny_bert import save_tiny_bert, tiny_bert

from ppl_diffusion.denoisers.hidden_states import HiddenStatesEncoder, pooled
from ppl_diffusion.denoisers.latent_config import LatentConfig
from ppl_diffusion.denoisers.latent_transformer import LatentTransformer

transformers = pytest.importorskip("transformers")

LETTERS, L, N, D = "ACGT-", 8, 3, 4


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """Return a folder with a tiny random BERT over letters, and its tokeniser."""
    model = tiny_bert(transformers, "BertModel", max_position_embeddings=L)
    return save_tiny_bert(transformers, tmp_path_factory.mktemp("bert"), model)


@pytest.fixture
def encoder(bert):
    return HiddenStatesEncoder.from_pretrained(
        bert, LETTERS, num_slots=N, dim=D, left_out="-", local_files_only=True
    )


def test_slots_are_means_of_hidden_states(encoder):
    tokens = torch.randint(4, (2, 6))
    vectors = encoder(tokens)
    ids = torch.tensor([8, 7, 6, 5])[tokens]  # A, C, G, T of the model
    states = encoder.model(input_ids=ids).last_hidden_state[..., :D]
    means = torch.stack([states[:, 0:2].mean(1), states[:, 2:4].mean(1), states[:, 4:6].mean(1)], 1)
    wanted = 2.0 * torch.nn.functional.normalize(means, dim=-1)
    torch.testing.assert_close(vectors, wanted)


def test_what_is_left_out_does_not_matter(encoder):
    row = torch.tensor([[0, 1, 2, 3, 0]])
    padded = torch.tensor([[0, 1, 2, 3, 0, 4, 4]])
    torch.testing.assert_close(encoder(padded), encoder(row))
    other = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    seen = torch.arange(7)[None] < 5
    torch.testing.assert_close(encoder(other, seen), encoder(row))


def test_pooling_is_adaptive():
    """On whole rows it is that of torch."""
    for length in (3, 4, 5, 7, 9):
        states = torch.randn(2, length, D)
        seen = torch.ones(2, length, dtype=torch.bool)
        wanted = torch.nn.functional.adaptive_avg_pool1d(states.mT, N).mT
        torch.testing.assert_close(pooled(states, seen, N), wanted)


def test_short_sequences_share_tokens_and_empty_ones_are_zero(encoder):
    states, seen = torch.randn(1, 4, D), torch.tensor([[True, False, True, False]])
    both = pooled(states, seen, 3)[0]
    torch.testing.assert_close(both[0], states[0, 0])
    torch.testing.assert_close(both[1], states[0, [0, 2]].mean(0))
    torch.testing.assert_close(both[2], states[0, 2])
    assert torch.all(encoder(torch.full((1, 3), 4)) == 0)


def test_it_is_saved_with_the_network_and_never_moves(encoder, tmp_path):
    config = LatentConfig(len(LETTERS), L, N, num_codes=5, latent_dim=D, dim=16, depth=1, heads=2)
    network = LatentTransformer(config, encoder=encoder).train()
    x0 = torch.randint(5, (6, L))
    assert torch.equal(encoder(x0), network.encoder(x0))
    assert not network.encoder.model.training
    network.save_pretrained(tmp_path)
    again = LatentTransformer.from_pretrained(tmp_path)
    assert again.config == network.config
    assert torch.equal(again.encode(x0), network.encode(x0))
    torch.testing.assert_close(again.encoder(x0), encoder(x0))
    assert not any(p.requires_grad for p in again.encoder.parameters())


def test_wrong_requests_are_refused(bert):
    with pytest.raises(ValueError, match="'-' is no token of the model"):
        HiddenStatesEncoder.from_pretrained(bert, LETTERS, num_slots=N, dim=D)
    with pytest.raises(ValueError, match="16 hidden coordinates, fewer than the 17"):
        HiddenStatesEncoder.from_pretrained(bert, "ACGT", num_slots=N, dim=17)


def test_a_missing_library_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'ppl-diffusion\[adapters\]'"):
        HiddenStatesEncoder.from_pretrained("x", LETTERS, num_slots=N, dim=D)
