"""Unpacks the archives of published data sets; nothing of them lands outside its folder."""

import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

from dbdist.data.paths import shown
from dbdist.errors import DataError


def unpack(archive: Path, folder: Path) -> None:
    """Unpacks a .zip or .tar.gz below this folder.

    Raises DataError, in one sentence, for a damaged one, or a .tar.gz with devices, or whose
    members or links lead elsewhere. Absolute names, and all of a .zip's, are put inside.
    """
    try:
        if archive.suffix == ".zip":
            with zipfile.ZipFile(archive) as opened:
                opened.extractall(folder)
        else:
            with tarfile.open(archive) as tar:
                tar.extractall(folder, filter="data")
    except tarfile.FilterError as error:
        raise DataError(f"{shown(archive)} is refused: {_one_line(error)}") from error
    except (
        *(EOFError, OSError, struct.error, tarfile.TarError, zipfile.BadZipFile, zlib.error),
        *(NotImplementedError, RuntimeError, ValueError),  # zip: unknown, encrypted
    ) as error:
        raise DataError(f"{shown(archive)} cannot be unpacked: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(shown(str(error)).split()) or type(error).__name__
