"""Blocks of images: which tokens they cover, what is held, and the pixels outside."""

import pytest
import torch

from ppl_diffusion.imaging import Block, ImageCodec, block_prompt, outside_pixels
from ppl_diffusion.imaging.codec import CodecConfig


@pytest.fixture(scope="module")
def codec():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ImageCodec(CodecConfig(8, 12, num_bits=3, features=4)).requires_grad_(False).eval()


@pytest.fixture
def image(codec):
    tokens = torch.randint(8, (6,), generator=torch.Generator().manual_seed(0))
    return codec.decode(tokens).clamp(-1, 1)


def test_a_token_is_inside_if_its_pixels_are(codec):
    assert Block(0, 0, 4, 4).tokens(codec).tolist() == [True, False, False, False, False, False]
    assert Block(0, 0, 8, 8).tokens(codec).tolist() == [True, True, False] * 2
    assert int(Block(2, 5, 3, 6).pixels(codec).sum()) == 18


def test_a_prompt_holds_the_tokens_outside(codec, image):
    prompt = block_prompt(codec, image, Block(0, 4, 8, 4))
    tokens = codec.encode(image)
    assert prompt.tolist() == [tokens[0], -1, tokens[2], tokens[3], -1, tokens[5]]


def test_the_likelihood_reads_the_pixels_outside_alone(codec, image):
    block = Block(0, 4, 8, 4)
    measured = outside_pixels(codec, image, block, 0.1)
    other = image.clone()
    other[:, :, 4:8] = 0.3
    points = codec.codebook[torch.randint(8, (5, 6))]
    same = outside_pixels(codec, other, block, 0.1)
    torch.testing.assert_close(measured.embedded(points), same.embedded(points))
    residual = (codec.decode_embedded(points) - image)[..., ~block.pixels(codec)]
    torch.testing.assert_close(measured.residual(points), -residual.flatten(1))


@pytest.mark.parametrize("block", [(0, 0, 0, 4), (-1, 0, 4, 4), (4, 8, 4, 5), (0, 0, 9, 4)])
def test_blocks_outside_of_the_image_are_refused(codec, block):
    with pytest.raises(ValueError, match="block of an image of 8 x 12 pixels"):
        Block(*block).pixels(codec)


@pytest.mark.parametrize(
    ("block", "nearest"),
    [
        ((3, 0, 5, 4), (4, 0, 4, 4)),
        ((0, 3, 8, 2), (0, 0, 8, 4)),
        ((1, 0, 2, 4), (0, 0, 4, 4)),
        ((5, 1, 2, 10), (4, 0, 4, 12)),
        ((2, 6, 4, 4), (0, 4, 8, 8)),
    ],
)
def test_a_block_that_cuts_through_tokens_is_refused(codec, image, block, nearest):
    with pytest.raises(ValueError, match="cuts through patches of 4 x 4 pixels") as refusal:
        block_prompt(codec, image, Block(*block))
    assert str(Block(*nearest)) in str(refusal.value)
    assert Block(*nearest).tokens(codec).any()


def test_without_pixels_outside_there_is_no_likelihood(codec, image):
    with pytest.raises(ValueError, match="is the whole image, so that no pixel is kept"):
        outside_pixels(codec, image, Block(0, 0, 8, 12), 0.1)


def test_images_of_another_range_are_refused(codec, image):
    block = Block(0, 4, 8, 4)
    block_prompt(codec, 1.2 * image, block)
    with pytest.raises(ValueError, match="values from 0 to 255, but the codec reads -1 to 1"):
        block_prompt(codec, torch.arange(96.0).reshape(1, 8, 12) / 95 * 255, block)
    with pytest.raises(ValueError, match="codec reads -1 to 1"):
        block_prompt(codec, image * float("nan"), block)
