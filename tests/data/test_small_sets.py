"""Tables of packages: read without importing them, split as they always were."""

import gzip
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from dbdist.data import small_sets as module
from dbdist.data.options import ImageOptions
from dbdist.data.small_sets import TABLES, read_table, stratified_split
from dbdist.data.sources import load_dataset
from dbdist.errors import DataError


@pytest.mark.parametrize(("name", "sizes"), [("digits", (1437, 360)), ("mnist5k", (4000, 1000))])
def test_small_sets_split_evenly_and_always_alike(name: Any, sizes: tuple[int, int]) -> None:
    config = ImageOptions(name=name)
    train, test = load_dataset(config, "train"), load_dataset(config, "test")
    assert (len(train), len(test)) == sizes
    shares = [torch.bincount(d.labels, minlength=10) / len(d) for d in (train, test)]
    torch.testing.assert_close(*shares, atol=0.002, rtol=0)
    again = load_dataset(config, "train")
    assert torch.equal(train.labels, again.labels)
    images = train.__getitems__(list(range(len(train))))["image"]
    assert torch.equal(images, again.__getitems__(list(range(len(again))))["image"])
    assert abs(float(images.mean())) < 1e-3
    assert abs(float(images.std()) - 1) < 1e-3


def test_digits_are_scikit_learns_in_the_order_of_its_split() -> None:
    digits: Any = load_digits()
    order = np.arange(len(digits["target"]))
    rows = train_test_split(order, test_size=360, stratify=digits["target"], random_state=0)
    for is_train, chosen in zip((True, False), rows, strict=True):
        images, labels = read_table("digits", is_train)
        expected = torch.tensor(digits["images"] / 16, dtype=torch.float32)[chosen]
        assert torch.equal(images.squeeze(1), expected)
        assert labels == digits["target"][chosen].tolist()


@pytest.mark.parametrize("sizes", [(50, 30, 7), (500,) * 10, (3, 3, 4), (20, 19, 18, 17)])
def test_the_split_is_scikit_learns_for_other_labels(sizes: tuple[int, ...]) -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
    num_test = max(len(labels) // 5, len(sizes))
    expected = train_test_split(
        np.arange(len(labels)), test_size=num_test, stratify=labels, random_state=0
    )
    for rows, chosen in zip(stratified_split(labels, num_test), expected, strict=True):
        assert rows.tolist() == chosen.tolist()


def test_digits_import_no_scikit_learn() -> None:
    code = "from dbdist.data.small_sets import read_table; read_table('digits', True); import sys; "
    code += "sys.exit(any(name in sys.modules for name in ('sklearn', 'scipy', 'mlxtend')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_missing_package_is_answered_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(DataError) as caught:
        load_dataset(ImageOptions(name="mnist5k"), "train")
    assert "pip install 'dbdist[mnist5k]'" in str(caught.value)
    assert "uv sync --extra mnist5k" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"no gzip", "is damaged"),
        (gzip.compress(b"1,2,x\n"), "is damaged"),
        (gzip.compress(b"1,2,3\n"), "is not the table"),
        (gzip.compress(b""), "is not the table|is damaged"),
    ],
    ids=["no gzip", "no number", "too small", "empty"],  # gzip's bytes hold the time
)
@pytest.mark.filterwarnings("ignore:loadtxt")
def test_another_table_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, expected: str
) -> None:
    path = tmp_path / "digits.csv.gz"
    path.write_bytes(content)
    monkeypatch.setattr(module, "_find", lambda name, table: path)
    with pytest.raises(DataError, match=expected):
        read_table("digits", True)
    assert TABLES["digits"].rows == 1797
