"""How text becomes symbols and symbols become text: characters, bytes, or a file's tokens.

A tokenizer's file is read as data, by its own package. `encoded` takes bytes of any length in
pieces, so that a text need not fit into memory.
"""

import codecs
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from dbdist.data.paths import require_file, shown
from dbdist.errors import DataError
from dbdist.whole_files import read_file

Ids = NDArray[Any]
"""Symbols as integers of any width."""
Cut = Literal["anywhere", "before space", "at space"]
REMEDY = "pip install 'dbdist[tokenizers]' (in a checkout: uv sync --extra tokenizers)"
LONGEST = 2**22
"""Characters without a space after which a text is cut for a tokenizer all the same."""


@dataclass(frozen=True)
class TokenizerId:
    """What tells a tokenizer's file from others."""

    name: str
    """The package that reads it."""
    sha256: str


@runtime_checkable
class Tokenizer(Protocol):
    """Text to symbols and back."""

    @property
    def unit(self) -> Literal["character", "byte", "token"]: ...

    @property
    def vocabulary_size(self) -> int: ...

    @property
    def symbols(self) -> tuple[str, ...] | None:
        """What each symbol stands for; None unless it is one character."""
        ...

    @property
    def identity(self) -> TokenizerId | None:
        """Of the file, if there is one."""
        ...

    @property
    def cut(self) -> Cut:
        """Where text may be cut so that its pieces become the symbols of the whole."""
        ...

    def encode(self, text: str) -> Ids:
        """The symbols of a text. Raises DataError for what no symbol stands for."""
        ...

    def decode(self, ids: Sequence[int]) -> str: ...


class Characters:
    """A symbol for each of these characters, by their order."""

    unit: Literal["character"] = "character"
    cut: Cut = "anywhere"
    identity = None

    def __init__(self, symbols: Sequence[str]) -> None:
        self.symbols = tuple(symbols)
        self.vocabulary_size = len(self.symbols)
        codes = [ord(symbol) for symbol in self.symbols]
        self._ids = np.full(max(codes, default=0) + 2, -1, np.int32)  # the last is no character's
        self._ids[codes] = np.arange(len(codes))

    def encode(self, text: str) -> Ids:
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
        ids = self._ids[np.minimum(codes, len(self._ids) - 1)]
        if ids.size and ids.min() < 0:
            unknown = chr(int(codes[int(ids.argmin())]))
            raise DataError(
                f"the text holds {unknown!a}, which is none of the {self.vocabulary_size:,} "
                "known characters"
            )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.symbols[i] for i in ids)


class Bytes:
    """The 256 bytes of UTF-8."""

    unit: Literal["byte"] = "byte"
    cut: Cut = "anywhere"
    symbols = None
    identity = None
    vocabulary_size = 256

    def encode(self, text: str) -> Ids:
        return np.frombuffer(text.encode(), np.uint8)

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode("utf-8", "replace")


class SentencePieceFile:
    """A SentencePiece .model file."""

    unit: Literal["token"] = "token"
    symbols = None

    def __init__(self, content: bytes) -> None:
        from sentencepiece import SentencePieceProcessor

        self._pieces: Any = SentencePieceProcessor()
        self._pieces.LoadFromSerializedProto(content)
        self.vocabulary_size = int(self._pieces.GetPieceSize())
        self.identity = TokenizerId("sentencepiece", hashlib.sha256(content).hexdigest())
        self.cut: Cut = _cut_of(self)

    def encode(self, text: str) -> Ids:
        return np.array(self._pieces.EncodeAsIds(text), np.int64)

    def decode(self, ids: Sequence[int]) -> str:
        return self._pieces.DecodeIds([*ids])


class HuggingFaceFile:
    """A Hugging Face tokenizer.json file, without its special tokens, truncation and padding."""

    unit: Literal["token"] = "token"
    symbols = None

    def __init__(self, content: bytes) -> None:
        from tokenizers import Tokenizer as Read

        self._read = Read.from_str(content.decode())
        self._read.no_truncation()
        self._read.no_padding()
        self.vocabulary_size = self._read.get_vocab_size()
        highest = max(self._read.get_vocab().values(), default=0)
        if highest >= self.vocabulary_size:
            raise ValueError(
                f"it has {self.vocabulary_size:,} entries, but one has the id {highest:,}"
            )
        self.identity = TokenizerId("tokenizers", hashlib.sha256(content).hexdigest())
        self.cut: Cut = _cut_of(self)

    def encode(self, text: str) -> Ids:
        return np.array(self._read.encode(text, add_special_tokens=False).ids, np.int64)

    def decode(self, ids: Sequence[int]) -> str:
        return self._read.decode([*ids], skip_special_tokens=False)


def read_tokenizer(path: str) -> Tokenizer:
    """The tokenizer of a .model or .json file. Raises DataError."""
    file = Path(path).expanduser().absolute()
    require_file(file)
    kind = SentencePieceFile if file.suffix == ".model" else HuggingFaceFile
    try:
        return kind(read_file(file))
    except ImportError:
        package = "sentencepiece" if kind is SentencePieceFile else "tokenizers"
        raise DataError(f"{shown(file)} needs the package {package}: {REMEDY}") from None
    except Exception as error:  # the packages raise Exception itself
        reason = " ".join(str(error).split())
        raise DataError(f"{shown(file)} is no tokenizer that can be used: {reason}") from error


def _cut_of(tokenizer: Any) -> Cut:
    """Most put a space before the first word themselves; others keep the one that is there."""

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text).tolist()

    is_added = ids("a") + ids("b") == ids("a b") != ids("a") + ids(" b")
    return "at space" if is_added else "before space"


def encoded(tokenizer: Tokenizer, pieces: Iterable[bytes]) -> Iterator[Ids]:
    """The symbols of UTF-8 that comes in pieces, in pieces. Raises DataError."""
    texts = _decoded(pieces)
    if tokenizer.cut != "anywhere":
        texts = at_spaces(texts, keeps_space=tokenizer.cut == "before space")
    for text in texts:
        ids = tokenizer.encode(text)
        if ids.size and not 0 <= ids.min() <= ids.max() < tokenizer.vocabulary_size:
            raise DataError(
                f"the tokenizer gives the id {ids.max():,}, but it has "
                f"{tokenizer.vocabulary_size:,} symbols"
            )
        yield ids


def at_spaces(texts: Iterable[str], *, keeps_space: bool, size: int = 2**16) -> Iterator[str]:
    """The same text, cut at single spaces into pieces of at least this size."""
    rest = ""
    for text in texts:
        rest += text
        start = 0
        while (place := _single_space(rest, start + size)) >= 0:
            yield rest[start:place]
            start = place if keeps_space else place + 1
        rest = rest[start:]
        if len(rest) > LONGEST:
            yield rest
            rest = ""
    if rest:
        yield rest


def _single_space(text: str, start: int) -> int:
    """Where from here on a space stands between two other characters; -1 if nowhere."""
    place = text.find(" ", max(start, 1), len(text) - 1)
    while place >= 0 and (text[place - 1].isspace() or text[place + 1].isspace()):
        place = text.find(" ", place + 1, len(text) - 1)
    return place


def _decoded(pieces: Iterable[bytes]) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for piece in pieces:
            yield decoder.decode(piece)
        yield decoder.decode(b"", True)
    except UnicodeDecodeError as error:
        raise DataError(f"the text is not UTF-8 ({error.reason})") from None
