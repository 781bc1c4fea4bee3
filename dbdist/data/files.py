"""The files of a dataset: fetched once per node, then found or refused by name.

Takes `ImageOptions`, gives folders on disk that `sets.py` reads. Nothing appears under its final
name before it is complete: downloads and extractions go to a hidden sibling folder first.
"""

import contextlib
import http.client
import io
import os
import shutil
import socket
import threading
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from dbdist.data.archives import unpack
from dbdist.data.options import ImageOptions
from dbdist.data.paths import require_file, shown
from dbdist.errors import DataError
from dbdist.whole_files import locked

PROBE_S = 3.0
"""How long to wait for a server's first answer: a machine without network should say so at once."""
STALL_S = 30.0
"""How long a running download may stand still."""


@dataclass(frozen=True)
class Archive:
    """A published archive and what it unpacks to."""

    folder: str
    filename: str
    url: str
    md5: str
    required: tuple[str, ...]
    """Paths inside the folder without which it is incomplete."""


_TORONTO = "https://www.cs.toronto.edu/~kriz"
ARCHIVES = {
    "cifar10": Archive(
        "cifar-10-batches-py",
        "cifar-10-python.tar.gz",
        f"{_TORONTO}/cifar-10-python.tar.gz",
        "c58f30108f718f92721af3b95e74349a",
        (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"),
    ),
    "cifar100": Archive(
        "cifar-100-python",
        "cifar-100-python.tar.gz",
        f"{_TORONTO}/cifar-100-python.tar.gz",
        "eb9058c3a382ffc7106e4002c42a8d85",
        ("train", "test", "meta"),
    ),
    "tiny-imagenet": Archive(
        "tiny-imagenet-200",
        "tiny-imagenet-200.zip",
        "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
        "90528d7ca1a48142e341f4ef8d21d0de",
        ("train", "val/images", "val/val_annotations.txt"),
    ),
}
"""By dataset name; every other dataset downloads nothing. CIFAR's entries are torchvision's own,
repeated because importing torchvision takes seconds, and a missing file should be told at once."""


def root_of(config: ImageOptions) -> Path:
    """`data.root` as an absolute path."""
    return Path(config.root).expanduser().absolute()


def prepare(config: ImageOptions) -> None:
    """Makes sure that the dataset's files are there, downloading them if need be.

    For one process per node; every other one waits and calls `load_dataset`, which never downloads.
    """
    archive, root = ARCHIVES.get(config.name), root_of(config)
    if archive is not None and not (root / archive.folder).exists():
        if not (root / archive.filename).exists():
            _probe(archive, root)  # before the first folder is made
        try:
            root.mkdir(parents=True, exist_ok=True)
            with locked(root):
                if not (root / archive.folder).exists():
                    _fetch(archive, root)
        except OSError as error:
            raise DataError(f"{archive.filename} cannot be unpacked in {root}: {error}") from error
    require(config)


def require(config: ImageOptions) -> Path:
    """The folder of the dataset's files; DataError if it is missing or incomplete."""
    archive, root = ARCHIVES.get(config.name), root_of(config)
    if archive is not None:
        folder, required = root / archive.folder, archive.required
        if not folder.is_dir():
            raise DataError(
                f"{shown(folder)} is missing; put {archive.filename} from {archive.url} into "
                f"{shown(root)}"
            )
    elif config.name == "image_folder":
        folder, required = root, ("train", "test" if (root / "test").is_dir() else "val")
    else:
        return root  # digits and mnist5k come with their packages
    if missing := [path for path in required if not (folder / path).exists()]:
        remedy = "" if archive is None else "; delete the folder to have it fetched again"
        raise DataError(f"{shown(folder)} is incomplete: {', '.join(missing)} missing{remedy}")
    return folder


def _probe(archive: Archive, root: Path) -> None:
    """DataError unless the server answers soon. In a thread, as name look-ups obey no timeout."""
    answers: list[str | None] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(archive.url, timeout=PROBE_S).close()
            answers.append(None)
        except (OSError, http.client.HTTPException) as error:
            answers.append(str(getattr(error, "reason", error)))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_S + 1)
    reason = answers[0] if answers else f"no answer within {PROBE_S:.0f} s"
    if reason is not None:
        raise _undownloaded(archive, root, reason)


def _undownloaded(archive: Archive, root: Path, reason: object) -> DataError:
    return DataError(
        f"{archive.filename} could not be downloaded ({reason}); get {archive.url} elsewhere "
        f"and put it into {root}"
    )


def _fetch(archive: Archive, root: Path) -> None:
    """Downloads (unless the archive was put there by hand), checks and unpacks."""
    from torchvision.datasets.utils import check_integrity, download_url

    given, unfinished = root / archive.filename, root / f".{archive.folder}.{socket.gethostname()}"
    shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
    unfinished.mkdir()
    old_timeout = socket.getdefaulttimeout()
    try:
        if os.path.lexists(given):
            require_file(given)
        if not given.exists():
            socket.setdefaulttimeout(STALL_S)
            try:
                with contextlib.redirect_stderr(io.StringIO()):  # tqdm
                    download_url(archive.url, str(unfinished), archive.filename, archive.md5)
            except (OSError, RuntimeError, http.client.HTTPException) as error:
                raise _undownloaded(archive, root, error) from error
            os.replace(unfinished / archive.filename, given)
        elif not check_integrity(given, archive.md5):
            raise DataError(
                f"{given} is damaged (its md5 is not {archive.md5}); "
                f"delete it or replace it by {archive.url}"
            )
        unpack(given, unfinished)
        if not (unfinished / archive.folder).is_dir():
            raise DataError(f"{given} holds no folder {archive.folder}")
        try:
            os.replace(unfinished / archive.folder, root / archive.folder)
        except OSError:
            if not (root / archive.folder).is_dir():  # else another node was faster
                raise
    finally:
        socket.setdefaulttimeout(old_timeout)
        shutil.rmtree(unfinished, ignore_errors=True)
