"""Finds the pictures below class folders: ROOT/train/CLASS/…, and ROOT/val or ROOT/test.

Each real folder counts once, whatever links lead to it; what is hidden is left out; what looks like
a picture and is left out is counted. A class's index is its place among train's folders.
"""

import os
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from dbdist.data.paths import require_file, shown
from dbdist.data.pictures import ENDINGS
from dbdist.errors import DataError

LEFT_OUT = frozenset(
    "__macosx @eadir #recycle $recycle.bin lost+found thumbs.db desktop.ini".split()
) | {"system volume information"}
"""What systems leave in folders, beside all names that begin with a dot."""
OTHER_ENDINGS = frozenset(
    """.heic .heif .jxl .svg .svgz .psd .psb .xcf .raw .cr2 .cr3 .nef .arw .dng .orf .rw2 .raf .exr
    .hdr .tga .ico .icns .cur .pcx .sgi .dds .eps .wmf .emf .dcm .xpm .xbm .jxr .fits""".split()
)
"""Endings of pictures that are not read."""
TEXT_ENDINGS = frozenset(".txt .json .jsonl .xml .csv .tsv .md .yaml .yml .html .log".split())
"""Endings of files beside pictures, which may be many and are not looked into."""
_SIGNATURES = (
    *(b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*"),
    *(b"\0\0\0\x0cjP  ", b"qoif"),
)


class PictureFile(NamedTuple):
    """A file with a picture, and its size in bytes."""

    path: str
    """Text: a million of it is made and kept with less than a million of Path."""
    size: int


@dataclass
class Found:
    """Pictures with their labels, and what looked like pictures and was left out."""

    files: list[PictureFile] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    """Ending of the name -> how many files."""
    dead_links: list[Path] = field(default_factory=list)
    num_loose: int = 0
    """Pictures that lie beside the class folders."""
    loops: list[Path] = field(default_factory=list)
    """Links to folders that count elsewhere."""

    def remarks(self) -> list[str]:
        """What to say of files that were left out."""
        said = []
        if self.skipped:
            kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(self.skipped.items()))
            said.append(f"left out, as pictures of other kinds: {kinds}")
        if self.num_loose:
            said.append(f"left out, as pictures in no class folder: {self.num_loose}")
        for kind, links in (
            ("links that lead nowhere", self.dead_links),
            ("links to folders that count already", self.loops),
        ):
            if links:
                more = f" and {len(links) - 3} more" * (len(links) > 3)
                said.append(f"left out, as {kind}: {', '.join(map(shown, links[:3]))}{more}")
        return said


def class_folders(folder: Path) -> dict[str, Path]:
    """The folders of the classes by name, in the order of the classes.

    A name is printable text, the same for the two ways in which systems write an accent.
    """
    found: dict[str, Path] = {}
    for entry in _entries(folder):
        path = folder / entry.name
        if entry.is_symlink() and not os.path.exists(path):
            raise DataError(f"{shown(path)} is a link that leads nowhere; mend or remove it")
        if entry.is_dir():
            name = unicodedata.normalize("NFC", shown(entry.name))
            if name in found:
                raise DataError(f"{shown(folder)} has two folders of the name {name}")
            found[name] = path
    if not found:
        raise DataError(f"{shown(folder)} holds no class folders")
    return found


def find_pictures(root: Path, split: Literal["train", "test"]) -> Found:
    """The pictures of a split with their labels, in a fixed order.

    A class may have no pictures to test; a class to test must be one to train. A test split may be
    annotated as Tiny-ImageNet's is. Raises DataError, naming the folder.
    """
    train, held_out = root / "train", held_out_folder(root)
    classes, annotations = class_folders(train), held_out / "val_annotations.txt"
    if split == "test" and os.path.lexists(annotations):
        return _read_annotations(annotations, [*classes])
    folder = train if split == "train" else held_out
    folders = classes if split == "train" else class_folders(held_out)
    indices, found = {name: i for i, name in enumerate(classes)}, Found()
    seen = _identities(folders) | _surroundings(root, train, held_out)
    for name, path in folders.items():
        before = len(found.files)
        _add_pictures(path, indices.get(name, -1), found, seen)
        num_pictures = len(found.files) - before
        if name not in indices and num_pictures:
            raise DataError(
                f"{shown(path)} is no class of {shown(train)}, which has no folder {name}"
            )
        if split == "train" and not num_pictures:
            raise DataError(_why_empty(path, found))
    if not found.files:
        raise DataError(f"{shown(folder)} holds no pictures")
    beside = (folder / entry.name for entry in _entries(folder) if not entry.is_dir())
    found.num_loose = sum(path.suffix.lower() in ENDINGS for path in beside)
    return found


def held_out_folder(root: Path) -> Path:
    """Where the pictures to test are: ROOT/val, or ROOT/test where there is no ROOT/val."""
    return root / ("val" if (root / "val").is_dir() else "test")


