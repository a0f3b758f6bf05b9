"""The transformer of tokens and a latent: its contract, its two inputs, its files, its encoder."""

import json

import pytest
import torch

from ppl_diffusion.denoisers.base import Denoiser
from ppl_diffusion.denoisers.latent import LatentDenoiser, LatentSpec
from ppl_diffusion.denoisers.latent_config import LatentConfig
from ppl_diffusion.denoisers.latent_transformer import LatentTransformer
from ppl_diffusion.denoisers.quantiser import nearest
from ppl_diffusion.processes import Absorbing
from ppl_diffusion.testing import DenoiserContract

V, L, N, K, D = 4, 7, 3, 5, 2
VARIANTS = {
    "codes": {"num_codes": K},
    "drawn": {"num_codes": K, "quantiser": "gumbel"},
    "vectors": {},
    "plain": {"num_codes": K, "adaptive": False, "stem_width": 3, "learned_positions": True},
    "plain vectors": {"adaptive": False},
}


def make(**shape):
    shape = {"latent_dim": D, "dim": 16, "depth": 2, "heads": 2, "encoder_depth": 1, **shape}
    network = LatentTransformer(LatentConfig(V, L, N, **shape)).eval()
    with torch.no_grad():
        # A fresh network starts at the uniform prediction, on which most tests could not fail.
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return network


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def network(request):
    return make(**request.param)


def tokens(*batch):
    return torch.randint(0, V + 1, (*batch, L))


def latents(network, *batch):
    if network.latent.dim is None:
        return torch.randint(0, K + 1, (*batch, N))
    return torch.randn(*batch, N, D, dtype=torch.float64)


def test_is_a_denoiser_of_both(network):
    assert isinstance(network, Denoiser)
    assert isinstance(network, LatentDenoiser)
    assert network.time_free
    discrete = network.config.num_codes is not None
    assert network.latent == (LatentSpec(N, num_codes=K) if discrete else LatentSpec(N, dim=D))
    assert network.conditions == {"latent": 1 if discrete else 2, "latent_time": 0}


class TestContract(DenoiserContract):
    """As any denoiser, given one latent."""

    length = L

    def make_process(self):
        return Absorbing(V)

    def make_denoiser(self, process):
        return Given(make(num_codes=K))


class Given:
    """A network with a latent that it always reads."""

    vocab_size, kind, time_free = V, "cavity", True

    def __init__(self, network):
        self.network, self.latent = network, latents(network)

    def __call__(self, tokens, t):
        latent = self.latent.expand(*tokens.shape[:-1], N)
        return self.network(tokens, t, latent=latent, latent_time=0.0)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_heads_read_the_rows_of_joint(network, batch):
    z, y = tokens(*batch), latents(network, *batch)
    rows = network.joint(z, 0.5, latent=y, latent_time=0.3)
    assert rows.shape[:-1] == (*batch, L + N)
    log_probs = network.head(rows[..., :L, :])
    assert log_probs.shape == (*batch, L, V)
    torch.testing.assert_close(log_probs.logsumexp(-1), torch.zeros(*batch, L))
    torch.testing.assert_close(log_probs, network(z, 0.1, latent=y, latent_time=0.3))
    hidden = network.hidden(z, 0.5, latent=y, latent_time=0.3)
    assert hidden.shape == (*batch, L, network.hidden_size)
    assert torch.equal(network.head(hidden), log_probs)
    predicted = network.latent_head(rows[..., L:, :])
    assert predicted.shape == (*batch, N, D if network.latent.dim else K)
    if network.latent.dim is None:
        torch.testing.assert_close(predicted.logsumexp(-1), torch.zeros(*batch, N))


def test_rows_of_a_batch_are_independent(network):
    z, y, u = tokens(2, 3), latents(network, 2, 3), torch.rand(2, 3, dtype=torch.float64)
    together = network.joint(z, 0.0, latent=y, latent_time=u)
    for i in range(2):
        for j in range(3):
            alone = network.joint(z[i, j], 0.0, latent=y[i, j], latent_time=u[i, j])
            torch.testing.assert_close(together[i, j], alone, atol=1e-4, rtol=1e-5)  # float32


def test_one_level_for_all_rows_is_the_same_as_many(network):
    z, y = tokens(4), latents(network, 4)
    one = network.joint(z, 0.0, latent=y, latent_time=0.4)
    many = network.joint(z, 0.0, latent=y, latent_time=torch.full((4,), 0.4, dtype=torch.float64))
    torch.testing.assert_close(one, many)


def test_both_predictions_follow_both_inputs(network):
    z, y = tokens(1), latents(network, 1)
    z[0, 0], other = 0, z.clone()
    other[0, 0] = 1
    y2 = latents(network, 1)
    y2[0, 0] = (y[0, 0] + 1) % K
    ours = network.joint(z, 0.0, latent=y, latent_time=0.3)
    for changed in (
        network.joint(other, 0.0, latent=y, latent_time=0.3),
        network.joint(z, 0.0, latent=y2, latent_time=0.3),
        network.joint(z, 0.0, latent=y, latent_time=0.9),
    ):
        for part in (slice(0, L), slice(L, None)):
            assert not torch.allclose(ours[:, part], changed[:, part], atol=1e-4)


