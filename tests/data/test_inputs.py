"""A user's images: however they are handed over, the model sees the same numbers."""

import numpy as np
import pytest
import torch
from PIL import Image

from dbdist.data.images import normalize
from dbdist.data.inputs import pixels_of
from dbdist.data.options import ImageOptions
from dbdist.data.sources import dataset_spec

COLOUR = dataset_spec(ImageOptions(name="cifar10"))
DIGITS = dataset_spec(ImageOptions(name="digits"))
RANDOM = np.random.default_rng(0)
BYTES = RANDOM.integers(0, 256, (2, 3, 32, 32), dtype=np.uint8)
EXPECTED = normalize(torch.tensor(BYTES), COLOUR)


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    "images",
    [
        torch.tensor(BYTES),
        BYTES,
        [*BYTES],
        BYTES.transpose(0, 2, 3, 1),
        BYTES[:, :, ::-1][:, :, ::-1],
        read_only(BYTES),
        (BYTES / 255).astype(">f4"),
        BYTES / 255,
        BYTES.astype(np.float32),
        [Image.fromarray(image.transpose(1, 2, 0)) for image in BYTES],
    ],
    ids="tensor array list last strides read-only endian floats 0..255 PIL".split(),
)
def test_the_same_images_in_any_form_are_the_same_numbers(images):
    torch.testing.assert_close(pixels_of(images, COLOUR), EXPECTED, rtol=1e-4, atol=1e-4)


def test_one_image_needs_no_axis_for_its_number():
    assert torch.equal(pixels_of(BYTES[0], COLOUR), EXPECTED[:1])
    assert torch.equal(pixels_of(BYTES[0].transpose(1, 2, 0), COLOUR), EXPECTED[:1])
    assert pixels_of(np.zeros((8, 8)), DIGITS).shape == (1, 1, 8, 8)


def test_files_and_folders_are_read_in_order_of_names(tmp_path):
    for name, image in zip(("b.png", "a.PNG"), BYTES, strict=True):
        Image.fromarray(image.transpose(1, 2, 0)).save(tmp_path / name)
    (tmp_path / "._a.png").write_bytes(b"x")
    (tmp_path / "notes.txt").write_text("x")
    assert torch.equal(pixels_of(tmp_path, COLOUR), EXPECTED.flip(0))
    assert torch.equal(pixels_of(str(tmp_path / "b.png"), COLOUR), EXPECTED[:1])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no pictures"):
        pixels_of(tmp_path / "empty", COLOUR)


def test_scikit_learns_own_digits_are_taken_for_what_they_are():
    raw = RANDOM.integers(0, 17, (3, 8, 8))
    expected = normalize(torch.tensor(raw / 16), DIGITS)
    torch.testing.assert_close(pixels_of(raw.astype(np.float64), DIGITS), expected)
    with pytest.warns(UserWarning, match="own range of 0 to 16"):
        torch.testing.assert_close(pixels_of(raw.astype(np.uint8), DIGITS), expected)


def test_almost_black_images_are_warned_of():
    with pytest.warns(UserWarning, match="almost black"):
        pixels_of((BYTES // 20).astype(np.uint8), COLOUR)


@pytest.mark.parametrize(
    "images",
    [
        np.full((1, 3, 32, 32), np.nan),
        RANDOM.standard_normal((1, 3, 32, 32)),
        RANDOM.integers(0, 256, (1, 3, 32, 32)),
        np.zeros((1, 3, 32, 32), np.uint16),
        np.full((1, 3, 32, 32), 300.0),
        np.full((1, 3, 32, 32), 5.0),
        np.zeros((1, 3, 16, 16)),
        np.zeros((1, 3, 32, 32), bool),
        [np.zeros((3, 32, 32)), "x"],
        object(),
    ],
    ids="nan negative int64 uint16 300 5 size bool mixed object".split(),
)
def test_what_has_no_certain_meaning_is_refused_in_one_sentence(images):
    with pytest.raises(ValueError, match=r".") as caught:
        pixels_of(images, COLOUR)
    assert "\n" not in str(caught.value)
