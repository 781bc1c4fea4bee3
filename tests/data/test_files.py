"""What is on disk: fetched whole or not at all, read in the true formats, refused by name."""

import hashlib
import http.server
import io
import pickle
import struct
import tarfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100

from dbdist.config.options import DataConfig
from dbdist.data import dataset_spec, load_dataset, prepare
from dbdist.data.files import ARCHIVES, Archive
from dbdist.errors import DataError


class MarksFile:
    """A pickle of this creates the file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


class Python2Pickler(pickle._Pickler):
    """Writes what Python 2 and its numpy wrote, as the published files are: all text is bytes."""

    dispatch: ClassVar[dict[type, Any]] = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def save_text(self, text: str | bytes) -> None:
        raw = text if isinstance(text, bytes) else text.encode("latin1")
        self.write(pickle.BINSTRING + struct.pack("<i", len(raw)) + raw)  # type: ignore[attr-defined]
        self.memoize(text)  # type: ignore[attr-defined]

    dispatch[str] = dispatch[bytes] = save_text


def dumps(entry: dict[str, Any], protocol: int | str = "python2") -> bytes:
    if isinstance(protocol, int):
        return pickle.dumps(entry, protocol)
    written = io.BytesIO()
    Python2Pickler(written, 2).dump(entry)
    return written.getvalue().replace(b"cnumpy._core.", b"cnumpy.core.")


def batch(n: int, label_key: str, num_classes: int) -> dict[str, Any]:
    rng = np.random.default_rng(n)
    data = rng.integers(0, 256, (n, 3072), dtype=np.uint8)
    names = [f"{i}.png" for i in range(n)]
    return {"data": data, label_key: [i % num_classes for i in range(n)], "filenames": names}


def write_cifar100(root: Path, protocol: int | str = "python2") -> Path:
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    for name, n in (("train", 12), ("test", 5)):
        content = dumps(batch(n, "fine_labels", 100), protocol)
        (folder / name).write_bytes(content)
    (folder / "meta").write_bytes(dumps({"fine_label_names": ["x"] * 100}, protocol))
    return folder


def write_cifar10(root: Path) -> Path:
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for i in range(1, 6):
        (folder / f"data_batch_{i}").write_bytes(dumps(batch(i, "labels", 10)))
    (folder / "test_batch").write_bytes(dumps(batch(4, "labels", 10)))
    (folder / "batches.meta").write_bytes(dumps({"label_names": ["x"] * 10}))
    return folder


def write_image(path: Path, width: int = 64, height: int = 64, shade: int = 128) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (shade, shade, shade)).save(path)


def config(name: Any, root: Path, **values: Any) -> DataConfig:
    return DataConfig(name=name, root=str(root), **values)


def refusal(data: DataConfig, split: Literal["train", "test"] = "train") -> str:
    with pytest.raises(DataError) as caught:
        load_dataset(data, split)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("protocol", ["python2", 2, 4, 5])
def test_cifar100_subset_is_read_as_torchvision_reads_it(
    tmp_path: Path, protocol: int | str
) -> None:
    write_cifar100(tmp_path, protocol)
    data = config("cifar100", tmp_path)
    prepare(data)
    with pytest.warns(UserWarning, match="train, meta .* md5 differs"):
        train = load_dataset(data, "train")
    with pytest.warns(UserWarning, match="test, meta"):
        test = load_dataset(data, "test")
    assert (len(train), len(test)) == (12, 5)
    expected = batch(12, "fine_labels", 100)["data"].reshape(-1, 3, 32, 32)[7] / 255
    mean, std = (np.array(v).reshape(3, 1, 1) for v in (train.spec.mean, train.spec.std))
    image, label = train[7].values()
    assert label == 7
    torch.testing.assert_close(image, torch.tensor((expected - mean) / std, dtype=torch.float32))


def test_cifar10_joins_its_five_batches_in_order(tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    with pytest.warns(UserWarning, match="md5 differs"):
        train = load_dataset(config("cifar10", tmp_path), "train")
    assert train.labels.tolist() == [0, *range(2), *range(3), *range(4), *range(5)]


@pytest.mark.parametrize("filename", ["train", "meta"])
def test_pickle_that_would_run_code_is_refused_and_runs_nothing(
    tmp_path: Path, filename: str
) -> None:
    folder, marker = write_cifar100(tmp_path), tmp_path / "marker"
    (folder / filename).write_bytes(pickle.dumps({"data": MarksFile(marker)}))
    message = refusal(config("cifar100", tmp_path))
    assert "would run code" in message
    assert str(folder / filename) in message
    assert not marker.exists()
    pickle.loads((folder / filename).read_bytes())
    assert marker.exists()  # else the test would test nothing


def test_truncated_file_is_refused_by_name(tmp_path: Path) -> None:
    path = write_cifar100(tmp_path) / "train"
    path.write_bytes(path.read_bytes()[:-2000])
    assert refusal(config("cifar100", tmp_path)).startswith(f"{path} is damaged: ")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"data": np.zeros((12, 3000), np.uint8)}, "shape (n, 3072)"),
        ({"data": np.zeros((12, 3072), np.float32)}, "shape (n, 3072)"),
        ({"data": [1, 2]}, "shape (n, 3072)"),
        ({"fine_labels": [0] * 11}, "must list 12 labels"),
        ({"fine_labels": [100] * 12}, "integers 0..99"),
        ({"fine_labels": ["a"] * 12}, "integers 0..99"),
        ({"fine_labels": None}, "must list 12 labels"),
    ],
)
def test_batch_of_another_form_is_refused(tmp_path: Path, change: dict, expected: str) -> None:
    path = write_cifar100(tmp_path) / "train"
    path.write_bytes(pickle.dumps(batch(12, "fine_labels", 100) | change))
    assert expected in refusal(config("cifar100", tmp_path))


def test_missing_cifar10_batches_are_named(tmp_path: Path) -> None:
    folder = write_cifar10(tmp_path)
    (folder / "data_batch_2").unlink()
    (folder / "data_batch_4").unlink()
    message = refusal(config("cifar10", tmp_path))
    assert f"{folder} is incomplete: data_batch_2, data_batch_4 missing" in message
    with pytest.raises(DataError, match="data_batch_2, data_batch_4"):
        prepare(config("cifar10", tmp_path))


@pytest.mark.parametrize(
    ("name", "filename"),
    [("cifar100", "cifar-100-python.tar.gz"), ("tiny-imagenet", "tiny-imagenet-200.zip")],
)
@pytest.mark.parametrize("network", ["silent", "absent"])
def test_missing_data_is_told_within_8_s_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: str, name: str, filename: str
) -> None:
    root = tmp_path / "not" / "there"

    def urlopen(*_: Any, **__: Any) -> None:
        time.sleep(60 if network == "silent" else 0)
        raise OSError("Network is unreachable")

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    started = time.monotonic()
    with pytest.raises(DataError) as caught:
        prepare(config(name, root))
    assert time.monotonic() - started < 8
    assert filename in str(caught.value)
    assert str(root) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not root.parent.exists()
    assert filename in refusal(config(name, root))


@pytest.mark.parametrize("published", [CIFAR10, CIFAR100])
def test_cifar_archives_are_torchvisions(published: Any) -> None:
    archive = ARCHIVES[published.__name__.lower()]
    parts = published.train_list + published.test_list
    assert archive == Archive(
        published.base_folder,
        published.filename,
        published.url,
        published.tgz_md5,
        (*(filename for filename, _ in parts), published.meta["filename"]),
    )


@pytest.fixture
def cifar100_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Serves a small CIFAR-100 as if it were the published one; gives the archive it serves."""
    folder = tmp_path / "served"
    write_cifar100(folder)
    archive = folder / ARCHIVES["cifar100"].filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder / "cifar-100-python", "cifar-100-python")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(folder))

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    url = f"http://127.0.0.1:{server.server_port}/{archive.name}"
    md5 = hashlib.md5(archive.read_bytes()).hexdigest()
    monkeypatch.setitem(ARCHIVES, "cifar100", replace(ARCHIVES["cifar100"], url=url, md5=md5))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield archive
    server.shutdown()
    server.server_close()


