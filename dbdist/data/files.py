"""The files of a dataset: fetched once per node, then found or refused by name.

Takes `DataConfig`, gives folders on disk that `datasets.py` reads. Nothing appears under its final
name before it is complete: downloads and extractions go to a hidden sibling folder first. CIFAR's
files are pickles, which can run code, so files that are not the published ones are walked with an
unpickler that knows only arrays and plain containers before torchvision may open them.
"""

import contextlib
import fcntl
import hashlib
import http.client
import io
import os
import pickle
import shutil
import socket
import threading
import urllib.request
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dbdist.config import DataConfig
from dbdist.errors import DataError

PROBE_S = 5.0
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


def cifar_class(name: str) -> Any:
    """torchvision's class of "cifar10" or "cifar100"."""
    from torchvision import datasets  # late: importing torchvision takes seconds

    return {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]


def archive_of(config: DataConfig) -> Archive | None:
    """The archive of this dataset; None where nothing is downloaded."""
    if config.name in ("cifar10", "cifar100"):
        published = cifar_class(config.name)
        parts = [filename for filename, _ in published.train_list + published.test_list]
        required = (*parts, published.meta["filename"])
        return Archive(
            published.base_folder, published.filename, published.url, published.tgz_md5, required
        )
    if config.name == "tiny-imagenet":
        return Archive(
            "tiny-imagenet-200",
            "tiny-imagenet-200.zip",
            "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
            "90528d7ca1a48142e341f4ef8d21d0de",
            ("train", "val/images", "val/val_annotations.txt"),
        )
    return None


def root_of(config: DataConfig) -> Path:
    """`data.root` as an absolute path."""
    return Path(config.root).expanduser().absolute()


def prepare(config: DataConfig) -> None:
    """Makes sure that the dataset's files are there, downloading them if need be.

    For one process per node; every other one waits and calls `load_dataset`, which never downloads.
    """
    archive, root = archive_of(config), root_of(config)
    if archive is not None and not (root / archive.folder).exists():
        if not (root / archive.filename).exists():
            _probe(archive, root)  # before the first folder is made
        try:
            root.mkdir(parents=True, exist_ok=True)
            with _lock(root):
                if not (root / archive.folder).exists():
                    _fetch(archive, root)
        except OSError as error:
            raise DataError(f"{archive.filename} cannot be unpacked in {root}: {error}") from error
    require(config)


def require(config: DataConfig) -> Path:
    """The folder of the dataset's files; DataError if it is missing or incomplete."""
    archive, root = archive_of(config), root_of(config)
    if archive is not None:
        folder, required = root / archive.folder, archive.required
        if not folder.is_dir():
            raise DataError(
                f"{folder} is missing; put {archive.filename} from {archive.url} into {root}"
            )
    elif config.name == "image_folder":
        folder, required = root, ("train", "test" if (root / "test").is_dir() else "val")
    else:
        return root  # digits and mnist5k come with their packages
    if missing := [path for path in required if not (folder / path).exists()]:
        remedy = "" if archive is None else "; delete the folder to have it fetched again"
        raise DataError(f"{folder} is incomplete: {', '.join(missing)} missing{remedy}")
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


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Holds off other processes of this node; some network file systems cannot, and are let pass."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _fetch(archive: Archive, root: Path) -> None:
    """Downloads (unless the archive was put there by hand), checks and unpacks."""
    from torchvision.datasets.utils import check_integrity, download_url, extract_archive

    given, partial = root / archive.filename, root / f".{archive.folder}.{socket.gethostname()}"
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    partial.mkdir()
    old_timeout = socket.getdefaulttimeout()
    try:
        if not given.exists():
            socket.setdefaulttimeout(STALL_S)
            try:
                with contextlib.redirect_stderr(io.StringIO()):  # tqdm
                    download_url(archive.url, str(partial), archive.filename, archive.md5)
            except (OSError, RuntimeError, http.client.HTTPException) as error:
                raise _undownloaded(archive, root, error) from error
            os.replace(partial / archive.filename, given)
        elif not check_integrity(given, archive.md5):
            raise DataError(
                f"{given} is damaged (its md5 is not {archive.md5}); "
                f"delete it or replace it by {archive.url}"
            )
        extract_archive(given, partial)
        if not (partial / archive.folder).is_dir():
            raise DataError(f"{given} holds no folder {archive.folder}")
        with contextlib.suppress(OSError if (root / archive.folder).is_dir() else ()):
            os.replace(partial / archive.folder, root / archive.folder)
    finally:
        socket.setdefaulttimeout(old_timeout)
        shutil.rmtree(partial, ignore_errors=True)


def check_cifar(config: DataConfig, split_list: list[list[str]], num_classes: int) -> None:
    """Refuses damaged or dangerous files among those of a split (torchvision's list) and the labels'.

    Files with the published md5 pass; others are walked, checked and warned about.
    """
    published, folder = cifar_class(config.name), require(config)
    label_key = "labels" if config.name == "cifar10" else "fine_labels"
    meta = published.meta
    others = []
    for filename, md5 in [*split_list, [meta["filename"], meta["md5"]]]:
        path = folder / filename
        content = path.read_bytes()
        if hashlib.md5(content, usedforsecurity=False).hexdigest() == md5:
            continue
        others.append(filename)
        entry = _walk(path, content)
        if filename == meta["filename"]:
            names = entry.get(meta["key"])
            if not isinstance(names, list) or len(names) != num_classes:
                raise DataError(f"{path} is damaged: {meta['key']} must list {num_classes} names")
        else:
            _check_batch(path, entry, label_key, num_classes)
    if others:
        warnings.warn(
            f"{', '.join(others)} in {folder} differ from the published {config.name} (md5); used anyway",
            stacklevel=2,
        )


def _check_batch(path: Path, entry: dict[str, Any], label_key: str, num_classes: int) -> None:
    data, labels = entry.get("data"), entry.get(label_key)
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape[1:] != (3072,):
        raise DataError(f"{path} is damaged: data must be a uint8 array of shape (n, 3072)")
    if not isinstance(labels, list) or len(labels) != len(data):
        raise DataError(f"{path} is damaged: {label_key} must list {len(data)} labels")
    if not all(type(label) is int and 0 <= label < num_classes for label in labels):
        raise DataError(f"{path} is damaged: {label_key} must be integers 0..{num_classes - 1}")


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


def _walk(path: Path, content: bytes) -> dict[str, Any]:
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