def is_left_out(name: str) -> bool:
    """Whether a folder or file is hidden, or no data of anybody."""
    return name.startswith(".") or name.lower() in LEFT_OUT


def _why_empty(path: Path, found: Found) -> str:
    skipped = "".join(f"; {remark}" for remark in found.remarks())
    return f"{shown(path)} holds no pictures; add some or remove it{skipped}"


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What a folder holds that is not left out, by name."""
    try:
        with os.scandir(folder) as entries:
            kept = [entry for entry in entries if not is_left_out(entry.name)]
    except OSError as error:
        raise DataError(f"{shown(folder)} cannot be read ({error.strerror})") from None
    return sorted(kept, key=lambda entry: os.fsencode(entry.name))


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _surroundings(root: Path, *splits: Path) -> set[tuple[int, int]]:
    """The folders of the set and all above it: a link inside a class that leads there is a loop."""
    above = root.resolve()
    folders = [
        above,
        *above.parents,
        *splits,
        *(path for split in splits for path in split.iterdir()),
    ]
    return {_identity(folder) for folder in folders if folder.is_dir()}


def _identities(folders: dict[str, Path]) -> set[tuple[int, int]]:
    """Of the class folders, which must be different ones."""
    found: dict[tuple[int, int], Path] = {}
    for path in folders.values():
        other = found.setdefault(_identity(path), path)
        if other != path:
            raise DataError(f"{shown(other)} and {shown(path)} are the same folder")
    return {*found}


def _add_pictures(folder: Path, label: int, found: Found, seen: set[tuple[int, int]]) -> None:
    """Adds what lies below a class folder: folders by their paths, in each the files by name."""
    for _, files in sorted(_walk(folder, found, seen), key=lambda walked: os.fsencode(walked[0])):
        found.files += files
        found.labels += [label] * len(files)


def _walk(
    folder: Path, found: Found, seen: set[tuple[int, int]]
) -> Iterator[tuple[Path, list[PictureFile]]]:
    """(folder, its pictures) of this folder and all real folders below it that are not seen."""
    todo = [folder]
    while todo:
        current = todo.pop()
        files: list[PictureFile] = []
        for entry in _entries(current):
            if entry.is_symlink() and not os.path.exists(entry.path):
                found.dead_links.append(Path(entry.path))
            elif not entry.is_dir():
                if _is_picture(entry, found):
                    files.append(_file(entry))
            elif (identity := _identity(Path(entry.path))) in seen:
                found.loops.append(Path(entry.path))
            else:
                seen.add(identity)
                todo.append(Path(entry.path))
        yield current, files


def _file(entry: os.DirEntry[str]) -> PictureFile:
    """Raises DataError for what is no file."""
    status = entry.stat() if entry.is_file() else require_file(Path(entry.path))
    return PictureFile(entry.path, status.st_size)


def _is_picture(entry: os.DirEntry[str], found: Found) -> bool:
    """By the ending of the name; a file without one by its first bytes."""
    ending = os.path.splitext(entry.name)[1].lower()
    if ending in ENDINGS:
        return True
    is_one = ending in OTHER_ENDINGS
    if not is_one and ending not in TEXT_ENDINGS:
        is_one = _starts_like_one(Path(entry.path))
    if is_one and ending:
        found.skipped[ending] += 1
    return is_one and not ending


def _starts_like_one(path: Path) -> bool:
    if not path.is_file():  # a named pipe, which must not be opened
        return False
    try:
        with path.open("rb") as file:
            start = file.read(16)
    except OSError as error:
        raise DataError(f"{shown(path)} cannot be read ({error.strerror})") from None
    is_webp = start[:4] == b"RIFF" and start[8:12] == b"WEBP"
    return is_webp or start[4:12] == b"ftypavif" or start.startswith(_SIGNATURES)


def _read_annotations(annotations: Path, classes: list[str]) -> Found:
    """Lines of "file TAB class TAB …"; the files lie in the folder "images" beside it."""
    folder = annotations.parent / "images"
    present = {entry.name for entry in os.scandir(folder)} if folder.is_dir() else set()
    index, found = {name: i for i, name in enumerate(classes)}, Found()
    require_file(annotations)
    try:
        lines = annotations.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"{shown(annotations)} cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        filename, class_name, *_ = [*line.split("\t"), ""]
        place = f"{shown(annotations)} line {number}"
        if filename not in present:
            raise DataError(f"{place}: {shown(folder / filename)} is missing")
        if class_name not in index:
            raise DataError(f"{place}: no class of train is {class_name!r}")
        path = folder / filename
        found.files.append(PictureFile(str(path), require_file(path).st_size))
        found.labels.append(index[class_name])
    if not found.files:
        raise DataError(f"{shown(annotations)} is empty")
    return found
