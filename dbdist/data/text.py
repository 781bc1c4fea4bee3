"""Windows of a text as ids of its symbols: the data sets kjv, text8 and text.

Takes `TextOptions`, gives batches of "tokens" (n, T). A training window starts at a multiple of T
plus an offset that the seed in its key draws, so that all windows of T symbols are seen in time;
test windows do not overlap, and what is left after the last whole one is dropped. Long texts are
turned into ids once a node and mapped into memory. [MASK] is no symbol of the data: models give it
the id V.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dbdist.data.base import Batch, Key
from dbdist.data.options import TextOptions
from dbdist.data.paths import shown
from dbdist.data.text_files import LETTERS, Text, root_of, text_of
from dbdist.data.tokenizers import (
    Bytes,
    Characters,
    Ids,
    Tokenizer,
    TokenizerId,
    encoded,
    read_tokenizer,
)
from dbdist.errors import DataError
from dbdist.whole_files import locked, writing_whole

IN_MEMORY_BYTES = 2**23
"""Texts up to this size are turned into characters or bytes by each process, in no time, and
nothing is written; for tokens, which take much longer, a sixteenth of it."""
FORMAT = 1
"""Of the files of ids; another number never reads the files of this one."""
MASK_SIGN = "□"
"""What `decode` shows for an id that is masked."""


@dataclass(frozen=True)
class TextSpec:
    """What a model must know of a text."""

    name: str
    vocabulary_size: int
    """Symbols V; ids are 0 .. V-1."""
    length: int
    """Symbols T in a window."""
    unit: Literal["character", "byte", "token"]
    """What a symbol is."""
    symbols: tuple[str, ...] | None
    """The character of each id; None for bytes and tokens."""
    tokenizer: TokenizerId | None = None
    """What tells the tokenizer's file from others, if there is one."""
    tokenizer_file: str | None = field(default=None, compare=False)
    """Where that file was; no part of the identity."""

    def identity(self) -> dict[str, Any]:
        """What tells this data from other data: the symbols and their number in a window."""
        values = asdict(self)
        del values["tokenizer_file"]
        return {k: [*v] if isinstance(v, tuple) else v for k, v in values.items()}

    def decode(self, ids: Tensor | Sequence[int]) -> str:
        """The text of ids; negative ones are masked. Raises DataError without the tokenizer."""
        tokenizer = _tokenizer_of(self)
        values: list[int] = ids.tolist() if isinstance(ids, Tensor) else [*ids]
        runs = groupby(values, key=lambda value: value < 0)
        return "".join(
            MASK_SIGN * len([*run]) if is_masked else tokenizer.decode([*run])
            for is_masked, run in runs
        )


@lru_cache(maxsize=4)
def _tokenizer_of(spec: TextSpec) -> Tokenizer:
    if spec.unit == "byte":
        return Bytes()
    if spec.tokenizer is None:
        return Characters(spec.symbols or ())
    if spec.tokenizer_file is None:
        raise DataError("the text cannot be shown: it needs its tokenizer, as data.tokenizer")
    tokenizer = read_tokenizer(spec.tokenizer_file)
    if tokenizer.identity != spec.tokenizer:
        raise DataError(f"{shown(spec.tokenizer_file)} is another tokenizer than that of the data")
    return tokenizer


class TextDataset:
    """One split of a text: windows of its ids."""

    def __init__(
        self, spec: TextSpec, ids: Ids, *, augments: bool = False, remarks: Sequence[str] = ()
    ) -> None:
        """ids: (n,). augments: windows start at any id, which the seeds in their keys draw."""
        self.spec = spec
        self.augments = augments
        self.remarks = remarks
        self._ids = ids

    @property
    def kind(self) -> str:
        """What the samples are, after their number."""
        units = f"{self.spec.length:,} {self.spec.unit}{'' if self.spec.length == 1 else 's'}"
        return f"windows of {units} ({self.spec.vocabulary_size:,} symbols)"

    def __len__(self) -> int:
        return len(self._ids) // self.spec.length

    def __getitem__(self, key: Key) -> Batch:
        """One window: its "tokens" (T,)."""
        return {"tokens": self.__getitems__([key])["tokens"][0]}

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        """The "tokens" (n, T) of these windows, int64."""
        starts = np.array([self._start(key) for key in keys], np.int64).reshape(-1, 1)
        windows = self._ids[starts + np.arange(self.spec.length)]
        return {"tokens": torch.from_numpy(windows.astype(np.int64))}

    def _start(self, key: Key) -> int:
        index, seed = (key, None) if isinstance(key, int) else key
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        first = index * self.spec.length
        if seed is None or not self.augments:
            return first
        # the last window has what is left, so that each of the n - T + 1 windows can be drawn
        choices = min(self.spec.length, len(self._ids) - self.spec.length + 1 - first)
        return first + seed % choices

    def digest(self) -> str:
        """SHA-256 of the ids and of T."""
        digest = hashlib.sha256(f"{self.spec.vocabulary_size} {self.spec.length}\n".encode())
        digest.update(np.ascontiguousarray(self._ids).data)
        return digest.hexdigest()


# The four functions of a data set


def spec_from(values: dict[str, Any]) -> TextSpec:
    """A spec from what `asdict` or `identity` made of it, by way of JSON."""
    given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    if given.get("tokenizer") is not None:
        given["tokenizer"] = TokenizerId(**given["tokenizer"])
    return TextSpec(**given)


