"""A user's images as the model expects them: arrays, tensors, PIL images, files and folders."""

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from dbdist.data.folders import is_left_out
from dbdist.data.images import DatasetSpec, normalize
from dbdist.data.latents import LatentSpec
from dbdist.data.latents import normalize as normalize_latents
from dbdist.data.pictures import ENDINGS, as_shown, read_picture

DARK = 32
"""uint8 images of which nothing is brighter are probably on another scale."""


def pixels_of(images: Any, spec: DatasetSpec | LatentSpec) -> Float[Tensor, "n c h w"]:
    """Images as the model expects them.

    images: (N, C, S, S) or, with one channel, (N, S, S), as tensor, array or list; colour may come
    last; one image without its N; a PIL image or a list of them; a picture file or a folder of
    them, sorted by name. Numbers: uint8, floats in [0, 1], or floats in the data set's own range
    (0 to 16 for scikit-learn's digits, else 0 to 255). Raises ValueError for anything else.

    A model of latents takes those instead, as diffusers' pipelines have them.
    """
    if isinstance(spec, LatentSpec):
        return _latents(images, spec)
    if isinstance(images, str | os.PathLike):
        return normalize(_from_files(Path(images).expanduser(), spec), spec)
    if _is_picture(images):
        images = [images]
    if isinstance(images, list | tuple) and images:
        if all(_is_picture(image) for image in images):
            return normalize(torch.stack([_from_picture(image, spec) for image in images]), spec)
        images = torch.stack([_tensor(image) for image in images])
    return normalize(_in_range(_in_order(_tensor(images), spec), spec), spec)


def _latents(latents: Any, spec: LatentSpec) -> Tensor:
    expected = (spec.channels, spec.image_size, spec.image_size)
    given = None if isinstance(latents, str | os.PathLike) else _tensor(latents)
    if given is None or not given.is_floating_point() or tuple(given.shape[1:]) != expected:
        shape = "" if given is None else f", not {given.dtype} of shape {tuple(given.shape)}"
        raise ValueError(
            f"the model takes latents of shape (N, {', '.join(map(str, expected))}) as floats, "
            f"(raw - {spec.shift:g}) x {spec.scaling:g}{shape}"
        )
    return normalize_latents(given.float(), spec)


def _is_picture(image: Any) -> bool:
    return hasattr(image, "getexif")  # PIL's, without importing it


def _tensor(image: Any) -> Tensor:
    if isinstance(image, Tensor):
        return image
    try:
        array = np.asarray(image)
        native = array.astype(array.dtype.newbyteorder("="), order="C", copy=True)
        return torch.from_numpy(native)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"images cannot be read as an array ({error}); give uint8, or floats in [0, 1]"
        ) from None


def _in_order(pixels: Shaped[Tensor, "..."], spec: DatasetSpec) -> Tensor:
    """(N, C, S, S) or (N, S, S), from one image and from colour that comes last too."""
    one = (spec.channels, spec.image_size, spec.image_size)
    last = (spec.image_size, spec.image_size, spec.channels)
    if tuple(pixels.shape) in (one, last) or (spec.channels == 1 and pixels.ndim == 2):
        pixels = pixels.unsqueeze(0)
    if tuple(pixels.shape[1:]) == last and last != one:
        pixels = pixels.permute(0, 3, 1, 2)
    return pixels


def _in_range(pixels: Tensor, spec: DatasetSpec) -> Tensor:
    """Floats of the data set's own range, brought to [0, 1]; warns of odd scales."""
    if pixels.numel() == 0 or not (pixels.is_floating_point() or pixels.dtype == torch.uint8):
        return pixels
    highest = float(pixels.max())
    if pixels.is_floating_point() and float(pixels.min()) >= 0:
        if spec.white / 4 < highest <= spec.white:  # beyond 1, and as bright as white or nearly
            return pixels / spec.white
    elif pixels.dtype == torch.uint8 and 0 < highest <= spec.white < DARK:
        warnings.warn(
            f"images reach {highest:g} of 255; taken for {spec.name}'s own range of 0 to "
            f"{spec.white:g}",
            stacklevel=4,
        )
        return pixels / spec.white
    elif pixels.dtype == torch.uint8 and 1 < highest < DARK:
        warnings.warn(
            f"images are almost black: they reach {highest:g} of 255; are they on another scale?",
            stacklevel=4,
        )
    return pixels


def _from_files(path: Path, spec: DatasetSpec) -> Tensor:
    files = [path]
    if path.is_dir():
        files = sorted(
            file
            for file in path.iterdir()
            if file.suffix.lower() in ENDINGS and not is_left_out(file.name)
        )
    if not files:
        raise ValueError(f"{path} holds no pictures")
    return torch.stack([_grey_if_so(read_picture(f, spec.image_size), spec) for f in files])


def _from_picture(image: Any, spec: DatasetSpec) -> Tensor:
    """A PIL image, cut and resized as those that were trained on."""
    from torchvision.transforms.v2 import functional as F

    side = [spec.image_size]
    pixels = F.resize(F.pil_to_tensor(as_shown(image.copy())), side, antialias=True)
    return _grey_if_so(F.center_crop(pixels, side * 2), spec)


def _grey_if_so(pixels: Tensor, spec: DatasetSpec) -> Tensor:
    """RGB as grey, for data sets of one channel; weights of ITU-R 601."""
    if spec.channels != 1:
        return pixels
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    return (pixels * weights).sum(dim=0, keepdim=True).round().to(torch.uint8)
