"""CIFAR-10 and CIFAR-100 as torchvision reads them, from the published files and no others.

The files are pickles, which can run code when they are read: torchvision compares their md5 first.
"""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dbdist.data.paths import require_file, shown
from dbdist.errors import DataError


def read_cifar(name: str, folder: Path, is_train: bool) -> tuple[Tensor, list[int]]:
    """Images, uint8 of shape (N, 3, 32, 32), and labels of "cifar10" or "cifar100".

    folder: with the unpacked files. Raises DataError unless they are the published ones.
    """
    from torchvision import datasets  # late: importing torchvision takes seconds

    published: Any = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    files: list[tuple[str, str]] = [
        *((filename, md5) for filename, md5 in published.train_list + published.test_list),
        (published.meta["filename"], published.meta["md5"]),
    ]
    for filename, _ in files:
        require_file(folder / filename)
    try:
        data = published(str(folder.parent), train=is_train)
    except (RuntimeError, OSError) as error:
        raise DataError(_what_differs(name, folder, files) or f"{shown(folder)}: {error}") from None
    pixels = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
    return pixels, data.targets


def _what_differs(name: str, folder: Path, files: list[tuple[str, str]]) -> str | None:
    """A sentence on the first file that is not the published one."""
    for filename, md5 in files:
        try:
            content = (folder / filename).read_bytes()
        except OSError as error:
            return f"{shown(folder / filename)} cannot be read ({error.strerror})"
        if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
            return (
                f"{shown(folder / filename)} is not the published file of {name} (its md5 is not "
                f"{md5}); delete {shown(folder)} to have it fetched again"
            )
    return None