def located(spec: TextSpec, options: TextOptions) -> TextSpec:
    """The spec that a checkpoint kept, with the place of its tokenizer."""
    file = os.path.abspath(options.tokenizer) if spec.tokenizer else None
    return replace(spec, tokenizer_file=file)


def dataset_spec(options: TextOptions) -> TextSpec:
    """The configured set's spec; only the characters of a text of the user's are looked for."""
    return _spec(options, _tokenizer(options))


def load_dataset(options: TextOptions, split: Literal["train", "test"]) -> TextDataset:
    """A split of the configured set."""
    text, tokenizer = text_of(options), _tokenizer(options)
    part = "train" if split == "train" else options.held_out
    ids = _stored(options, text, tokenizer, part)
    if ids is None:
        pieces = [piece.astype(_dtype(tokenizer)) for piece in _ids_of(text, tokenizer, part)]
        ids = np.concatenate(pieces) if pieces else np.empty(0, _dtype(tokenizer))
    if len(ids) < options.length:
        raise DataError(
            f"the {part} text of {options.name} has {len(ids):,} {tokenizer.unit}s, which is less "
            f"than one window; data.length is {options.length:,}"
        )
    is_train = split == "train"
    remarks = () if is_train or tokenizer.unit != "character" else text.remarks
    spec, augments = _spec(options, tokenizer), is_train and options.random_offset
    return TextDataset(spec, ids, augments=augments, remarks=remarks)


def random_samples(options: TextOptions, num: int) -> TextDataset:
    """Windows of random symbols, for measurements without the text's file."""
    spec = dataset_spec(options)
    random = np.random.default_rng(0)
    ids = random.integers(spec.vocabulary_size, size=num * spec.length, dtype=np.int32)
    return TextDataset(spec, ids, augments=options.random_offset)


def prepare(options: TextOptions) -> None:
    """Makes sure that the text is there, and turns a long one into files of ids.

    For one process per node. Nothing is downloaded.
    """
    text, tokenizer = text_of(options), _tokenizer(options)
    if not _is_long(text, tokenizer):
        return
    for part in ("train", options.held_out):
        path = _file_of_ids(options, text, tokenizer, part)
        if path.exists():
            continue
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with locked(path.parent):
                if not path.exists():
                    _write(path, text, tokenizer, part)
        except OSError as error:
            raise DataError(
                f"{shown(path)} cannot be written ({error}); choose another folder with data.cache"
            ) from error


def _spec(options: TextOptions, tokenizer: Tokenizer) -> TextSpec:
    return TextSpec(
        name=options.name,
        vocabulary_size=tokenizer.vocabulary_size,
        length=options.length,
        unit=tokenizer.unit,
        symbols=tokenizer.symbols,
        tokenizer=tokenizer.identity,
        tokenizer_file=os.path.abspath(options.tokenizer) if tokenizer.identity else None,
    )


def _tokenizer(options: TextOptions) -> Tokenizer:
    if options.tokenizer == "bytes":
        return Bytes()
    if options.tokenizer != "characters":
        return read_tokenizer(options.tokenizer)
    return Characters(text_of(options).symbols if options.name == "text" else LETTERS)


def _ids_of(text: Text, tokenizer: Tokenizer, part: str) -> Iterator[Ids]:
    return encoded(tokenizer, text.read(part))


# Files of ids


def _is_long(text: Text, tokenizer: Tokenizer) -> bool:
    limit = IN_MEMORY_BYTES if tokenizer.cut == "anywhere" else IN_MEMORY_BYTES // 16
    return text.stream.size > limit


def _dtype(tokenizer: Tokenizer) -> np.dtype[Any]:
    """The narrowest type that holds every id; the first byte in a file is the lowest."""
    size = tokenizer.vocabulary_size
    return np.dtype("<u1" if size <= 2**8 else "<u2" if size <= 2**16 else "<i4")


def _file_of_ids(options: TextOptions, text: Text, tokenizer: Tokenizer, part: str) -> Path:
    """Its name holds a digest of all that its content depends on."""
    source = [FORMAT, text.digest, text.parts[part], tokenizer.unit, tokenizer.symbols]
    if tokenizer.identity is not None:
        source.append(asdict(tokenizer.identity))
    digest = hashlib.sha256(json.dumps(source).encode()).hexdigest()
    root = root_of(options)
    beside = root.parent if options.name == "text" and not root.is_dir() else root
    folder = beside / ".dbdist"
    if options.cache is not None:
        folder = Path(options.cache).expanduser().absolute()
    return folder / f"{part}-{digest[:32]}.{_dtype(tokenizer).name}"


def _write(path: Path, text: Text, tokenizer: Tokenizer, part: str) -> None:
    with writing_whole(path) as file:
        for piece in _ids_of(text, tokenizer, part):
            file.write(piece.astype(_dtype(tokenizer)).data)


def _stored(options: TextOptions, text: Text, tokenizer: Tokenizer, part: str) -> Ids | None:
    """The ids of a long text that `prepare` has written; None where there are none."""
    if not _is_long(text, tokenizer):
        return None
    path, dtype = _file_of_ids(options, text, tokenizer, part), _dtype(tokenizer)
    try:
        size = os.stat(path).st_size
        if size == 0:
            return np.empty(0, dtype)
        ids = np.memmap(path, dtype, "r")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{shown(path)} cannot be read ({error}); delete it") from error
    if int(ids.max()) >= tokenizer.vocabulary_size:
        raise DataError(f"{shown(path)} is damaged; delete it")
    return ids
