"""Files that are on disk whole or not at all."""

import errno
import json
import os
from pathlib import Path
from typing import Any


def write_json(path: Path, content: dict[str, Any]) -> None:
    """The file, on disk or not at all; its name is there once the folder is synced. Raises
    OSError."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w") as file:
        json.dump(content, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def sync_folder(path: Path) -> None:
    """Brings a folder's entries to disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that has no such call
            raise
    finally:
        os.close(descriptor)
