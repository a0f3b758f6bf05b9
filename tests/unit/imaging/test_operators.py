"""Operators against other people's code, and the laws that all of them keep."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from ppl_diffusion.imaging.operators import (
    Operator,
    adjoint,
    make_operator,
    operators,
    register,
)
from ppl_diffusion.imaging.operators.base import OPERATORS
from ppl_diffusion.imaging.operators.blur import gaussian, motion
from ppl_diffusion.imaging.operators.inverses import damped_least_squares

NAMES = ("sr4", "sr2", "gblur", "mblur", "rinp", "box", "hdr", "nlblur", "phase")
LINEAR = ("sr4", "gblur", "mblur", "rinp", "box")
SHAPES = ((1, 16, 16), (3, 32, 32), (2, 12, 20))


def images(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(shape, generator=generator, dtype=torch.float64)
    return scale * (2 * drawn - 1)


def test_the_names_are_those_of_the_benchmark():
    assert {"sr", *NAMES} - {"sr2", "sr4"} <= operators().keys()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_every_operator_measures_batches_row_by_row(name, shape):
    operator = make_operator(name, shape, seed=3)
    batch = images(2, 3, *shape)
    y = operator(batch)
    assert y.shape == (2, 3, operator.size)
    assert y.dtype == torch.float64
    torch.testing.assert_close(operator(batch[1, 2]), y[1, 2], rtol=0, atol=1e-12)
    back = operator.pseudo_inverse(y)
    assert back.shape == batch.shape
    assert bool((back.abs() <= 1).all())
    assert operator.picture(y[0, 0]).shape[0] == shape[0]


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_finite_differences(name):
    operator = make_operator(name, (1, 8, 8), seed=1)
    # Away from the edges of the range, where a clipped operator has no derivative.
    image = images(1, 8, 8, seed=2, scale=0.45).requires_grad_()
    assert torch.autograd.gradcheck(operator, (image,), atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_called_linear_is_affine_and_nothing_else(name):
    operator = make_operator(name, (1, 16, 16), seed=1)
    u, v, w = images(3, 1, 16, 16, seed=4)
    defect = operator(u + v - w) - operator(u) - operator(v) + operator(w)
    assert operator.linear == (name in (*LINEAR, "sr2"))
    assert operator.linear == bool(defect.abs().max() < 1e-12)


@pytest.mark.parametrize("name", LINEAR)
def test_the_adjoint_is_one(name):
    operator = make_operator(name, (2, 16, 16), seed=5)
    u, y = images(2, 16, 16, seed=6), images(operator.size, seed=7)
    assert float((operator(u) * y).sum()) == pytest.approx(float((u * adjoint(operator, y)).sum()))


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_says_everything(name):
    first, same, other = (make_operator(name, (1, 16, 16), seed=s) for s in (1, 1, 2))
    assert first == same
    assert (first == other) == (name not in ("mblur", "rinp", "nlblur"))
    image = images(1, 16, 16)
    assert torch.equal(first(image), same(image))
    assert first != make_operator(name, (1, 32, 32), seed=1)


def test_super_resolution_is_the_resize_of_pillow():
    image = images(1, 32, 48, seed=8).float()
    small = make_operator("sr4", (1, 32, 48))(image).reshape(8, 12)
    peer = Image.fromarray(image[0].numpy()).resize((12, 8), Image.Resampling.BICUBIC)
    np.testing.assert_allclose(small.numpy(), np.asarray(peer), atol=2e-6)


def test_without_antialiasing_it_would_not_be():
    image = images(1, 32, 48, seed=8).float()
    plain = torch.nn.functional.interpolate(image[None], scale_factor=0.25, mode="bicubic")
    peer = Image.fromarray(image[0].numpy()).resize((12, 8), Image.Resampling.BICUBIC)
    assert float((plain[0, 0] - torch.from_numpy(np.array(peer))).abs().max()) > 0.1


@pytest.mark.parametrize(("side", "width", "std"), [(16, 5, 1.0), (32, 9, 1.5)])
def test_gaussian_blur_is_that_of_scipy_with_a_mirror(side, width, std):
    image = images(1, side, side, seed=9)
    blurred = make_operator("gblur", (1, side, side))(image).reshape(side, side).numpy()
    options = {"sigma": std, "radius": width // 2}
    peer = ndimage.gaussian_filter(image[0].numpy(), mode="mirror", **options)
    np.testing.assert_allclose(blurred, peer, atol=1e-12)
    # What scipy calls "reflect" repeats the border.
    other = ndimage.gaussian_filter(image[0].numpy(), mode="reflect", **options)
    assert np.abs(blurred - other).max() > 0.01


def test_gaussian_kernels_are_filtered_deltas():
    delta = np.zeros((61, 61))
    delta[30, 30] = 1
    peer = ndimage.gaussian_filter(delta, sigma=3.0, radius=30, mode="constant")
    np.testing.assert_allclose(gaussian(61, 3.0), peer, atol=1e-15)


def test_motion_blur_is_a_correlation_with_its_kernel():
    operator = make_operator("mblur", (1, 16, 16), seed=11)
    kernel, image = operator.parameters["kernel"].numpy(), images(1, 16, 16, seed=12)
    assert kernel.shape == (5, 5)
    assert kernel.sum() == pytest.approx(1)
    peer = ndimage.correlate(image[0].numpy(), kernel, mode="mirror")
    np.testing.assert_allclose(operator(image).reshape(16, 16).numpy(), peer, atol=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_a_path_of_motion_is_a_line_about_the_middle(seed):
    width = 9
    kernel = motion(width, 0.0, np.random.default_rng(seed))
    assert (kernel >= 0).all()
    rows, columns = np.indices(kernel.shape) - width // 2
    centre = (kernel * rows).sum(), (kernel * columns).sum()
    np.testing.assert_allclose(centre, 0, atol=1e-9)
    spread = np.cov(np.stack([rows.ravel(), columns.ravel()]), aweights=kernel.ravel(), ddof=0)
    across, along = np.linalg.eigvalsh(spread)
    # A uniform line of eight pixels has variance 16/3; sharing points adds at most 1/4 to each.
    assert 16 / 3 - 0.1 < along < 16 / 3 + 0.35
    assert across < 0.3


def test_a_bent_path_is_no_line():
    kernel = motion(61, 2.0, np.random.default_rng(0))
    rows, columns = np.indices(kernel.shape) - 30
    spread = np.cov(np.stack([rows.ravel(), columns.ravel()]), aweights=kernel.ravel(), ddof=0)
    assert np.linalg.eigvalsh(spread)[0] > 2


def test_random_inpainting_keeps_its_share_in_all_channels_alike():
    operator = make_operator("rinp", (3, 16, 16), seed=13)
    mask = operator.parameters["mask"]
    assert int(mask.sum()) == round(0.3 * 256)
    assert operator.size == 3 * 77
    image = images(3, 16, 16)
    assert torch.equal(operator(image).reshape(3, 77), image[:, mask])
    picture = operator.picture(operator(image))
    assert torch.equal(picture[:, mask], image[:, mask])
    assert bool(picture[:, ~mask].isnan().all())


def test_the_box_is_a_hole_in_the_middle():
    mask = make_operator("box", (1, 32, 32)).parameters["mask"]
    assert not bool(mask[8:24, 8:24].any())
    assert int(mask.sum()) == 32 * 32 - 16 * 16
    small = make_operator("box", (1, 16, 16), height=2, width=4).parameters["mask"]
    assert int((~small[7:9, 6:10]).sum()) == int((~small).sum()) == 8


@pytest.mark.parametrize("name", ["rinp", "box"])
def test_what_was_not_seen_is_filled_with_the_mean_of_what_was(name):
    operator = make_operator(name, (2, 16, 16), seed=14)
    image, mask = images(2, 16, 16, seed=15), operator.parameters["mask"]
    back = operator.pseudo_inverse(operator(image))
    assert torch.equal(back[:, mask], image[:, mask])
    for channel in range(2):
        assert back[channel, ~mask].numpy() == pytest.approx(float(image[channel, mask].mean()))


def test_clipped_pixels_have_no_gradient():
    operator = make_operator("hdr", (1, 1, 4))
    image = torch.tensor([[[-0.9, -0.25, 0.25, 0.6]]], requires_grad=True)
    y = operator(image)
    assert y.tolist() == [-1.0, -0.5, 0.5, 1.0]
    y.sum().backward()
    assert image.grad.flatten().tolist() == [0.0, 2.0, 2.0, 0.0]
    assert operator.pseudo_inverse(y).flatten().tolist() == [-0.5, -0.25, 0.25, 0.5]


def test_nonlinear_blur_averages_light_tile_by_tile():
    operator = make_operator("nlblur", (1, 16, 16), seed=16)
    image = images(1, 16, 16, seed=17)
    light = ((image[0].numpy() + 1) / 2) ** 2.2
    blurred = np.empty((16, 16))
    for row, column in np.ndindex(4, 4):
        std = float(operator.parameters["std"][row, column])
        assert 0.5 <= std <= 1.5
        tile = slice(4 * row, 4 * row + 4), slice(4 * column, 4 * column + 4)
        blurred[tile] = ndimage.gaussian_filter(light, std, radius=3, mode="mirror")[tile]
    expected = 2 * blurred ** (1 / 2.2) - 1
    np.testing.assert_allclose(operator(image).reshape(16, 16).numpy(), expected, atol=1e-12)


def test_nonlinear_blur_leaves_flat_images_alone_and_is_differentiable_at_black():
    operator = make_operator("nlblur", (1, 16, 16))
    flat = torch.full((1, 16, 16), 0.3, dtype=torch.float64)
    torch.testing.assert_close(operator(flat), flat.flatten())
    black = torch.full((1, 16, 16), -1.0).requires_grad_()
    operator(black).sum().backward()
    assert bool(black.grad.isfinite().all())


def test_phase_retrieval_sees_the_transform_of_numpy():
    image = images(2, 16, 12, seed=18)
    padded = np.pad((image.numpy() + 1) / 2, ((0, 0), (4, 4), (3, 3)))
    transform = np.fft.fftshift(np.fft.fft2(padded, norm="ortho"), axes=(-2, -1))
    operator = make_operator("phase", (2, 16, 12))
    assert operator.shape == (2, 24, 18)
    np.testing.assert_allclose(operator(image).numpy(), np.abs(transform).ravel(), atol=1e-12)


def test_phase_retrieval_does_not_tell_an_image_from_itself_upside_down():
    operator, image = make_operator("phase", (1, 16, 16)), images(1, 16, 16, seed=19)
    torch.testing.assert_close(operator(image), operator(image.flip(-1, -2)))
    assert float((operator(image) - operator(image.flip(-1))).abs().max()) > 0.1


def test_phase_retrieval_without_a_prior_comes_closer_than_grey():
    yy, xx = torch.meshgrid(*[torch.linspace(-1, 1, 16, dtype=torch.float64)] * 2, indexing="ij")
    image = (2 * torch.exp(-8 * ((xx - 0.2) ** 2 + 3 * (yy + 0.1) ** 2)) - 1)[None]
    operator = make_operator("phase", (1, 16, 16))
    y = operator(image)
    found, grey = operator.pseudo_inverse(y), torch.zeros_like(image)
    errors = [float((operator(u) - y).square().mean()) for u in (found, grey)]
    assert errors[0] < 0.01 * errors[1]


@pytest.mark.parametrize("name", ["gblur", "mblur"])
def test_blurs_are_undone_by_damped_least_squares(name):
    operator = make_operator(name, (2, 8, 8), seed=20)
    rows = operator(torch.eye(128, dtype=torch.float64).reshape(128, 2, 8, 8))
    matrix, y = rows.T, images(operator.size, seed=21)
    expected = torch.linalg.solve(matrix.T @ matrix + 0.01 * torch.eye(128), matrix.T @ y)
    found = damped_least_squares(operator, y.reshape(1, *operator.shape))
    torch.testing.assert_close(found.flatten(), expected, rtol=0, atol=1e-5)


def test_half_precision_and_parameters_agree_on_a_type():
    operator = make_operator("gblur", (1, 16, 16))
    assert operator(images(1, 16, 16).float()).dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "shape", "options", "sentence"),
    [
        (
            "blur",
            (1, 16, 16),
            {},
            r"^There is no operator 'blur': .*sr2, sr4 \(or another factor\)",
        ),
        ("hdr2", (1, 16, 16), {}, "There is no operator 'hdr2'"),
        ("sr3", (1, 16, 16), {}, "16 x 16 pixels: choose one of sr1, sr2, sr4, sr8, sr16"),
        ("sr", (1, 16, 16), {"factor": 0}, "The factor 0 of the operator sr"),
        ("gblur", (1, 2, 16), {}, "cannot blur 2 x 16 pixels with a kernel of 5"),
        ("gblur", (1, 16, 16), {"width": 4}, "give an odd width"),
        (
            "gblur",
            (1, 16, 16),
            {"std": 0.0},
            "standard deviation of a blur is 0.0: give a positive",
        ),
        ("gblur", (1, 16, 16), {"sd": 1.0}, "no option 'sd': give one of width, std"),
        ("phase", (1, 16, 16), {"sd": 1.0}, "no option 'sd': drop it"),
        ("hdr", (1, 16, 16), {"scale": -1.0}, "The scale of the operator hdr is -1"),
        ("rinp", (1, 16, 16), {"keep": 0.0}, "cannot keep a share of 0.0"),
        ("box", (1, 16, 16), {"height": 16, "width": 16}, "give a hole that leaves some"),
        ("gblur", (16, 16), {}, r"needs the shape \(C, H, W\) of images, got \(16, 16\)"),
    ],
)
def test_what_cannot_be_made_is_refused(name, shape, options, sentence):
    with pytest.raises(ValueError, match=sentence) as refused:
        make_operator(name, shape, **options)
    assert str(refused.value).startswith("The")


def test_other_images_are_refused():
    operator = make_operator("hdr", (1, 16, 16))
    with pytest.raises(ValueError, match=r"measures images of shape \(1, 16, 16\)"):
        operator(torch.zeros(16, 16))
    with pytest.raises(ValueError, match=r"measures 256 numbers, got a y of shape \(3,\)"):
        operator.pseudo_inverse(torch.zeros(3))


def test_an_operator_of_ones_own_is_one_class():
    class Inverted(Operator):
        name = "inverted"

        @classmethod
        def draw_parameters(cls, image_shape, rng):
            return {"shift": torch.tensor(rng.normal())}

        def measure(self, images):
            return self.parameters["shift"] - images

        def invert(self, measured):
            return self.parameters["shift"] - measured

    register(Inverted)
    try:
        operator = make_operator("inverted", (1, 4, 4), seed=1)
        image = images(1, 4, 4)
        torch.testing.assert_close(operator.pseudo_inverse(operator(image)), image)
        with pytest.raises(ValueError, match="'gblur' is taken by GaussianBlur"):
            register(type("Other", (Inverted,), {"name": "gblur"}))
    finally:
        del OPERATORS["inverted"]


def test_sizes_between_the_tables_take_the_nearest_entry():
    widths = {
        side: len(make_operator("gblur", (1, side, side)).parameters["kernel"])
        for side in (8, 16, 22, 23, 32, 64, 128, 256)
    }
    assert widths == {8: 5, 16: 5, 22: 5, 23: 9, 32: 9, 64: 9, 128: 61, 256: 61}
    assert math.isclose(float(make_operator("gblur", (1, 256, 256)).parameters["kernel"].sum()), 1)
