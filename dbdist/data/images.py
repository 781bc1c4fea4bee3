"""Images with labels: pixels in memory or picture files in, normalised float32 batches out.

A sample is a function of its key: an index, or (index, augment_seed) for a training image that is
changed at random. Nothing here moves the global random generators, downloads or communicates.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64, Shaped, UInt8
from torch import Tensor

from dbdist import seeds
from dbdist.data.base import Batch, Key
from dbdist.data.folders import PictureFile
from dbdist.data.options import AugmentOptions
from dbdist.data.paths import shown
from dbdist.data.pictures import read_picture
from dbdist.errors import DataError

READY_BYTES = 2**26
"""Sets up to this size that are not augmented are normalised once instead of in each batch."""
MAX_TRIES = 50
"""Damaged pictures in a row that `on_error: skip` replaces before it gives up."""


@dataclass(frozen=True)
class DatasetSpec:
    """What a model must know of a set of images."""

    name: str
    channels: int
    image_size: int
    """Side in pixels, after the resize that `data.image_size` asks for."""
    num_classes: int
    mean: tuple[float, ...]
    """Per channel, what is subtracted from an image in [0, 1] before `std` divides it: that of the
    training images, or 0.5 where `data.scaling: symmetric` asks for -1 to 1; likewise `std`."""
    std: tuple[float, ...]
    class_names: tuple[str, ...] | None
    white: float = 255.0
    """The brightest value in the set's own numbers: 16 in scikit-learn's digits."""

    def identity(self) -> dict[str, Any]:
        """What tells this data from other data: classes, size and scaling."""
        values = asdict(self)
        return {k: [*v] if isinstance(v, tuple) else v for k, v in values.items()}


def normalize(images: Shaped[Tensor, "..."], spec: DatasetSpec) -> Float[Tensor, "n c h w"]:
    """Images as the model expects them, from uint8 or floats in [0, 1].

    Raises ValueError for anything else; (N, H, W) will do when the dataset has one channel.
    """
    size, expected = spec.image_size, (spec.channels, spec.image_size, spec.image_size)
    if spec.channels == 1 and images.ndim == 3:
        images = images.unsqueeze(1)
    if tuple(images.shape[1:]) != expected or images.ndim != 4:
        raise ValueError(
            f"images of shape {tuple(images.shape)} do not fit {spec.name}; expected (N, "
            f"{spec.channels}, {size}, {size})"
        )
    if images.dtype != torch.uint8:
        if not images.is_floating_point():
            raise ValueError(f"images are {images.dtype}; expected uint8 or floats in [0, 1]")
        if images.numel() and not (images.min() >= 0 and images.max() <= 1):
            raise ValueError("images of a float type must lie in [0, 1]; pass 0..255 as uint8")
    return _standardize(images, spec)


def _standardize(pixels: Shaped[Tensor, "n c h w"], spec: DatasetSpec) -> Float[Tensor, "n c h w"]:
    x = pixels.to(torch.float32)
    if pixels.dtype == torch.uint8:
        x = x / 255
    mean, std = _mean_and_std(spec, x)
    return (x - mean) / std


def denormalize(images: Float[Tensor, "n c h w"], spec: DatasetSpec) -> UInt8[Tensor, "n c h w"]:
    """The inverse of `normalize`, for pictures: 0 to 255; what lies beyond is cut off."""
    mean, std = _mean_and_std(spec, images)
    return ((images * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)


def _mean_and_std(spec: DatasetSpec, like: Tensor) -> list[Tensor]:
    values = (torch.tensor(v, dtype=like.dtype, device=like.device) for v in (spec.mean, spec.std))
    return [value.view(-1, 1, 1) for value in values]


class ImageDataset:
    """One split of a set of images; `ImagesInMemory` and `ImageFiles` say where pixels are from."""

    def __init__(
        self, spec: DatasetSpec, labels: Sequence[int], augment: AugmentOptions | None = None
    ) -> None:
        self.spec = spec
        self.labels = torch.tensor(labels, dtype=torch.int64)
        self._augment = None if augment is None else _augmentation(augment, spec.image_size)

    @property
    def kind(self) -> str:
        """What the samples are, after their number."""
        num_classes = self.spec.num_classes
        return f"images of {num_classes} {'class' if num_classes == 1 else 'classes'}"

    @property
    def augments(self) -> bool:
        """Whether a key's augment_seed changes the image."""
        return self._augment is not None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: Key) -> Batch:
        """One sample: its "image" (c, h, w) and its "label"."""
        return {name: values[0] for name, values in self.__getitems__([key]).items()}

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        """The "image" (n, c, h, w) and "label" (n,) of these samples."""
        index = torch.tensor(
            [key if isinstance(key, int) else key[0] for key in keys], dtype=torch.int64
        )
        return self._batch(index, [None if isinstance(key, int) else key[1] for key in keys])

    def digest(self) -> str:
        """SHA-256 that names the samples and their order."""
        raise NotImplementedError

    def _batch(self, index: Int64[Tensor, " n"], augment_seeds: list[int | None]) -> Batch:
        pixels, index = self._samples(index)
        if self._augment is not None and any(seed is not None for seed in augment_seeds):
            pairs = zip(pixels, augment_seeds, strict=True)
            pixels = torch.stack([self._changed(*pair) for pair in pairs])
        labels = self.labels.index_select(0, index)
        return {"image": _standardize(pixels, self.spec), "label": labels}

    def _samples(
        self, index: Int64[Tensor, " n"]
    ) -> tuple[Shaped[Tensor, "n c h w"], Int64[Tensor, " n"]]:
        """(pixels of these samples, the samples whose pixels they are)."""
        return self._pixels(index), index

    def _pixels(self, index: Int64[Tensor, " n"]) -> Shaped[Tensor, "n c h w"]:
        """These images as uint8 or as floats in [0, 1]."""
        raise NotImplementedError

    def _changed(self, image: Shaped[Tensor, "c h w"], seed: int | None) -> Float[Tensor, "c h w"]:
        if seed is None or self._augment is None:
            return image / 255 if image.dtype == torch.uint8 else image
        with torch.random.fork_rng(devices=[]):
            # not torch.manual_seed: that seeds the GPU's generators too, which nobody restores here
            torch.default_generator.manual_seed(seed)
            return self._augment(image)


