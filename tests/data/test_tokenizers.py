"""Text becomes symbols and symbols become the text again; pieces give the symbols of the whole."""

import builtins
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from text_sets import PROSE, hugging_face_file, sentencepiece_file

from dbdist.data.tokenizers import (
    Bytes,
    Characters,
    Tokenizer,
    at_spaces,
    encoded,
    read_tokenizer,
)
from dbdist.errors import DataError

ACCENTS = "für 日本 🎈 a\nb"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tokenizers")
    return {
        "prefix": sentencepiece_file(folder / "prefix.model"),
        "unigram": sentencepiece_file(folder / "unigram.model", kind="unigram"),
        "no prefix": sentencepiece_file(folder / "none.model", add_dummy_prefix=False),
        "byte-level": hugging_face_file(folder / "tokenizer.json"),
    }


NAMES = ["prefix", "unigram", "no prefix", "byte-level"]


def in_pieces(content: bytes, size: int) -> list[bytes]:
    return [content[i : i + size] for i in range(0, len(content), size)]


def ids_of(tokenizer: Tokenizer, content: bytes, size: int) -> list[int]:
    return np.concatenate([*encoded(tokenizer, in_pieces(content, size))]).tolist()


def test_characters_are_numbered_by_their_order() -> None:
    tokenizer = Characters(("b", "a", " "))
    assert tokenizer.encode("ab a").tolist() == [1, 0, 2, 1]
    assert (tokenizer.vocabulary_size, tokenizer.unit) == (3, "character")


def test_bytes_are_those_of_utf_8() -> None:
    assert Bytes().encode("aé").tolist() == [97, 0xC3, 0xA9]
    assert Bytes().decode([97, 0xC3]) == "a\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("tokenizer", [Characters(sorted(set(ACCENTS))), Bytes()])
def test_any_text_comes_back_from_characters_and_bytes(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode(ACCENTS).tolist()) == ACCENTS


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("tokenizer", [Characters(sorted(set(ACCENTS))), Bytes()])
def test_pieces_may_end_inside_a_character(tokenizer: Tokenizer, size: int) -> None:
    assert ids_of(tokenizer, ACCENTS.encode(), size) == tokenizer.encode(ACCENTS).tolist()


@pytest.mark.parametrize("text", ["abc", "é", "b\U0010ffff"])
def test_a_character_that_is_not_known_is_named(text: str) -> None:
    unknown = next(c for c in text if c not in "ab")
    with pytest.raises(DataError, match="none of the 2 known characters") as caught:
        Characters("ab").encode(text)
    assert ascii(unknown) in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_files_give_what_their_packages_give(files: dict[str, Path], name: str) -> None:
    tokenizer = read_tokenizer(str(files[name]))
    assert tokenizer.unit == "token"
    assert tokenizer.symbols is None
    assert tokenizer.identity is not None
    assert len(tokenizer.identity.sha256) == 64
    if name == "byte-level":
        from tokenizers import Tokenizer as Read

        read = Read.from_file(str(files[name]))
        read.no_truncation()
        expected = read.encode(PROSE, add_special_tokens=False).ids
        assert tokenizer.vocabulary_size == 330
    else:
        import sentencepiece

        pieces: Any = sentencepiece.SentencePieceProcessor(model_file=str(files[name]))
        expected = pieces.encode(PROSE)
        assert tokenizer.vocabulary_size == len(pieces)
    ids = tokenizer.encode(PROSE).tolist()
    assert ids == expected
    assert len(ids) < len(PROSE) / 1.5
    assert max(ids) < tokenizer.vocabulary_size
    assert tokenizer.decode(ids) == PROSE


@pytest.mark.parametrize("name", NAMES)
def test_a_text_in_pieces_becomes_the_tokens_of_the_whole(
    files: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = read_tokenizer(str(files[name]))
    assert tokenizer.cut == {"no prefix": "before space", "byte-level": "before space"}.get(
        name, "at space"
    )
    num_pieces = []

    def at_every_space(texts: Any, *, keeps_space: bool) -> list[str]:
        found = [*at_spaces(texts, keeps_space=keeps_space, size=1)]
        num_pieces.append(len(found))
        return found

    monkeypatch.setattr("dbdist.data.tokenizers.at_spaces", at_every_space)
    content = (PROSE.strip() + "  two spaces\nand a line " + PROSE.strip()).encode()
    assert ids_of(tokenizer, content, 5) == tokenizer.encode(content.decode()).tolist()
    assert num_pieces[0] > 100


@pytest.mark.parametrize("keeps_space", [False, True])
@pytest.mark.parametrize("size", [1, 3, 10, 1000])
def test_text_is_cut_at_single_spaces_only(keeps_space: bool, size: int) -> None:
    text = " a b  c d\n e ff " + "x" * 20 + " y "
    pieces = [*at_spaces([text[i : i + 4] for i in range(0, len(text), 4)], keeps_space=False)]
    assert pieces == [text]  # shorter than the usual size
    pieces = [*at_spaces([text], keeps_space=keeps_space, size=size)]
    assert ("" if keeps_space else " ").join(pieces) == text
    assert all(len(piece) >= size for piece in pieces[:-1])
    for before, after in pairwise(pieces):
        assert not before[-1].isspace()
        assert after[0].isspace() == keeps_space


def test_a_text_without_spaces_is_cut_before_it_fills_the_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dbdist.data.tokenizers.LONGEST", 10)
    pieces = [*at_spaces(["x" * 6] * 5, keeps_space=True, size=1)]
    assert "".join(pieces) == "x" * 30
    assert max(map(len, pieces)) == 12


def test_an_id_beyond_the_vocabulary_is_refused() -> None:
    tokenizer = Bytes()
    tokenizer.vocabulary_size = 100
    with pytest.raises(DataError, match="gives the id 122, but it has 100 symbols"):
        [*encoded(tokenizer, [b"az"])]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.model", None, "is missing"),
        ("a.json", b"{}", "is no tokenizer that can be used"),
        ("a.json", b"\xff", "is no tokenizer that can be used"),
        ("a.model", b"nothing", "is no tokenizer that can be used"),
        ("a.model", b"", "is no tokenizer that can be used"),
        (
            "a.json",
            b'{"version":"1.0","model":{"type":"WordLevel","vocab":{"a":0,"b":7},"unk_token":"a"}}',
            "it has 2 entries, but one has the id 7",
        ),
    ],
    ids=["missing", "empty json", "no utf-8", "no model", "empty", "gap"],
)
def test_a_file_that_is_no_tokenizer_is_refused(
    tmp_path: Path, name: str, content: bytes | None, expected: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=expected) as caught:
        read_tokenizer(str(path))
    assert str(caught.value).isprintable()
    assert str(path) in str(caught.value)


def test_a_folder_in_place_of_a_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.model").mkdir()
    with pytest.raises(DataError, match="is a folder, not a file"):
        read_tokenizer(str(tmp_path / "a.model"))


@pytest.mark.parametrize("name", ["prefix", "byte-level"])
def test_a_missing_package_is_answered_with_what_to_install(
    files: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(module: str, *arguments: Any, **named: Any) -> Any:
        if module in ("sentencepiece", "tokenizers"):
            raise ImportError(module)
        return real(module, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match="needs the package") as caught:
        read_tokenizer(str(files[name]))
    assert "pip install 'dbdist[tokenizers]'" in str(caught.value)
