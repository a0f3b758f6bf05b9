"""The transformer: shapes, normalisation, time, gathered heads, files."""

import json

import pytest
import torch
from torch.nn import functional as F

from ppl_diffusion.denoisers._blocks import AdaptiveNorm, Attention, Gate, Stem
from ppl_diffusion.denoisers.base import Denoiser
from ppl_diffusion.denoisers.config import TransformerConfig
from ppl_diffusion.denoisers.transformer import Transformer

LENGTH = 10
VARIANTS = {
    "plain": {},
    "timed": {"time_conditioning": True},
    "local": {"stem_width": 3, "conv_width": 5, "learned_positions": True},
}


def make(**shape):
    shape = {"dim": 16, "depth": 2, "heads": 2, "dropout": 0.0, **shape}
    network = Transformer(TransformerConfig(4, 5, LENGTH, **shape)).eval()
    with torch.no_grad():
        # A fresh network starts at the uniform prediction, on which most tests could not fail.
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return network


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def network(request):
    return make(**request.param)


def tokens(*batch):
    return torch.randint(0, 5, (*batch, LENGTH))


def test_is_a_denoiser(network):
    assert isinstance(network, Denoiser)
    assert network.vocab_size == 4
    assert network.kind == "cavity"


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_output_is_normalised_over_clean_tokens_only(network, batch):
    log_probs = network(tokens(*batch), 0.5)
    assert log_probs.shape == (*batch, LENGTH, 4)
    torch.testing.assert_close(log_probs.logsumexp(-1), torch.zeros(*batch, LENGTH))


def test_batch_dimensions_are_independent(network):
    rows = tokens(2, 3)
    together = network(rows, 0.3)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(together[i, j], network(rows[i, j], 0.3))


def test_head_runs_on_gathered_positions(network):
    rows = tokens(6)
    chosen = rows == 4
    hidden = network.hidden(rows, 0.4)
    torch.testing.assert_close(network.head(hidden[chosen]), network(rows, 0.4)[chosen])


def test_time_free_output_ignores_the_time():
    network, rows = make(), tokens(3)
    assert network.time_free
    assert torch.equal(network(rows, 0.1), network(rows, 0.9))


def test_timed_output_follows_each_row_s_own_time():
    network, rows = make(time_conditioning=True), tokens(3)
    times = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    assert not network.time_free
    together = network(rows, times)
    for i, t in enumerate(times.tolist()):
        torch.testing.assert_close(together[i], network(rows[i], t))
    assert not torch.allclose(together[0], network(rows[0], 0.9), atol=1e-3)


def test_sees_both_sides_and_the_order(network):
    rows = tokens(1)
    base = network(rows, 0.5)
    for position in (0, LENGTH - 1):
        changed = rows.clone()
        changed[0, position] = (changed[0, position] + 1) % 5
        assert not torch.allclose(network(changed, 0.5)[0, 5], base[0, 5], atol=1e-5)
    assert not torch.allclose(network(rows.flip(-1), 0.5).flip(-2), base, atol=1e-4)


def test_shorter_sequences_are_read_and_longer_refused(network):
    assert network(tokens(2)[:, :4], 0.5).shape == (2, 4, 4)
    with pytest.raises(ValueError, match="11 tokens, but the network was built for at most 10"):
        network(torch.zeros(1, 11, dtype=torch.int64), 0.5)


def test_float64_default_dtype_changes_nothing():
    torch.set_default_dtype(torch.float64)
    try:
        network = make(time_conditioning=True, stem_width=3, conv_width=3)
        assert {p.dtype for p in network.parameters()} == {torch.float32}
        assert network(tokens(2), torch.rand(2)).dtype == torch.float32
        assert network(tokens(2), 0.25).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_fresh_network_predicts_uniformly():
    network = Transformer(TransformerConfig(4, 5, LENGTH, dim=16, depth=1, heads=2))
    torch.testing.assert_close(network(tokens(2), 0.5).exp(), torch.full((2, LENGTH, 4), 0.25))


def test_round_trip_is_bit_exact(network, tmp_path):
    network.save_pretrained(tmp_path / "a" / "b")
    again = Transformer.from_pretrained(tmp_path / "a" / "b")
    rows = tokens(3)
    assert again.config == network.config
    assert not again.training
    for name, value in network.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    assert torch.equal(again(rows, 0.7), network(rows, 0.7))


def test_reading_leaves_torch_s_generator_alone(tmp_path):
    make().save_pretrained(tmp_path)
    before = torch.get_rng_state()
    Transformer.from_pretrained(tmp_path)
    assert torch.equal(before, torch.get_rng_state())


