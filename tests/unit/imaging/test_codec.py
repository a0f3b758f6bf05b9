"""Image codecs: tokens are signs, rows do not see each other, files give back the same bits."""

import math

import pytest
import torch

from ppl_diffusion.denoisers.lfq import (
    commitment,
    imbalance,
    lfq_codebook,
    lfq_ids,
    signs,
    straight_through,
)
from ppl_diffusion.imaging import CodecConfig, ImageCodec


@pytest.fixture(scope="module")
def codec():
    torch.manual_seed(0)
    return ImageCodec(CodecConfig(8, 12, num_bits=3, features=4)).eval()


@pytest.fixture
def images():
    return 2 * torch.rand(5, 2, 1, 8, 12, generator=torch.Generator().manual_seed(1)) - 1


def test_the_first_bit_of_an_id_is_the_most_significant():
    e = torch.tensor([[0.3, -0.2, -0.1], [-1.0, 1.0, 1.0]])
    assert lfq_ids(e).tolist() == [4, 3]
    assert lfq_codebook(3)[4].tolist() == [1.0, -1.0, -1.0]


@pytest.mark.parametrize("num_bits", [1, 6, 8])
def test_ids_are_those_of_the_nearest_codes(num_bits):
    book = lfq_codebook(num_bits)
    assert torch.equal(lfq_ids(book), torch.arange(2**num_bits))
    e = torch.randn(50, num_bits, generator=torch.Generator().manual_seed(0))
    assert torch.equal(lfq_ids(e), torch.cdist(e, book).argmin(-1))
    assert torch.equal(book[lfq_ids(e)], signs(e))


def test_zero_is_minus_one():
    assert signs(torch.tensor([0.0, -0.0, 1e-30])).tolist() == [-1.0, -1.0, 1.0]
    assert lfq_ids(torch.zeros(4, 3)).tolist() == [0, 0, 0, 0]


def test_the_gradient_goes_straight_through():
    e = torch.randn(7, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weight = torch.randn(7, 3, generator=torch.Generator().manual_seed(1))
    quantised = straight_through(e)
    assert torch.equal(quantised, signs(e))
    (gradient,) = torch.autograd.grad((weight * quantised).sum(), e)
    assert torch.equal(gradient, weight)


def test_commitment_is_the_distance_to_the_codes():
    e = torch.tensor([[0.5, -1.0], [-0.5, 1.0]], requires_grad=True)
    loss = commitment(e)
    assert loss.item() == pytest.approx((0.25 + 0.25) / 4)
    (gradient,) = torch.autograd.grad(loss, e)
    assert torch.equal(gradient, torch.tensor([[-0.25, 0.0], [0.25, 0.0]]))


def test_bits_in_balance_lack_nothing():
    even = torch.tensor([[0.9, -0.2], [-0.9, 0.2]])
    assert float(imbalance(even)) == pytest.approx(0.0, abs=1e-6)
    assert float(imbalance(torch.ones(5, 3))) == pytest.approx(math.log(2), abs=1e-4)
    one = torch.tensor([[1.0, 0.5], [-1.0, 0.5]])  # of two bits one is +1 three times out of four
    lacking = math.log(2) + 0.75 * math.log(0.75) + 0.25 * math.log(0.25)
    assert float(imbalance(one)) == pytest.approx(lacking / 2, abs=1e-4)


def test_shapes_and_leading_dimensions(codec, images):
    tokens = codec.encode(images)
    assert codec.length == 6
    assert codec.vocab_size == 8
    assert tokens.shape == (5, 2, 6)
    assert tokens.dtype == torch.int64
    assert codec.decode(tokens).shape == images.shape
    assert codec.encode(images[0, 0]).shape == (6,)
    assert torch.equal(codec.encode(images[0, 0]), tokens[0, 0])
    assert codec.decode(tokens[:0]).shape == (0, 2, 1, 8, 12)


def test_decoding_reads_the_codebook(codec, images):
    tokens = codec.encode(images)
    assert torch.equal(codec.decode(tokens), codec.decode_embedded(codec.codebook[tokens]))
    assert torch.equal(codec(images), codec.decode(tokens))


def test_rows_do_not_see_each_other(codec, images):
    tokens = codec.encode(images)
    alone = torch.stack([codec.decode(row) for row in tokens.flatten(0, 1)])
    torch.testing.assert_close(codec.decode(tokens).flatten(0, 1), alone, rtol=0, atol=1e-6)


def test_tokens_stand_in_the_order_of_rows(codec):
    """What changes on the left is seen and shown on the left: columns 0 and 2 of the grid."""
    dark = -torch.ones(1, 8, 12)
    bright = dark.clone()
    bright[:, :, :3] = 1.0
    moved = (codec.latents(bright) - codec.latents(dark)).abs().sum(-1).reshape(2, 3)
    assert moved[:, 0].min() > moved[:, 2].max()
    off = -torch.ones(6, 3)
    on = off.clone()
    on[[0, 3]] = 1.0
    moved = (codec.decode_embedded(on) - codec.decode_embedded(off)).abs()[0]
    assert moved[:, :4].mean() > moved[:, 8:].mean()


def test_images_differentiate_between_codes(codec):
    e = torch.zeros(3, 6, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(codec.decode_embedded(e).square().sum(), e)
    assert bool(gradient.isfinite().all())
    assert bool((gradient.abs().sum(-1) > 0).all())


def test_a_saved_codec_comes_back_bit_by_bit(codec, images, tmp_path):
    codec.save(tmp_path)
    state = torch.random.get_rng_state()
    again = ImageCodec.load(tmp_path)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert again.config == codec.config
    assert not again.training
    assert not any(p.requires_grad for p in again.parameters())
    assert torch.equal(again.latents(images), codec.latents(images))
    again.save(tmp_path / "twice")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "twice" / name).read_bytes()


def test_bad_shapes_are_refused(codec):
    with pytest.raises(ValueError, match=r"it reads \(\*n, 1, 8, 12\)"):
        codec.encode(torch.zeros(1, 8, 8))
    with pytest.raises(ValueError, match="6 tokens an image"):
        codec.decode(torch.zeros(5, dtype=torch.int64))
    with pytest.raises(ValueError, match="multiples of 4"):
        CodecConfig(10, 12)
    with pytest.raises(ValueError, match="at most 16 bits"):
        CodecConfig(8, 12, num_bits=17)
    with pytest.raises(FileNotFoundError, match="ImageCodec"):
        ImageCodec.load("nowhere")