def test_the_level_of_the_tokens_is_not_read(network):
    z, y = tokens(2), latents(network, 2)
    first = network.joint(z, 0.1, latent=y, latent_time=0.5)
    assert torch.equal(first, network.joint(z, 0.9, latent=y, latent_time=0.5))


def test_slots_are_told_apart_and_positions_too():
    network = make(num_codes=K)
    y = torch.zeros(1, N, dtype=torch.int64)
    z = torch.full((1, L), V)
    rows = network.joint(z, 1.0, latent=y, latent_time=0.0)[0]
    for a, b in ((0, 1), (0, L - 1), (L, L + 1), (L, L + N - 1)):
        assert not torch.allclose(rows[a], rows[b], atol=1e-3)


def test_fresh_heads_are_uniform_or_the_mean():
    for options in ({"num_codes": K}, {}):
        config = LatentConfig(V, L, N, latent_dim=D, dim=16, depth=1, heads=2, **options)
        network = LatentTransformer(config)
        rows = network.joint(tokens(2), 0.0, latent=latents(network, 2), latent_time=0.2)
        log_probs = network.head(rows[:, :L])
        torch.testing.assert_close(log_probs.exp(), torch.full_like(log_probs, 1 / V))
        predicted = network.latent_head(rows[:, L:])
        wanted = -torch.tensor(float(K)).log() if options else torch.tensor(0.0)
        torch.testing.assert_close(predicted, wanted.expand_as(predicted))


def test_saved_bits_come_back(network, tmp_path):
    network.encoder(torch.randint(V, (9, L)), learn=True)
    network.save_pretrained(tmp_path)
    state = torch.get_rng_state()
    again = LatentTransformer.from_pretrained(tmp_path)
    assert torch.equal(state, torch.get_rng_state())
    assert not again.training
    assert again.config == network.config
    for name, value in network.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    x0, z, y = torch.randint(V, (5, L)), tokens(5), latents(network, 5)
    assert torch.equal(network.encode(x0), again.encode(x0))
    ours = network.joint(z, 0.0, latent=y, latent_time=0.2)
    assert torch.equal(ours, again.joint(z, 0.0, latent=y, latent_time=0.2))


def test_damaged_folders_are_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"LatentTransformer: .* does not exist"):
        LatentTransformer.from_pretrained(tmp_path)
    make(num_codes=K).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 3}))
    with pytest.raises(ValueError, match=r"LatentTransformer: .* is no network configuration"):
        LatentTransformer.from_pretrained(tmp_path)
    make(num_codes=K + 1).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_codes": K}))
    with pytest.raises(ValueError, match="do not fit the configuration beside them"):
        LatentTransformer.from_pretrained(tmp_path)


def test_wrong_shapes_are_refused(network):
    y = latents(network, 2)
    with pytest.raises(ValueError, match=r"a latent of this network ends in"):
        network.joint(tokens(2), 0.0, latent=y[:, :2], latent_time=0.0)
    with pytest.raises(ValueError, match=r"sequences of 8 tokens, but .* at most 7"):
        network.joint(torch.zeros(2, L + 1, dtype=torch.int64), 0.0, latent=y, latent_time=0.0)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"num_slots": 0}, "num_slots is 0; give 1 or more"),
        ({"num_codes": 1}, "num_codes is 1; give 2 or more"),
        ({"quantiser": "fsq"}, "choose one of vq, gumbel"),
        ({"heads": 5}, "gives no even width"),
    ],
)
def test_wrong_shapes_of_networks_are_refused(wrong, text):
    with pytest.raises(ValueError, match=text):
        LatentConfig(V, L, **{"num_slots": N, **wrong})


def test_encoding_is_the_nearest_code_in_any_batch(monkeypatch):
    network, x0 = make(num_codes=K), torch.randint(V, (2, 3, L))
    codes = network.encode(x0)
    assert codes.shape == (2, 3, N)
    assert codes.dtype == torch.int64
    assert len(codes.unique()) > 1
    vectors = network.encoder(x0.reshape(-1, L))
    assert torch.equal(codes.reshape(-1, N), nearest(vectors, network.codebook))
    monkeypatch.setattr(network, "rows_per_call", lambda length: 2)
    assert torch.equal(network.encode(x0), codes)


def test_training_mode_does_not_change_what_is_encoded(network):
    x0 = torch.randint(V, (6, L))
    before = network.encode(x0)
    assert torch.equal(network.train().encode(x0), before)


def test_holes_and_codes_are_read_apart():
    network = make(num_codes=K)
    vectors = network.vectors(torch.tensor([0, K, K - 1]))
    assert torch.equal(vectors[0], network.codebook[0])
    assert torch.equal(vectors[1], network.hole)
    assert torch.equal(vectors[2], network.codebook[K - 1])


def test_standardised_vectors_have_unit_variance_and_running_moments():
    network = make()
    encoder, x0 = network.encoder, torch.randint(V, (400, L))
    for _ in range(3):
        vectors = encoder(x0, learn=True)
    variance = vectors.var(0, correction=0)
    torch.testing.assert_close(variance, torch.ones(N, D), atol=1e-2, rtol=0)
    torch.testing.assert_close(encoder(x0), vectors, atol=1e-4, rtol=1e-4)
