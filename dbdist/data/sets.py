"""The sets of images that `data.name` selects: what is known of each, and how it is read."""

from dataclasses import replace
from typing import Any, Literal

from dbdist.data.cifar import read_cifar
from dbdist.data.files import prepare, require
from dbdist.data.folders import class_folders, find_pictures
from dbdist.data.images import (
    DatasetSpec,
    ImageDataset,
    ImageFiles,
    ImagesInMemory,
    random_images,
)
from dbdist.data.options import ImageOptions
from dbdist.data.paths import shown
from dbdist.data.small_sets import TABLES, read_table
from dbdist.errors import DataError

__all__ = ["Split", "dataset_spec", "load_dataset", "prepare", "spec_from"]

Split = Literal["train", "test"]

_DIGITS = tuple("0123456789")
_CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck"
_CIFAR100 = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly
camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile
cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp
lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree
orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine possum
rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider
squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train
trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_SPECS = {
    spec.name: spec
    for spec in (
        DatasetSpec("digits", 1, 8, 10, (0.3054,), (0.3761,), _DIGITS, 16.0),
        DatasetSpec("mnist5k", 1, 28, 10, (0.1311,), (0.3083,), _DIGITS),
        DatasetSpec(
            "cifar10",
            *(3, 32, 10),
            *((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
            tuple(_CIFAR10.split()),
        ),
        DatasetSpec(
            "cifar100",
            *(3, 32, 100),
            *((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
            tuple(_CIFAR100.split()),
        ),
        DatasetSpec("tiny-imagenet", 3, 64, 200, *_IMAGENET, None),
        DatasetSpec("image_folder", 3, 64, 0, *_IMAGENET, None),
    )
}


def spec_from(values: dict[str, Any]) -> DatasetSpec:
    """A spec from what `asdict` made of it, by way of JSON."""
    given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    known = _SPECS.get(given.get("name", ""))
    given.setdefault("white", known.white if known else 255.0)  # older files have none
    return DatasetSpec(**given)


def dataset_spec(config: ImageOptions) -> DatasetSpec:
    """The configured set's spec: constants, but image_folder's classes are its folders."""
    spec = _SPECS[config.name]
    spec = replace(spec, image_size=config.image_size or spec.image_size)
    if config.scaling == "symmetric":
        spec = replace(spec, mean=(0.5,) * spec.channels, std=(0.5,) * spec.channels)
    if config.name != "image_folder":
        return spec
    names = tuple(class_folders(require(config) / "train"))
    return replace(spec, num_classes=len(names), class_names=names)


def load_dataset(config: ImageOptions, split: Split) -> ImageDataset:
    """A split of the configured set, whose files must be there (`prepare`)."""
    spec, is_train = dataset_spec(config), split == "train"
    augment = config.augment if is_train else None
    if config.name in TABLES:
        return ImagesInMemory(spec, *read_table(config.name, is_train), augment)
    root = require(config)
    if config.name in ("cifar10", "cifar100"):
        return ImagesInMemory(spec, *read_cifar(config.name, root, is_train), augment)
    num_classes = len(class_folders(root / "train"))
    if num_classes != spec.num_classes:
        raise DataError(
            f"{shown(root / 'train')} holds {num_classes} class folders instead of "
            f"{spec.num_classes}"
        )
    found = find_pictures(root, split)
    return ImageFiles(
        spec, root, found.files, found.labels, augment, config.on_error, found.remarks()
    )


def random_samples(config: ImageOptions, num: int) -> ImageDataset:
    """Random images of the configured set's form, for measurements without its files."""
    return random_images(dataset_spec(config), num, config.augment)
