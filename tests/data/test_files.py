"""Files of a data set: fetched whole or not at all, refused by name."""

import hashlib
import http.server
import os
import tarfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from data_files import config, refusal, write_cifar
from torchvision.datasets import CIFAR10, CIFAR100

from dbdist.data.files import ARCHIVES, Archive
from dbdist.data.sources import prepare
from dbdist.errors import DataError


def test_missing_cifar10_batches_are_named(tmp_path: Path) -> None:
    folder = write_cifar(tmp_path, "cifar10")
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
def test_missing_data_is_told_soon_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: str, name: str, filename: str
) -> None:
    root = tmp_path / "not" / "there"

    def urlopen(*_: Any, **__: Any) -> None:
        time.sleep(60 if network == "silent" else 0)
        raise OSError("Network is unreachable")

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    monkeypatch.setattr("dbdist.data.files.PROBE_S", 0.2)
    started = time.monotonic()
    with pytest.raises(DataError) as caught:
        prepare(config(name, root))
    assert time.monotonic() - started < 5
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
    write_cifar(folder, "cifar100")
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
    assert (root / "cifar-100-python" / "train").exists()


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


@pytest.mark.timeout(20)
def test_a_pipe_in_place_of_an_archive_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "cifar-100-python.tar.gz")
    with pytest.raises(DataError, match="is a named pipe, not a file"):
        prepare(config("cifar100", tmp_path))


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "tiny-imagenet"])
def test_damaged_archive_is_refused_by_name(tmp_path: Path, name: str) -> None:
    filenames = {"cifar10": "cifar-10-python.tar.gz", "cifar100": "cifar-100-python.tar.gz"}
    archive = tmp_path / filenames.get(name, "tiny-imagenet-200.zip")
    archive.write_bytes(b"half of it")
    with pytest.raises(DataError, match="is damaged") as caught:
        prepare(config(name, tmp_path))
    assert str(archive) in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == [archive.name]
