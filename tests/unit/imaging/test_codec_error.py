import pytest
import torch
from torch.distributions import MultivariateNormal

from ppl_diffusion.imaging import CodecConfig, ImageCodec
from ppl_diffusion.imaging.codec_error import CodecError, MeasuredWithError
from ppl_diffusion.imaging.measurement import measure
from ppl_diffusion.imaging.operators import make_operator

SHAPE = (1, 8, 8)
PIXELS = 64


def codec():
    torch.manual_seed(0)
    return ImageCodec(CodecConfig(8, 8, num_bits=2, features=4)).requires_grad_(False).eval()


def error(scale=0.3):
    generator = torch.Generator().manual_seed(1)
    factor = scale * torch.randn(PIXELS, 3, generator=generator)
    mean = 0.1 * torch.randn(PIXELS, generator=generator)
    return CodecError(mean, factor, 0.01 + 0.02 * torch.rand(PIXELS, generator=generator))


def measured(name="sr4", sigma=0.2):
    image = torch.linspace(-1, 1, PIXELS).reshape(SHAPE)
    return measure(make_operator(name, SHAPE), image, sigma)


def joint(seen, decoded):
    """Return the law of (error, y) given decoded images, for a linear operator, in one piece."""
    known = error()
    eye = torch.eye(PIXELS).reshape(PIXELS, *SHAPE)
    zero = seen.operator(torch.zeros(SHAPE))
    matrix = (seen.operator(eye) - zero).mT.double()  # (m, P)
    sigma = known.covariance
    cross = matrix @ sigma
    own = cross @ matrix.mT + seen.sigma**2 * torch.eye(len(seen.y)).double()
    mean = seen.operator(decoded).double() + matrix @ known.mean.double()
    return known, sigma, cross, own, mean


@pytest.mark.parametrize("name", ["sr4", "gblur", "rinp"])
def test_data_given_tokens_have_the_law_of_the_joint_gaussian(name):
    seen, network = measured(name), codec()
    tokens = torch.tensor([[0, 1, 2, 3], [3, 3, 0, 1]])
    decoded = network.decode(tokens)
    _, _, _, own, mean = joint(seen, decoded)
    law = MultivariateNormal(mean, own)
    found = MeasuredWithError(seen, error()).potential(network)(tokens)
    torch.testing.assert_close(found, law.log_prob(seen.y.double()), atol=1e-3, rtol=1e-4)


def test_images_given_tokens_and_data_are_those_of_the_joint_gaussian():
    seen = measured()
    decoded = codec().decode(torch.tensor([[0, 1, 2, 3]]))
    known, sigma, cross, own, mean = joint(seen, decoded)
    gain = torch.linalg.solve(own, cross).mT
    wanted = decoded.flatten() + known.mean + gain @ (seen.y - mean[0])
    left = sigma - gain @ cross
    model = MeasuredWithError(seen, known)
    found = model.expected(decoded).flatten().double()
    torch.testing.assert_close(found, wanted.double(), atol=1e-5, rtol=1e-5)
    num = 20_000
    draws = model.sample(
        decoded.expand(num, *SHAPE), generator=torch.Generator().manual_seed(0)
    ).flatten(1)
    # Each of 64 means and variances within five standard errors: 4e-5 false alarms.
    se = left.diagonal().sqrt() / num**0.5
    assert bool(((draws.mean(0) - wanted).abs() < 5 * se + 1e-6).all())
    ratio = draws.double().var(0) / left.diagonal()
    assert bool(((ratio - 1).abs() < 5 * (2 / num) ** 0.5).all())


def test_an_error_of_nothing_leaves_the_measurement_alone():
    seen, network = measured(), codec()
    nothing = CodecError(torch.zeros(PIXELS), torch.zeros(PIXELS, 1), torch.full((PIXELS,), 1e-12))
    tokens = torch.tensor([[0, 1, 2, 3], [3, 3, 0, 1]])
    found = MeasuredWithError(seen, nothing).potential(network)(tokens)
    torch.testing.assert_close(found, seen.potential(network)(tokens), atol=1e-3, rtol=1e-4)


def test_operators_that_are_not_linear_are_linearised():
    seen, network = measured("hdr"), codec()
    model = MeasuredWithError(seen, error())
    tokens = torch.tensor([[0, 1, 2, 3]])
    assert bool(torch.isfinite(model.potential(network)(tokens)).all())
    assert model.expected(network.decode(tokens)).shape == (1, *SHAPE)


def test_what_is_fitted_is_the_spread_of_held_out_images():
    network = codec()
    images = torch.rand(300, *SHAPE, generator=torch.Generator().manual_seed(3)) * 2 - 1
    found = CodecError.fit(network, images, rank=16)
    with torch.no_grad():
        missed = (images - network(images)).flatten(1).double()
    torch.testing.assert_close(found.mean.double(), missed.mean(0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.covariance.diagonal(), missed.var(0), atol=1e-4, rtol=1e-4)
    assert found.factor.shape == (PIXELS, 16)


def test_one_image_has_no_spread():
    with pytest.raises(ValueError, match="give two or more"):
        CodecError.fit(codec(), torch.zeros(1, *SHAPE))


def test_it_is_saved_and_loaded(tmp_path):
    known = error()
    known.save(tmp_path)
    found = CodecError.load(tmp_path)
    assert torch.equal(found.mean, known.mean)
    assert torch.equal(found.factor, known.factor)
    assert torch.equal(found.variance, known.variance)


def test_a_codec_without_one_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no error\.safetensors"):
        CodecError.load(tmp_path)
