"""Files that are on disk whole or not at all, a lock on a folder, and files that are files."""

import errno
import fcntl
import json
import os
import stat
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from io import BufferedReader, BufferedWriter
from pathlib import Path
from typing import Any


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file under its name only once all of it is on disk; see `writing_whole`."""
    with writing_whole(path) as file:
        file.write(content)


@contextmanager
def writing_whole(path: Path) -> Iterator[BufferedWriter]:
    """A file to write, which gets its name only once all of it is on disk.

    Several processes may write the same file: one of them wins. Raises OSError, and then leaves
    the file as it was.
    """
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        with suppress(OSError):  # the first error is the one to report
            partial.unlink()


def write_json(path: Path, content: Mapping[str, Any], indent: int = 2) -> None:
    """Writes a JSON file whole or not at all; raises OSError."""
    write_whole(path, json.dumps(content, indent=indent).encode() + b"\n")


def sync_folder(path: Path) -> None:
    """Brings a folder's entries to disk; raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that has no such call
            raise
    finally:
        os.close(descriptor)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes other processes wait that lock the same folder.

    Without effect where the file system has no locks. Raises OSError without the folder.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def hold(folder: Path) -> int:
    """Keeps `is_held` true for a folder until the descriptor that it returns is closed.

    Waits for nobody. Raises OSError without the folder.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    return descriptor


def is_held(folder: Path) -> bool:
    """Whether a process holds this folder; False where the file system has no locks."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except OSError as error:
        return error.errno in (errno.EAGAIN, errno.EACCES)
    finally:
        os.close(descriptor)


def open_file(path: Path) -> BufferedReader:
    """Opens a file to read it; raises OSError at once for a pipe, a device or a folder.

    An ordinary open of a pipe waits until somebody writes into it.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, "it is a pipe or a device, not a file", str(path))


def check_file(path: Path) -> None:
    """Raises OSError unless `open_file` can open it: for readers that open files themselves."""
    open_file(path).close()


def read_file(path: Path) -> bytes:
    """The content of a file; raises OSError, at once for a pipe, a device or a folder."""
    with open_file(path) as file:
        return file.read()
