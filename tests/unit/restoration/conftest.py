"""A prior and a codec of four tokens, untrained, and an image of theirs."""

import pytest
import torch

from ppl_diffusion.imaging.codec import CodecConfig, ImageCodec
from ppl_diffusion.imaging.files import write_image
from ppl_diffusion.models import MaskedDiffusion, UniformDiffusion

SHAPE = (1, 8, 8)


@pytest.fixture(scope="session")
def places(tmp_path_factory):
    """Return a folder with ``masked``, ``uniform``, ``codec`` and ``truth.png``."""
    folder = tmp_path_factory.mktemp("restoration")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        codec = ImageCodec(CodecConfig(8, 8, num_bits=2, features=4))
        for parameter in codec.decoder.parameters():
            parameter.data.mul_(2.4)  # untrained decoders paint everything grey
        codec.eval().save(folder / "codec")
        for name, kind in (("masked", MaskedDiffusion), ("uniform", UniformDiffusion)):
            size = {"dim": 16, "depth": 1, "heads": 2}
            kind.build(list("abcd"), 4, name=name, **size).save(folder / name)
        with torch.no_grad():
            write_image(folder / "truth.png", codec.decode(torch.tensor([0, 3, 1, 2])))
    return folder
