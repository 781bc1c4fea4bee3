"""CIFAR: the published files as torchvision reads them, and no others."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from data_files import CIFAR, config, published_cifar, refusal, write_cifar

from dbdist.data.sources import load_dataset, prepare


class MarksFile:
    """A pickle of this creates the file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize(("name", "sizes"), [("cifar10", (60, 3)), ("cifar100", (12, 3))])
def test_the_published_files_are_read_as_torchvision_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, sizes: tuple[int, int]
) -> None:
    published_cifar(monkeypatch, write_cifar(tmp_path, name), name)
    data = config(name, tmp_path)
    prepare(data)
    sets = load_dataset(data, "train"), load_dataset(data, "test")
    assert tuple(map(len, sets)) == sizes
    for dataset, is_train in zip(sets, (True, False), strict=True):
        expected = CIFAR[name](str(tmp_path), train=is_train)
        assert dataset.labels.tolist() == expected.targets
        pixels = dataset._pixels(torch.tensor([2])).squeeze(0)
        assert torch.equal(pixels, torch.tensor(expected.data[2]).permute(2, 0, 1))


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_a_file_with_another_md5_is_refused_before_anything_in_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = write_cifar(tmp_path, name)
    published_cifar(monkeypatch, folder, name)
    published, marker = CIFAR[name], tmp_path / "marker"
    for file in (published.train_list[-1][0], published.test_list[0][0], "meta"):
        path = folder / (published.meta["filename"] if file == "meta" else file)
        good = path.read_bytes()
        for bad in (pickle.dumps({"data": MarksFile(marker)}), good[:-9], b""):
            path.write_bytes(bad)
            message = refusal(config(name, tmp_path))
            assert message.startswith(f"{path} is not the published file of {name}"), message
            assert not marker.exists()
        path.write_bytes(good)
    pickle.loads(pickle.dumps(MarksFile(marker)))
    assert marker.exists()  # else the test would test nothing


@pytest.mark.timeout(20)
def test_a_pipe_in_place_of_a_file_is_not_waited_for(tmp_path: Path) -> None:
    path = write_cifar(tmp_path, "cifar100") / "train"
    path.unlink()
    os.mkfifo(path)
    assert refusal(config("cifar100", tmp_path)) == f"{path} is a named pipe, not a file"