def test_missing_file_is_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist; give the folder"):
        Transformer.from_pretrained(tmp_path)
    make().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors does not exist"):
        Transformer.from_pretrained(tmp_path)


@pytest.mark.parametrize("text", ["{", '{"vocab_size": 4}', "[1]", '{"colour": "red"}'])
def test_corrupt_config_is_one_sentence(tmp_path, text):
    make().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="is no network configuration"):
        Transformer.from_pretrained(tmp_path)


def test_corrupt_weights_are_one_sentence(tmp_path):
    make().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        Transformer.from_pretrained(tmp_path)


def test_weights_of_another_shape_are_refused(tmp_path):
    make().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "dim": 32}))
    with pytest.raises(ValueError, match="do not fit the configuration beside them"):
        Transformer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_states": 7}, "num_states is 7; give 4"),
        ({"dim": 12, "heads": 4}, "gives no even width"),
        ({"dim": 15}, "gives no even width"),
        ({"stem_width": 2}, "must be odd"),
        ({"conv_width": 4}, "must be odd"),
        ({"kind": "score"}, "choose one of cavity, posterior"),
    ],
)
def test_wrong_configuration_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**{"vocab_size": 4, "num_states": 5, "max_length": 8, **wrong})


def mixtures(*batch, k=3):
    ids = torch.randint(0, 5, (*batch, LENGTH, k))
    return ids, torch.rand(*batch, LENGTH, k)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_one_hot_mixtures_are_the_tokens(network, batch):
    rows = tokens(*batch)
    expected = network.hidden(rows, 0.4)
    ids, _ = mixtures(*batch)
    ids[..., 1] = rows
    sparse = torch.tensor([0.0, 1.0, 0.0]).expand(ids.shape)
    assert torch.equal(network.hidden_mixture(ids, sparse, 0.4), expected)
    dense = torch.nn.functional.one_hot(rows, 5).double()
    torch.testing.assert_close(network.hidden_mixture(None, dense, 0.4), expected)


def test_sparse_and_dense_mixtures_agree(network):
    ids, weights = mixtures(2)
    dense = torch.zeros(2, LENGTH, 5).scatter_add(-1, ids, weights)
    one, other = network.hidden_mixture(ids, weights, 0.4), network.hidden_mixture(None, dense, 0.4)
    torch.testing.assert_close(one, other)
    # An equal mixture of all states is another input than any token: the test can fail.
    assert not torch.allclose(one, network.hidden(ids[..., 0], 0.4), atol=1e-2)


def test_a_mixture_is_the_mean_of_embeddings():
    """The stem is linear: half of one row and half of another is the mean of the two."""
    stem = make(stem_width=5).stem
    pair = tokens(2)
    ids, half = pair.T[None], torch.full((1, LENGTH, 2), 0.5)
    torch.testing.assert_close(stem.mix(ids, half), stem(pair).mean(0, keepdim=True))


def test_gradients_reach_the_weights_of_a_mixture(network):
    ids, weights = mixtures(2)
    weights.requires_grad_()
    network.hidden_mixture(ids, weights, 0.4).square().sum().backward()
    assert bool((weights.grad != 0).all())


def test_mixtures_that_do_not_fit_are_refused(network):
    ids, weights = mixtures(2)
    with pytest.raises(ValueError, match="3 weights for mixtures of 5 states"):
        network.hidden_mixture(None, weights, 0.4)
    with pytest.raises(ValueError, match="2 weights for mixtures of 3 states"):
        network.hidden_mixture(ids, weights[..., :2], 0.4)


@pytest.mark.parametrize("timed", [False, True])
def test_labels_steer_each_row(timed):
    network, rows = make(num_classes=2, time_conditioning=timed), tokens(1).expand(3, LENGTH)
    assert network.time_free is not timed
    together = network(rows, 0.5, torch.tensor([0, 1, 2]))
    for label in range(3):
        torch.testing.assert_close(together[label], network(rows[0], 0.5, label))
        for other in range(label):
            assert not torch.allclose(together[label], together[other], atol=1e-3)
    assert torch.equal(network(rows, 0.5), network(rows, 0.5, 2))


def test_mixtures_take_labels():
    network, rows = make(num_classes=2), tokens(2)
    dense = torch.nn.functional.one_hot(rows, 5)
    hidden = network.hidden_mixture(None, dense, 0.4, torch.tensor([0, 1]))
    torch.testing.assert_close(hidden, network.hidden(rows, 0.4, torch.tensor([0, 1])))


def test_labels_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match=r"a label lies outside 0\.\.2"):
        make(num_classes=2)(tokens(2), 0.5, torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="a network without classes"):
        make()(tokens(2), 0.5, 0)
    with pytest.raises(ValueError, match="num_classes is -1"):
        make(num_classes=-1)