class ImagesInMemory(ImageDataset):
    """One split whose pixels are a tensor, uint8 or floats in [0, 1]."""

    def __init__(
        self,
        spec: DatasetSpec,
        images: Shaped[Tensor, "n c h w"],
        labels: Sequence[int],
        augment: AugmentOptions | None = None,
    ) -> None:
        super().__init__(spec, labels, augment)
        self._images = images
        self._ready: Tensor | None = None
        size_bytes = 4 * len(labels) * spec.channels * spec.image_size**2
        if not self.augments and size_bytes <= READY_BYTES:
            self._ready = _standardize(self._pixels(torch.arange(len(labels))), spec)

    def digest(self) -> str:
        """SHA-256 of labels and pixels."""
        digest = hashlib.sha256(self.labels.numpy().tobytes())
        digest.update(self._images.contiguous().numpy().data)
        return digest.hexdigest()

    def _batch(self, index: Int64[Tensor, " n"], augment_seeds: list[int | None]) -> Batch:
        if self._ready is None:
            return super()._batch(index, augment_seeds)
        images, labels = (x.index_select(0, index) for x in (self._ready, self.labels))
        return {"image": images, "label": labels}

    def _pixels(self, index: Int64[Tensor, " n"]) -> Shaped[Tensor, "n c h w"]:
        pixels, size = self._images.index_select(0, index), self.spec.image_size
        if pixels.shape[-1] == size:
            return pixels
        from torchvision.transforms.v2 import functional as F

        return F.resize(pixels, [size, size], antialias=True)


