"""Metrics of restored images against scikit-image and against what they mean."""

import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from ppl_diffusion.imaging.metrics import perceptual, psnr, ssim, unit


def pair(*shape, noise=0.2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    truth = 2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1
    return truth + noise * torch.randn(shape, generator=generator, dtype=torch.float64), truth


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 32, 32)])
def test_psnr_is_that_of_scikit_image_after_clamping(shape):
    images, truth = pair(*shape)
    assert float(images.abs().max()) > 1
    a, b = (np.clip((x.numpy() + 1) / 2, 0, 1) for x in (truth, images))
    peer = peak_signal_noise_ratio(a, b, data_range=1)
    assert float(psnr(images, truth)) == pytest.approx(peer)
    assert float(psnr(truth, truth)) == math.inf


def test_small_images_have_uniform_windows_and_large_ones_gaussian_ones():
    images, truth = pair(1, 16, 16)
    a, b = unit(truth)[0].numpy(), unit(images)[0].numpy()
    peer = structural_similarity(a, b, data_range=1, win_size=7)
    assert float(ssim(images, truth)) == pytest.approx(peer)
    images, truth = pair(1, 32, 32)
    a, b = unit(truth)[0].numpy(), unit(images)[0].numpy()
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    peer = structural_similarity(a, b, data_range=1, win_size=11, **options)
    assert float(ssim(images, truth)) == pytest.approx(peer)


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_batches_are_scored_one_by_one(metric):
    images, truth = pair(2, 3, 1, 16, 16)
    scores = metric(images, truth)
    assert scores.shape == (2, 3)
    assert float(scores[1, 2]) == pytest.approx(float(metric(images[1, 2], truth[1, 2])))
    against_one = metric(images, truth[0, 0])
    assert float(against_one[1, 1]) == pytest.approx(float(metric(images[1, 1], truth[0, 0])))


class Network:
    """Two layers: the image beside its negative, and half of it."""

    def features(self, images):
        wide = torch.cat([images, 1 - images], 1)
        return [wide, torch.nn.functional.avg_pool2d(wide, 2)]


def test_the_perceptual_stand_in_is_a_distance_of_directions():
    images, truth = pair(4, 1, 8, 8)
    found = perceptual(images, truth, Network())
    assert found.shape == (4,)
    expected = []
    for a, b in zip(Network().features(images), Network().features(truth), strict=True):
        u, v = (x / x.norm(dim=1, keepdim=True) for x in (a, b))
        expected.append((u - v).square().sum(1).mean((1, 2)))
    torch.testing.assert_close(found, (expected[0] + expected[1]) / 2)
    assert perceptual(truth, truth, Network()).tolist() == [0.0] * 4
    torch.testing.assert_close(perceptual(images[1], truth[1], Network()), found[1])