def test_download_is_silent_and_complete(
    tmp_path: Path, cifar100_server: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "data"
    for _ in range(2):  # the second finds everything in place
        prepare(config("cifar100", root))
    assert capsys.readouterr() == ("", "")
    assert {p.name for p in root.iterdir()} == {"cifar-100-python", cifar100_server.name}
    with pytest.warns(UserWarning, match="md5 differs"):
        assert len(load_dataset(config("cifar100", root), "train")) == 12


def test_broken_download_leaves_nothing(tmp_path: Path, cifar100_server: Path) -> None:
    content = cifar100_server.read_bytes()
    cifar100_server.write_bytes(content[: len(content) // 2])
    root = tmp_path / "data"
    with pytest.raises(DataError, match="could not be downloaded"):
        prepare(config("cifar100", root))
    assert list(root.iterdir()) == []


def test_archive_put_there_by_hand_is_used(
    tmp_path: Path, cifar100_server: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "data"
    root.mkdir()
    (root / cifar100_server.name).write_bytes(cifar100_server.read_bytes())
    nowhere = replace(ARCHIVES["cifar100"], url="http://127.0.0.1:9/nothing")
    monkeypatch.setitem(ARCHIVES, "cifar100", nowhere)
    prepare(config("cifar100", root))
    assert (root / "cifar-100-python" / "train").exists()


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "tiny-imagenet"])
def test_damaged_archive_is_refused_by_name(tmp_path: Path, name: str) -> None:
    filenames = {"cifar10": "cifar-10-python.tar.gz", "cifar100": "cifar-100-python.tar.gz"}
    archive = tmp_path / filenames.get(name, "tiny-imagenet-200.zip")
    archive.write_bytes(b"half of it")
    with pytest.raises(DataError, match="is damaged") as caught:
        prepare(config(name, tmp_path))
    assert str(archive) in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == [archive.name]


def test_tiny_imagenet_test_labels_come_from_its_annotations(tmp_path: Path) -> None:
    folder = tmp_path / "tiny-imagenet-200"
    names = [f"n{i:08d}" for i in range(200)]
    for i, name in enumerate(names):
        write_image(folder / "train" / name / "images" / f"{name}_0.JPEG", shade=i)
    lines = []
    for i, label in enumerate((199, 3)):
        write_image(folder / "val" / "images" / f"val_{i}.JPEG", shade=label)
        lines.append(f"val_{i}.JPEG\t{names[label]}\t0\t32\t44\t62\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    data = config("tiny-imagenet", tmp_path)
    prepare(data)
    train, test = load_dataset(data, "train"), load_dataset(data, "test")
    assert train.labels.tolist() == list(range(200))
    assert test.labels.tolist() == [199, 3]
    image = test[1]["image"]
    assert image.shape == (3, 64, 64)
    torch.testing.assert_close(image, train[3]["image"], atol=0.05, rtol=0)

    (folder / "val" / "images" / "val_1.JPEG").unlink()
    assert "line 2" in refusal(data, "test")
    (folder / "val" / "val_annotations.txt").unlink()
    assert "val/val_annotations.txt missing" in refusal(data, "test")


@pytest.mark.parametrize("held_out", ["val", "test"])
def test_image_folder_is_resized_and_cropped_to_the_middle(tmp_path: Path, held_out: str) -> None:
    for split in ("train", held_out):
        write_image(tmp_path / split / "cat" / "a.jpeg", 90, 40)
        write_image(tmp_path / split / "dog" / "b.png", 30, 50)
    data = config("image_folder", tmp_path, image_size=16)
    spec = dataset_spec(data)
    assert (spec.class_names, spec.num_classes, spec.image_size) == (("cat", "dog"), 2, 16)
    for split in ("train", "test"):
        images, labels = load_dataset(data, split).__getitems__([1, 0]).values()
        assert images.shape == (2, 3, 16, 16)
        assert labels.tolist() == [1, 0]


def test_image_folder_refuses_other_classes_and_unreadable_images(tmp_path: Path) -> None:
    for path in ("train/cat/a.png", "train/dog/a.png", "val/cat/a.png", "val/cow/a.png"):
        write_image(tmp_path / path)
    data = config("image_folder", tmp_path)
    assert "differ in class folders: cow, dog" in refusal(data, "test")
    (tmp_path / "train/dog/a.png").write_bytes(b"no image")
    train = load_dataset(data, "train")
    with pytest.raises(DataError, match=r"train/dog/a\.png is not a readable image"):
        train[1]
    (tmp_path / "train/dog/a.png").unlink()
    assert "dog" in refusal(data, "train")


def test_image_folder_without_splits_is_told_by_path(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="incomplete: train, val missing") as caught:
        dataset_spec(config("image_folder", tmp_path))
    assert str(tmp_path) in str(caught.value)
