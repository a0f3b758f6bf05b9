"""Style as a reward: statistics of maps, their gradient, and what is refused."""

import pytest
import torch
from torch import nn

from ppl_diffusion.imaging import ImageClassifier, ImageCodec, StyleReward, style_statistics
from ppl_diffusion.imaging.classifier import ClassifierConfig
from ppl_diffusion.imaging.codec import CodecConfig
from ppl_diffusion.testing import PotentialContract


def networks():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        codec = ImageCodec(CodecConfig(8, 8, num_bits=3, features=4))
        classifier = ImageClassifier(ClassifierConfig(8, 8, features=4))
    with torch.no_grad():  # random decoders say almost the same of every token
        for parameter in codec.decoder.parameters():
            parameter.mul_(2.5)
    return codec.requires_grad_(False).eval(), classifier.requires_grad_(False).eval()


def reward(**options):
    codec, classifier = networks()
    reference = codec.decode(torch.tensor([7, 0, 3, 5]))
    return StyleReward(codec, classifier.features, reference, **options)


@pytest.mark.parametrize("statistics", ["moments", "gram"])
class TestStyleReward(PotentialContract):
    tolerance = 1e-4

    @pytest.fixture(autouse=True)
    def _statistics(self, statistics):
        self.statistics = statistics

    def make_potential(self):
        return reward(statistics=self.statistics)

    def make_sequences(self):
        return torch.randint(8, (12, 4), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("statistics", ["moments", "gram"])
def test_the_reference_has_its_own_style_and_others_do_not(statistics):
    style = reward(statistics=statistics)
    rows = torch.cat([torch.tensor([[7, 0, 3, 5]]), torch.randint(8, (20, 4))])
    values = style(rows)
    assert float(values[0]) == pytest.approx(0.0, abs=1e-6)
    assert bool((values[1:] <= 0).all())
    assert bool((values[1:] < -1e-3).any())


def test_statistics_are_those_of_their_formulas():
    maps = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (moments,), (gram,) = (style_statistics([maps], kind) for kind in ("moments", "gram"))
    flat = maps.flatten(-2)
    torch.testing.assert_close(moments[:, :3], flat.mean(-1))
    torch.testing.assert_close(moments[:, 3:].square(), flat.var(-1, unbiased=False) + 1e-6)
    wanted = torch.einsum("nip,njp->nij", flat, flat) / 20
    torch.testing.assert_close(gram.reshape(2, 3, 3), wanted)


def test_where_things_stand_is_forgotten():
    maps = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(1))
    rolled = maps.roll((1, 2), (-2, -1))
    for kind in ("moments", "gram"):
        torch.testing.assert_close(style_statistics([maps], kind), style_statistics([rolled], kind))


def test_the_temperature_divides_the_distance():
    rows = torch.randint(8, (6, 4), generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(reward(temperature=0.1)(rows), 10 * reward(temperature=1.0)(rows))


def test_its_gradient_is_that_of_finite_differences():
    style = reward(temperature=1.0)
    style.codec.double()
    point = torch.randn(1, 4, 3, generator=torch.Generator().manual_seed(3)).double()
    networks_64 = networks()[1].double()
    style.features = networks_64.features
    assert torch.autograd.gradcheck(style.embedded, (point.requires_grad_(True),), atol=1e-5)


def test_what_has_no_style_is_refused():
    codec, classifier = networks()
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        reward(temperature=0.0)
    with pytest.raises(ValueError, match="statistics are 'moments' or 'gram', got 'mean'"):
        reward(statistics="mean")
    dead = nn.Conv2d(1, 2, 1)
    nn.init.constant_(dead.bias, -99.0)
    with pytest.raises(ValueError, match="all features of a layer vanish on the reference"):
        StyleReward(codec, lambda u: [dead(u).relu()], torch.zeros(1, 8, 8), statistics="gram")
    assert classifier.image_shape == codec.image_shape


def test_features_are_a_list_of_maps():
    codec, classifier = networks()
    image = torch.zeros(1, 8, 8)
    with pytest.raises(
        ValueError, match=r"ImageClassifier does not; pass ImageClassifier\.features"
    ):
        StyleReward(codec, classifier, image)
    for wrong in (lambda u: [], lambda u: u, lambda u: [u.flatten()]):
        with pytest.raises(ValueError, match="must return a list of feature maps"):
            StyleReward(codec, wrong, image)
