"""Small files in the forms of the published sets, and what refuses them."""

import hashlib
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from dbdist.data.base import Batch, Key
from dbdist.data.options import ImageOptions
from dbdist.data.sources import load_dataset
from dbdist.errors import DataError

CIFAR: dict[str, Any] = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}


def write_cifar(root: Path, name: str) -> Path:
    """CIFAR's folder with batches of 12 images (3 to test)."""
    published, label_key = CIFAR[name], "labels" if name == "cifar10" else "fine_labels"
    folder = root / published.base_folder
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    batches = [(file, 12) for file, _ in published.train_list]
    for file, n in [*batches, *((file, 3) for file, _ in published.test_list)]:
        data = rng.integers(0, 256, (n, 3072), dtype=np.uint8)
        (folder / file).write_bytes(pickle.dumps({"data": data, label_key: [*range(n)]}))
    names = ["x"] * (10 if name == "cifar10" else 100)
    (folder / published.meta["filename"]).write_bytes(pickle.dumps({published.meta["key"]: names}))
    return folder


def published_cifar(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str) -> None:
    """From now on these are the published files."""
    published = CIFAR[name]

    def named(file: str) -> tuple[str, str]:
        return file, hashlib.md5((folder / file).read_bytes()).hexdigest()

    for key in ("train_list", "test_list"):
        monkeypatch.setattr(published, key, [named(file) for file, _ in getattr(published, key)])
    file, md5 = named(published.meta["filename"])
    monkeypatch.setattr(published, "meta", {**published.meta, "filename": file, "md5": md5})


def write_image(path: Path, width: int = 64, height: int = 64, shade: int = 128) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (shade, shade, shade)).save(path)


def write_folder(root: Path, *classes: str, n: int = 2) -> ImageOptions:
    """ROOT/train and ROOT/val with n images of each class."""
    for split in ("train", "val"):
        for shade, name in enumerate(classes):
            for i in range(n):
                write_image(root / split / name / f"{i}.png", 8, 8, 20 * shade + i)
    return config("image_folder", root, image_size=8)


def config(name: Any, root: Path, **values: Any) -> ImageOptions:
    return ImageOptions(name=name, root=str(root), **values)


def refusal(data: ImageOptions, split: Literal["train", "test"] = "train") -> str:
    with pytest.raises(DataError) as caught:
        load_dataset(data, split)
    assert_one_sentence(caught.value)
    return str(caught.value)


def assert_one_sentence(error: Exception) -> None:
    assert str(error).isprintable()
    assert len(str(error)) < 1000


class Points:
    """A set of another kind: points of the plane, their squares, and nothing of images."""

    spec, augments = cast(Any, None), False

    def __len__(self) -> int:
        return 6

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        points = torch.tensor(keys, dtype=torch.float64).unsqueeze(1) + torch.tensor([0.0, 0.5])
        return {"point": points, "square": points**2}

    def digest(self) -> str:
        return ""
