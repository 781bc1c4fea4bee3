"""YAML as people write it: read as they mean it, or refused in one sentence that says where."""

import os
import re
from pathlib import Path

import pytest
import yaml

from dbdist.config.yaml_files import load_yaml, nested, read_yaml
from dbdist.errors import ConfigError


@pytest.fixture
def refusal(tmp_path):
    """Why a file with this content is refused."""

    def why(content):
        path = tmp_path / "config.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(ConfigError) as caught:
            read_yaml(path)
        message = str(caught.value)
        assert str(path) in message
        assert "\n" not in message
        return message

    return why


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e4", 50_000),
        ("1e3", 1000),
        ("600.0", 600),
        ("1_000", 1000),
        ("0x10", 16),
        ("-7", -7),
        ("0", 0),
        ("1e-3", 1e-3),
        ("1.5", 1.5),
        (".5", 0.5),
        ("-.inf", float("-inf")),
        ("1e400", float("inf")),
        ("9007199254740993e2", 9007199254740993e2),
        ("on", True),
        ("off", False),
        ("'on'", "on"),
        ("'0100'", "0100"),
        ("~", None),
        ("null", None),
        ("2026-11-27", "2026-11-27"),
        ("1.2.3", "1.2.3"),
        ("~/runs", "~/runs"),
        ("", None),
        ("# nothing", None),
    ],
)
def test_a_value_is_what_it_seems_to_be(text, value):
    result = load_yaml(text)
    assert result == value
    assert type(result) is type(value)


@pytest.mark.parametrize("text", ["0100", "-010", "1:30", "12:30:45", "1:30.5", "00"])
def test_a_number_that_can_be_read_in_two_ways_is_refused_with_its_line(refusal, text):
    message = refusal(f"train:\n  max_steps: {text}\n")
    assert f"{text} (line 2)" in message
    assert "in quotes" in message


@pytest.mark.parametrize(
    ("text", "key", "lines"),
    [
        ("train: {lr: 1}\nseed: 1\ntrain: {eps: 1}\n", "train", (1, 3)),
        ("train:\n  lr: 0.1\n  lr: 0.2\n", "lr", (2, 3)),
        ("data:\n  augment:\n    flip: on\n    flip: off\n", "flip", (3, 4)),
        ("a: [{x: 1, x: 1}]\n", "x", (1, 1)),
    ],
)
def test_a_key_that_stands_twice_is_refused_with_both_lines(refusal, text, key, lines):
    assert f"the key {key} stands twice (line {lines[0]} and line {lines[1]})" in refusal(text)


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"train.lr": 1, "train": {"lr": 2}}, "train.lr"),
        ({"train": {"lr": 2}, "train.lr": 1}, "train.lr"),
        ({"data.augment.flip": 1, "data": {"augment.flip": 2}}, "data.augment.flip"),
        ({"train": 5, "train.lr": 1}, "train"),
    ],
)
def test_a_key_that_stands_twice_in_two_spellings_is_refused(values, key):
    with pytest.raises(ConfigError, match=re.escape(f"the key {key} stands twice")):
        nested(values)


def test_dotted_keys_join_their_section():
    values = {"train.lr": 1, "train": {"eps": 2}, "data": None, "data.augment.flip": True}
    expected = {"train": {"lr": 1, "eps": 2}, "data": {"augment": {"flip": True}}}
    assert nested(values) == expected


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b]\n",
        "a: &a [*a]\n",
        "a: &a {b: *a}\n",
        "a: &a [1]\nb: [" + "*a, " * 101 + "]\n",
    ],
)
def test_aliases_that_expand_to_aliases_or_are_many_are_refused(refusal, text):
    assert "alias" in refusal(text)


def test_an_alias_of_a_value_or_a_section_is_read():
    assert load_yaml("a: &n 3\nb: *n\n") == {"a": 3, "b": 3}
    assert load_yaml("a: &s {x: 1, y: 2}\nb: {<<: *s, x: 5}\n")["b"] == {"x": 5, "y": 2}


@pytest.mark.parametrize(
    "content",
    [b"\xef\xbb\xbfseed: 5\n", b"seed: 5\r\n", b"seed: 5", b"---\nseed: 5\n...\n"],
    ids=["BOM", "CRLF", "no end of line", "markers"],
)
def test_what_editors_add_changes_nothing(tmp_path, content):
    (tmp_path / "config.yaml").write_bytes(content)
    assert read_yaml(tmp_path / "config.yaml") == {"seed": 5}


@pytest.mark.parametrize("content", [b"", b"\n", b"# nothing\n", b"---\n"])
def test_a_file_that_says_nothing_means_the_defaults(tmp_path, content):
    (tmp_path / "config.yaml").write_bytes(content)
    assert read_yaml(tmp_path / "config.yaml") == {}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("seed: 5\n".encode("utf-16"), "UTF-8"),
        (b"run_dir: caf\xe9\n", "UTF-8"),
        (b"seed: 5\n\0", "NUL"),
        (b"train:\n\tlr: 1\n", "line 2"),
        (b"a: 1\n---\nb: 2\n", "another document"),
        (b"- 1\n", "keys"),
        (b"run_dir: !!python/name:os.system\n", "line 1"),
        (b"x: " + b"y" * 10**6, "characters"),
    ],
)
def test_what_is_no_configuration_is_refused_with_the_reason(refusal, content, reason):
    assert reason in refusal(content)


@pytest.mark.timeout(20)
def test_what_is_no_regular_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path, Path("/dev/zero"), Path("/dev/null")):
        with pytest.raises(ConfigError, match=f"{path} "):
            read_yaml(path)


def test_python_objects_are_never_made():
    with pytest.raises(yaml.YAMLError):
        load_yaml("!!python/object/apply:os.getcwd []")