class ImageFiles(ImageDataset):
    """One split whose samples are picture files.

    A picture that cannot be used raises DataError (`on_error` stop), or another picture of its
    class takes its place in every epoch (skip): which one depends on names of files only.
    """

    def __init__(
        self,
        spec: DatasetSpec,
        root: Path,
        files: Sequence[PictureFile],
        labels: Sequence[int],
        augment: AugmentOptions | None = None,
        on_error: Literal["stop", "skip"] = "stop",
        remarks: Sequence[str] = (),
    ) -> None:
        """root: what the names in the digest begin after. remarks: on files left out."""
        super().__init__(spec, labels, augment)
        self.remarks = remarks
        self._root, self._on_error = root, on_error
        self._paths = [file.path for file in files]
        self._sizes = [file.size for file in files]
        self._notes: list[str] = []

    @property
    def _images(self) -> list[Path]:
        return [Path(path) for path in self._paths]

    def digest(self) -> str:
        """SHA-256 of the labels, the names of the files below the root, and their sizes."""
        digest = hashlib.sha256(self.labels.numpy().tobytes())
        for path, size in zip(self._paths, self._sizes, strict=True):
            digest.update(self._name(path) + b"\0%d\0" % size)
        return digest.hexdigest()

    def take_notes(self) -> list[str]:
        """A sentence for each sample that another has replaced since the last call."""
        notes, self._notes = self._notes, []
        return notes

    def _samples(
        self, index: Int64[Tensor, " n"]
    ) -> tuple[Shaped[Tensor, "n c h w"], Int64[Tensor, " n"]]:
        if self._on_error == "stop":
            return super()._samples(index)
        read = [self._read_or_replace(i) for i in index.tolist()]
        used = torch.tensor([i for _, i in read], dtype=torch.int64)
        return torch.stack([pixels for pixels, _ in read]), used

    def _pixels(self, index: Int64[Tensor, " n"]) -> Shaped[Tensor, "n c h w"]:
        return torch.stack([self._read(i) for i in index.tolist()])

    def _read_or_replace(self, i: int) -> tuple[Shaped[Tensor, "c h w"], int]:
        """(pixels of sample i or of the one that takes its place, which sample that is)."""
        damage: DataError | None = None
        for used in self._candidates(i):
            try:
                pixels = self._read(used)
            except DataError as error:
                damage = damage or error
                continue
            if damage is not None:
                other = shown(os.fsdecode(self._name(self._paths[used])))
                self._notes.append(f"{damage}; {other} takes its place")
            return pixels, used
        raise DataError(f"{damage}; nor can others of its class be used")

    def _candidates(self, i: int) -> Iterator[int]:
        """The sample itself, and then others of its class in an order that its name gives."""
        yield i
        same = torch.nonzero(self.labels == self.labels[i]).flatten()
        for attempt in range(MAX_TRIES):
            name = self._name(self._paths[i]) + b"\0%d" % attempt
            number = int.from_bytes(hashlib.sha256(name).digest()[:8], "big")
            yield int(same[number % len(same)])

    def _read(self, i: int) -> Shaped[Tensor, "c h w"]:
        return read_picture(Path(self._paths[i]), self.spec.image_size)

    def _name(self, path: str) -> bytes:
        """Below the root, as the file system has it."""
        return os.fsencode(path).removeprefix(os.fsencode(self._root) + b"/")


def random_images(
    spec: DatasetSpec, num_samples: int, augment: AugmentOptions | None = None
) -> ImagesInMemory:
    """Random pixels and labels in the form of a set, to measure speed without its files."""
    generator = seeds.generator(0, "random images")
    shape = num_samples, spec.channels, spec.image_size, spec.image_size
    images = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    labels = torch.randint(spec.num_classes, (num_samples,), generator=generator)
    return ImagesInMemory(spec, images, labels.tolist(), augment)


def _augmentation(config: AugmentOptions, size: int) -> Any:
    """The transform from pixels to changed floats in [0, 1]; None if the config asks for none."""
    if not (config.crop_padding or config.flip or config.randaugment_ops):
        return None
    from torchvision.transforms import v2

    steps = []
    if config.crop_padding:
        steps.append(v2.RandomCrop(size, padding=config.crop_padding))
    if config.flip:
        steps.append(v2.RandomHorizontalFlip())
    if config.randaugment_ops:  # PIL's operations take half the time of those on tensors
        operations = v2.RandAugment(config.randaugment_ops, config.randaugment_magnitude)
        steps += [v2.ToPILImage(), operations, v2.ToImage()]
    return v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()])
