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


def test_a_token_is_inside_if_one_of_its_pixels_is(codec):
    assert Block(0, 0, 4, 4).tokens(codec).tolist() == [True, False, False, False, False, False]
    assert Block(0, 3, 8, 2).tokens(codec).tolist() == [True, True, False] * 2
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
