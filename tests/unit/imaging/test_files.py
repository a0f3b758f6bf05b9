"""Image files: what is read, what is written, and what is wrong with them."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from ppl_diffusion.imaging.files import (
    read_image,
    resized,
    what_is_doubtful,
    what_is_lost,
    write_image,
)

GREY, COLOUR = (1, 6, 8), (3, 6, 8)


def picture(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def as_image(pixels):
    return torch.from_numpy(2 * pixels.astype(np.float32) / 255 - 1)


@pytest.mark.parametrize("shape", [GREY, COLOUR])
def test_what_was_written_is_read(shape, tmp_path):
    image = as_image(picture(*shape))
    write_image(tmp_path / "a.png", image)
    torch.testing.assert_close(read_image(tmp_path / "a.png", shape), image)


def test_grey_and_colour_become_what_is_asked_for(tmp_path):
    pixels = picture(6, 8, 3)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    grey = read_image(tmp_path / "a.png", GREY)
    peer = np.asarray(Image.fromarray(pixels).convert("L"))
    torch.testing.assert_close(grey, as_image(peer)[None], rtol=0, atol=1.1 / 127.5)
    Image.fromarray(pixels[..., 0]).save(tmp_path / "b.png")
    colour = read_image(tmp_path / "b.png", COLOUR)
    assert torch.equal(colour[0], colour[2])
    torch.testing.assert_close(colour[1], as_image(pixels[..., 0]))


def test_sixteen_bits_and_jpeg_are_read(tmp_path):
    deep = (picture(6, 8).astype(np.uint16) * 257).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    expected = as_image((deep // 257).astype(np.uint8))[None]
    torch.testing.assert_close(read_image(tmp_path / "deep.png", GREY), expected)
    Image.fromarray(np.full((6, 8), 200, dtype=np.uint8)).save(tmp_path / "a.JPG")
    assert read_image(tmp_path / "a.JPG", GREY).numpy() == pytest.approx(
        2 * 200 / 255 - 1, abs=0.02
    )


def test_full_opacity_is_no_transparency(tmp_path):
    pixels = picture(6, 8, 4)
    pixels[..., 3] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert torch.equal(
        read_image(tmp_path / "a.png", COLOUR), as_image(pixels[..., :3].transpose(2, 0, 1))
    )


@pytest.mark.parametrize("shape", [(6, 8), (1, 6, 8), (6, 8, 1), (3, 6, 8), (6, 8, 3)])
def test_arrays_of_every_layout_are_read(shape, tmp_path):
    pixels = picture(*shape)
    real = 2 * pixels.astype(np.float64) / 255 - 1
    np.save(tmp_path / "whole.npy", pixels)
    np.savez(tmp_path / "real.npz", image=real)
    wanted = COLOUR if 3 in shape else GREY
    whole = read_image(tmp_path / "whole.npy", wanted)
    assert whole.shape == wanted
    torch.testing.assert_close(read_image(tmp_path / "real.npz", wanted), whole)
    first = pixels if pixels.ndim == 2 or shape[0] in (1, 3) else pixels.transpose(2, 0, 1)
    torch.testing.assert_close(whole, as_image(first.reshape(wanted)))


def test_another_size_is_brought_to_the_right_one_only_if_asked(tmp_path):
    Image.fromarray(picture(12, 16)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"12 x 16 pixels, and 6 x 8 are needed.*--resize"):
        read_image(tmp_path / "a.png", GREY)
    image = read_image(tmp_path / "a.png", GREY, resize=True)
    assert image.shape == GREY
    torch.testing.assert_close(image, resized(as_image(picture(12, 16))[None], (6, 8)))


def test_pixels_are_enlarged_and_what_is_not_known_is_grey(tmp_path):
    image = torch.tensor([[[-2.0, float("nan")], [0.5, 1.0]]])
    write_image(tmp_path / "a.png", image, scale=3)
    pixels = np.asarray(Image.open(tmp_path / "a.png"))
    assert pixels.shape == (6, 6)
    assert pixels[0, 0] == 0
    assert pixels[1, 4] == 128
    assert pixels[5, 5] == 255


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.png", b"no image", "is no readable image"),
        ("a.txt", b"", "ends in none of .png, .jpg"),
        ("a.npy", b"no array", "is no archive of one array"),
        ("a.npz", b"no archive", "is no archive of one array"),
        ("a.npy", b"", "is empty: save the array again"),
        ("a.npz", b"", "is empty: save the array again"),
    ],
)
def test_files_of_other_things_are_refused(name, content, sentence, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        read_image(tmp_path / name, GREY)


@pytest.mark.parametrize(
    ("array", "sentence"),
    [
        (np.zeros((6, 8, 2)), r"has the shape \(6, 8, 2\)"),
        (np.zeros((1, 1, 6, 8)), "has the shape"),
        (np.full((6, 8), 1.5), "holds real numbers from 1.5 to 1.5: give whole numbers from 0"),
        (np.full((6, 8), 300), "holds whole numbers from 300 to 300: give whole numbers from 0"),
        (np.full((6, 8), np.nan), "holds NaN or infinity: fill in those pixels"),
        (np.full((6, 8), np.inf), "holds NaN or infinity: fill in those pixels"),
        (np.zeros((0, 8)), r"has the shape \(0, 8\), without a pixel"),
        (np.zeros((6, 8), dtype=bool), "has the type bool: give whole numbers"),
    ],
)
def test_arrays_of_other_things_are_refused(array, sentence, tmp_path):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ValueError, match=sentence):
        read_image(tmp_path / "a.npy", GREY)


def test_archives_of_several_arrays_and_of_code_are_refused(tmp_path):
    np.savez(tmp_path / "two.npz", a=np.zeros((6, 8)), b=np.zeros((6, 8)))
    with pytest.raises(ValueError, match="it holds a, b"):
        read_image(tmp_path / "two.npz", GREY)
    np.save(tmp_path / "code.npy", np.array([print], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"holds Python objects.*: save an array of numbers"):
        read_image(tmp_path / "code.npy", GREY)
    with pytest.raises(ValueError, match="is a folder: give the file of one image"):
        read_image(tmp_path, GREY)


def test_transparency_is_refused(tmp_path):
    Image.fromarray(picture(6, 8, 4)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="partly transparent: flatten it"):
        read_image(tmp_path / "a.png", GREY)


def test_an_absent_file_and_an_absent_library_are_named(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="There is no image"):
        read_image(tmp_path / "a.png", GREY)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ModuleNotFoundError, match=r"ppl-diffusion\[imaging\]"):
        write_image(tmp_path / "a.png", torch.zeros(GREY))


def test_it_is_told_what_an_image_loses():
    colours = as_image(picture(3, 12, 16))
    assert what_is_lost(colours, COLOUR) == ()
    assert what_is_lost(colours[:1].expand(3, -1, -1), GREY) == ()
    (grey,) = what_is_lost(colours, GREY)
    assert "the prior is grey" in grey
    (squeezed,) = what_is_lost(colours[:1], (1, 8, 8))
    assert "12 x 16 pixels was brought to 8 x 8" in squeezed
    assert len(what_is_lost(colours, (1, 8, 8))) == 2


def test_arrays_that_look_like_zero_to_one_are_doubted():
    light, dark = torch.rand(1, 4, 4), -torch.ones(1, 4, 4)
    (said,) = what_is_doubtful("a.npy", light)
    assert "if its numbers go from 0 to 1, save 2 x - 1" in said
    assert what_is_doubtful("a.npy", torch.cat([light, dark])) == ()
    assert what_is_doubtful("a.png", light) == ()