def test_labelled_networks_are_saved_and_old_files_load(tmp_path):
    network, rows = make(num_classes=2), tokens(2)
    network.save_pretrained(tmp_path / "new")
    assert torch.equal(
        Transformer.from_pretrained(tmp_path / "new")(rows, 0.5, 1), network(rows, 0.5, 1)
    )
    plain = make()
    plain.save_pretrained(tmp_path / "old")
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    del config["num_classes"]
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    assert torch.equal(Transformer.from_pretrained(tmp_path / "old")(rows, 0.5), plain(rows, 0.5))


def test_the_hidden_size_is_that_of_the_rows(network):
    assert network.hidden(tokens(2), 0.5).shape == (2, LENGTH, network.hidden_size)


# the parts against their plain forms


def plain_attention(layer, state, rotation):
    """Queries and keys permuted first, then rotated half by half; softmax spelled out."""
    rows, length, dim = state.shape
    split = layer.inputs(state).reshape(rows, length, 3, layer.heads, dim // layer.heads)
    query, key, value = split.permute(2, 0, 3, 1, 4)

    def rotate(x):
        (even, odd), (cosine, sine) = x.chunk(2, dim=-1), rotation.unbind(-1)
        return torch.cat([even * cosine - odd * sine, even * sine + odd * cosine], dim=-1)

    weights = rotate(query) @ rotate(key).mT / (dim // layer.heads) ** 0.5
    mixed = weights.softmax(-1) @ value
    return layer.output(mixed.transpose(1, 2).reshape(rows, length, dim))


def gradients(output, layer, *inputs):
    output.square().sum().backward()
    found = [x.grad.clone() for x in (*inputs, *layer.parameters())]
    for x in (*inputs, *layer.parameters()):
        x.grad = None
    return found


def test_attention_is_the_plain_one_to_rounding():
    """Rotated in pairs that lie side by side: float32 sums in another order, no more."""
    network = make(dim=24, heads=3)
    layer = network.blocks[0].branches[0]
    assert isinstance(layer, Attention)
    state = torch.randn(6, LENGTH, 24, requires_grad=True)
    new, old = layer(state, network.rotation), plain_attention(layer, state, network.rotation)
    torch.testing.assert_close(new, old, rtol=1e-5, atol=1e-5)
    pairs = zip(gradients(new, layer, state), gradients(old, layer, state), strict=True)
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    flat = torch.zeros_like(network.rotation)
    flat[..., 0] = 1.0
    assert not torch.allclose(layer(state, flat), new, atol=1e-3)


@pytest.mark.parametrize("rows", [1, 5])
def test_conditioned_norm_and_gate_are_the_plain_ones(rows):
    """With one condition for all rows the layer norm takes scale and shift itself."""
    norm, gate = AdaptiveNorm(16, conditioned=True), Gate(16, conditioned=True)
    for parameter in (*norm.parameters(), *gate.parameters()):
        torch.nn.init.normal_(parameter)
    state, branch = torch.randn(2, 5, LENGTH, 16)
    condition = torch.randn(rows, 1, 16, requires_grad=True)
    scale, shift = norm.modulation(condition).chunk(2, dim=-1)
    expected = F.layer_norm(state, (16,)) * (1 + scale) + shift
    found = norm(state, condition)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    pairs = zip(
        gradients(found, norm, condition), gradients(expected, norm, condition), strict=True
    )
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    gated = state + branch * gate.modulation(condition)
    torch.testing.assert_close(gate(state, branch, condition), gated, rtol=1e-5, atol=1e-5)


def test_embeddings_are_summed_in_order():
    stem = make(stem_width=3, learned_positions=True).stem
    assert isinstance(stem, Stem)
    z = tokens(4)
    padded, before = F.pad(z, (1, 1), value=5), [table.weight.clone() for table in stem.tables]
    first, second, third = (t(padded[:, i : i + LENGTH]) for i, t in enumerate(stem.tables))
    assert torch.equal(stem(z), first + second + third + stem.positions)
    assert all(torch.equal(t.weight, w) for t, w in zip(stem.tables, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_networks_are_near_the_wide_one(network, dtype):
    x = tokens(6)
    expected = network.hidden(x, 0.5)
    hidden = network.to(dtype).hidden(x, 0.5)
    assert hidden.dtype == dtype
    # Roundings to eight bits, .004 of a number each, through two blocks.
    assert (hidden - expected).norm() < 0.05 * expected.norm()
    assert network(x, 0.5).dtype == torch.float32
