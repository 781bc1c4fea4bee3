"""Names of files as they can be printed, and files that are files."""

import os
import stat
from pathlib import Path

from dbdist.errors import DataError

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def shown(path: str | Path) -> str:
    r"""The name as it can be printed anywhere: a byte that is not UTF-8 becomes \xe9."""
    try:
        text = os.fsencode(path).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # no name of a file
        text = str(path).encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def require_file(path: Path) -> os.stat_result:
    """Returns what the file system says of a file.

    Raises DataError where it is missing or no plain file. Call it before opening: a named pipe in
    place of a file is waited for without end.
    """
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        if path.is_symlink():
            raise DataError(
                f"{shown(path)} is a link to {shown(os.readlink(path))}, which cannot be followed"
            ) from None
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            raise DataError(f"{shown(path)} is missing") from None
        raise DataError(f"{shown(path)} cannot be read ({error})") from None
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        raise DataError(f"{shown(path)} is {kind}, not a file")
    return status
