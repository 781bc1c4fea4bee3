"""Image classification sets: `DataConfig` in, normalised float32 batches and labels out.

A sample is a function of its key alone: an index, or (index, augment_seed) for a training image
that is augmented. Nothing here moves the global random generators, downloads or communicates.
"""

import hashlib
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from dbdist.config.options import AugmentConfig, DataConfig
from dbdist.data.base import Batch, Key
from dbdist.data.files import require
from dbdist.data.readers import Split, class_folders, read_cifar, read_folder, read_small
from dbdist.errors import DataError

READY_BYTES = 2**26
"""Sets up to this size that are not augmented are normalised once instead of in each batch."""
IMAGE_FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP")
"""What image files may be, by their content: PIL gives some others to programs outside."""
MAX_PIXELS = 2**26
"""Of an image file, and of what it is resized to before it is cropped."""


@dataclass(frozen=True)
class DatasetSpec:
    """What a model must know of a dataset."""

    name: str
    channels: int
    image_size: int
    """Side in pixels, after the resize that `data.image_size` asks for."""
    num_classes: int
    mean: tuple[float, ...]
    """Per channel, of training images in [0, 1]; likewise `std`."""
    std: tuple[float, ...]
    class_names: tuple[str, ...] | None

    def identity(self) -> dict[str, Any]:
        """What tells this data from other data: classes, size and scaling."""
        names = None if self.class_names is None else list(self.class_names)
        values = asdict(self) | {"mean": list(self.mean), "std": list(self.std)}
        return values | {"class_names": names}


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
        DatasetSpec("digits", 1, 8, 10, (0.3054,), (0.3761,), _DIGITS),
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


def dataset_spec(config: DataConfig) -> DatasetSpec:
    """The configured dataset's spec: constants, but image_folder's classes are its folders."""
    spec = _SPECS[config.name]
    spec = replace(spec, image_size=config.image_size or spec.image_size)
    if config.name != "image_folder":
        return spec
    names = class_folders(require(config) / "train")
    return replace(spec, num_classes=len(names), class_names=names)


def normalize(images: Shaped[Tensor, "..."], spec: DatasetSpec) -> Float[Tensor, "n c h w"]:
    """Images as the model expects them, from uint8 or floats in [0, 1].

    ValueError for anything else; (N, H, W) will do when the dataset has one channel.
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
    mean, std = (torch.tensor(v, device=x.device).view(-1, 1, 1) for v in (spec.mean, spec.std))
    return (x - mean) / std


class ImageDataset:
    """One split, from pixels in memory (uint8, or floats in [0, 1]) or from image files."""

    def __init__(
        self,
        spec: DatasetSpec,
        split: Split,
        images: Shaped[Tensor, "n c h w"] | list[Path],
        labels: list[int],
        augment: AugmentConfig | None = None,
    ) -> None:
        self.spec = spec
        self.split = split
        self.labels = torch.tensor(labels, dtype=torch.int64)
        self._images = images
        self._augment = None if augment is None else _augmentation(augment, spec.image_size)
        self._ready: Tensor | None = None
        size_bytes = 4 * len(labels) * spec.channels * spec.image_size**2
        if self._augment is None and isinstance(images, Tensor) and size_bytes <= READY_BYTES:
            self._ready = _standardize(self._pixels(torch.arange(len(labels))), spec)

    @property
    def augments(self) -> bool:
        """Whether a key's augment_seed changes the image."""
        return self._augment is not None

    def __len__(self) -> int:
        return len(self.labels)

    def digest(self) -> str:
        """SHA-256 that names the samples and their order: of pixels and labels, or of the image
        files' last three folders and names."""
        digest = hashlib.sha256(self.labels.numpy().tobytes())
        if isinstance(self._images, Tensor):
            digest.update(self._images.contiguous().numpy().data)
        else:
            names = ["/".join(path.parts[-3:]) for path in self._images]
            digest.update("\n".join(names).encode())
        return digest.hexdigest()

    def __getitem__(self, key: Key) -> Batch:
        """One sample: its "image" (c, h, w) and its "label"."""
        return {name: values[0] for name, values in self.__getitems__([key]).items()}

    def __getitems__(self, keys: list[Key]) -> Batch:
        """The "image" (n, c, h, w) and "label" (n,) of these samples."""
        index = torch.tensor(
            [key if isinstance(key, int) else key[0] for key in keys], dtype=torch.int64
        )
        labels = self.labels.index_select(0, index)
        if self._ready is not None:
            return {"image": self._ready.index_select(0, index), "label": labels}
        pixels = self._pixels(index)
        if self._augment is not None and any(isinstance(key, tuple) for key in keys):
            seeds = [None if isinstance(key, int) else key[1] for key in keys]
            pixels = torch.stack([self._changed(*pair) for pair in zip(pixels, seeds, strict=True)])
        return {"image": _standardize(pixels, self.spec), "label": labels}

    def _pixels(self, index: Int64[Tensor, " n"]) -> Shaped[Tensor, "n c h w"]:
        size = self.spec.image_size
        if not isinstance(self._images, Tensor):
            return torch.stack([_read_image(self._images[i], size) for i in index.tolist()])
        pixels = self._images.index_select(0, index)
        if pixels.shape[-1] == size:
            return pixels
        from torchvision.transforms.v2 import functional as F

        return F.resize(pixels, [size, size], antialias=True)

    def _changed(self, image: Shaped[Tensor, "c h w"], seed: int | None) -> Float[Tensor, "c h w"]:
        if seed is None or self._augment is None:
            return image / 255 if image.dtype == torch.uint8 else image
        with torch.random.fork_rng(devices=[]):
            # not torch.manual_seed: that seeds the GPU's generators too, which nobody restores here
            torch.default_generator.manual_seed(seed)
            return self._augment(image)


def _augmentation(config: AugmentConfig, size: int) -> Any:
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


def _read_image(path: Path, size: int) -> Shaped[Tensor, "c h w"]:
    """The middle square of an image file, its shorter side resized to `size`."""
    from PIL import Image
    from torchvision.transforms.v2 import functional as F

    try:
        if not path.is_file():
            raise DataError(f"{path} is missing")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large images and odd metadata
            with Image.open(path, formats=IMAGE_FORMATS) as file:
                short, long = sorted(file.size)
                if short < 1 or max(short * long, size * size * long // short) > MAX_PIXELS:
                    raise DataError(
                        f"{path} has {file.size[0]} x {file.size[1]} pixels, which is too large or "
                        "too narrow; resize or remove it"
                    )
                image = F.pil_to_tensor(file.convert("RGB"))
        return F.center_crop(F.resize(image, [size], antialias=True), [size, size])
    except DataError:
        raise
    except Exception as error:  # a damaged file can raise anything
        reason = " ".join(f"{error}".split()) or type(error).__name__
        raise DataError(f"{path} is not a readable image: {reason}") from error


def load_dataset(config: DataConfig, split: Split) -> ImageDataset:
    """A split of the configured dataset, whose files must be there (`prepare`)."""
    spec = dataset_spec(config)
    if config.name in ("digits", "mnist5k"):
        images, labels = read_small(config.name, split)
    elif config.name in ("cifar10", "cifar100"):
        images, labels = read_cifar(config, split, spec.num_classes)
    else:
        images, labels = read_folder(require(config), split, spec.num_classes)
    return ImageDataset(spec, split, images, labels, config.augment if split == "train" else None)
