"""Samples: fixed splits, known statistics, and images that depend on their key alone."""

from typing import Any

import pytest
import torch

from dbdist.data import images as module
from dbdist.data.images import ImagesInMemory, normalize
from dbdist.data.options import AugmentOptions, ImageOptions
from dbdist.data.sources import dataset_spec, load_dataset

AUGMENT = AugmentOptions(crop_padding=2, flip=True, randaugment_ops=2)


def random_images(size: int = 32, n: int = 10, channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, channels, size, size), dtype=torch.uint8, generator=generator)


def cifar_like(augment: AugmentOptions | None = None, **values: Any) -> ImagesInMemory:
    spec = dataset_spec(ImageOptions(name="cifar10", **values))
    return ImagesInMemory(spec, random_images(), list(range(10)), augment)


def test_specs_of_known_sets_need_no_files() -> None:
    classes = {"digits": 10, "mnist5k": 10, "cifar10": 10, "cifar100": 100, "tiny-imagenet": 200}
    for name, num_classes in classes.items():
        config: Any = ImageOptions(name=name, root="/nowhere")  # type: ignore[arg-type]
        spec = dataset_spec(config)
        assert spec.num_classes == num_classes
        assert len(spec.mean) == len(spec.std) == spec.channels
        if spec.class_names is not None:
            assert len(set(spec.class_names)) == num_classes
            assert list(spec.class_names) == sorted(spec.class_names)


def test_image_size_resizes() -> None:
    dataset = load_dataset(ImageOptions(name="digits", image_size=16), "test")
    assert dataset.spec.image_size == 16
    assert dataset[0]["image"].shape == (1, 16, 16)
    assert cifar_like(image_size=24)[0]["image"].shape == (3, 24, 24)


@pytest.mark.parametrize("image_size", [None, 24])
def test_batches_normalised_ahead_equal_those_normalised_late(
    monkeypatch: pytest.MonkeyPatch, image_size: int | None
) -> None:
    ahead = cifar_like(image_size=image_size)
    monkeypatch.setattr(module, "READY_BYTES", 0)
    late = cifar_like(image_size=image_size)
    keys: list[Any] = [3, 9, 3]
    one, other = ahead.__getitems__(keys), late.__getitems__(keys)
    assert all(torch.equal(one[name], other[name]) for name in ("image", "label"))


@pytest.mark.parametrize("name", ["digits", "mnist5k"])
def test_gray_images_can_be_augmented(name: Any) -> None:
    train = load_dataset(ImageOptions(name=name, augment=AUGMENT), "train")
    images = train.__getitems__([(i, i) for i in range(50)])["image"]
    assert images.shape[1:] == (1, train.spec.image_size, train.spec.image_size)
    assert images.isfinite().all()
    assert not load_dataset(ImageOptions(name=name, augment=AUGMENT), "test").augments


def test_augmented_image_depends_on_its_seed_alone() -> None:
    dataset = cifar_like(AUGMENT)
    alone = dataset[(4, 17)]["image"]
    images, labels = dataset.__getitems__([(1, 5), (4, 17), 4, (4, 18)]).values()
    assert labels.tolist() == [1, 4, 4, 4]
    assert torch.equal(images[1], alone)
    assert not torch.equal(images[3], alone)
    assert torch.equal(images[2], cifar_like()[4]["image"])


def test_augmentation_leaves_the_global_generator_alone() -> None:
    dataset = cifar_like(AUGMENT)
    before = torch.get_rng_state()
    dataset[(4, 17)]
    assert torch.equal(before, torch.get_rng_state())


def test_augmentation_without_any_change_is_none() -> None:
    assert not cifar_like(AugmentOptions()).augments


def test_normalize_takes_what_the_dataset_gives() -> None:
    dataset = cifar_like()
    pixels = random_images()
    expected = dataset.__getitems__(list(range(10)))["image"]
    assert torch.equal(normalize(pixels, dataset.spec), expected)
    torch.testing.assert_close(normalize(pixels.double() / 255, dataset.spec), expected)
    gray = dataset_spec(ImageOptions(name="digits"))
    assert normalize(torch.rand(5, 8, 8), gray).shape == (5, 1, 8, 8)
    assert normalize(torch.rand(0, 1, 8, 8), gray).shape == (0, 1, 8, 8)


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (torch.zeros(2, 3, 31, 32), "shape"),
        (torch.zeros(2, 1, 32, 32), "shape"),
        (torch.zeros(3, 32, 32), "shape"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.int64), "int64"),
        (torch.full((2, 3, 32, 32), 255.0), r"\[0, 1\]"),
        (torch.full((2, 3, 32, 32), float("nan")), r"\[0, 1\]"),
    ],
)
def test_normalize_refuses_other_images(images: torch.Tensor, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        normalize(images, dataset_spec(ImageOptions(name="cifar10")))


def test_random_images_take_the_form_of_a_set_and_are_the_same_each_time() -> None:
    spec = dataset_spec(ImageOptions(name="cifar100"))
    one, other = (module.random_images(spec, 20, AUGMENT) for _ in range(2))
    assert len(one) == 20
    assert one.augments
    assert one[3]["image"].shape == (3, 32, 32)
    assert one.digest() == other.digest()


def test_scripts_find_the_names_of_before() -> None:
    import dbdist.data
    from dbdist.options import DataConfig

    assert len(dbdist.data.load_dataset(DataConfig(name="digits"), "test")) == 360
    with pytest.raises(AttributeError, match="no attribute 'load_datasets'"):
        dbdist.data.load_datasets  # noqa: B018
