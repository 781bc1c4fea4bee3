"""How pixels become numbers and back: mean 0 and deviation 1, or from -1 to 1."""

import pytest
import torch

from dbdist.data.images import DatasetSpec, denormalize, normalize
from dbdist.data.options import ImageOptions
from dbdist.data.sets import dataset_spec, load_dataset
from dbdist.data.small_sets import read_table


def test_symmetric_pixels_go_from_minus_one_to_one():
    data = load_dataset(ImageOptions(name="digits", scaling="symmetric"), "train")
    pixels = data.__getitems__([*range(len(data))])["image"]
    assert (pixels.min().item(), pixels.max().item()) == (-1, 1)
    shares = read_table("digits", True)[0]
    torch.testing.assert_close(pixels, 2 * shares - 1, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["digits", "mnist5k", "cifar10", "cifar100", "tiny-imagenet"])
def test_the_scaling_is_part_of_what_data_are(name):
    plain = dataset_spec(ImageOptions(name=name))
    symmetric = dataset_spec(ImageOptions(name=name, scaling="symmetric"))
    assert symmetric.mean == symmetric.std == (0.5,) * plain.channels
    differing = {
        key for key, value in plain.identity().items() if symmetric.identity()[key] != value
    }
    assert differing == {"mean", "std"}


@pytest.mark.parametrize("channels", [1, 3])
def test_denormalized_pixels_are_the_bytes_that_were_normalized(channels):
    mean, std = (0.485, 0.456, 0.406)[:channels], (0.229, 0.224, 0.225)[:channels]
    spec = DatasetSpec("cifar10", channels, 16, 10, mean, std, None)
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).repeat(2, channels, 1, 1)
    assert torch.equal(denormalize(normalize(images, spec), spec), images)


def test_what_lies_beyond_black_and_white_is_cut_off():
    spec = DatasetSpec("digits", 1, 1, 10, (0.5,), (0.5,), None)
    x = torch.tensor([-7.0, -1.0, 0.0, 1.0, 1.01, 300.0]).reshape(-1, 1, 1, 1)
    assert denormalize(x, spec).flatten().tolist() == [0, 0, 128, 255, 255, 255]
