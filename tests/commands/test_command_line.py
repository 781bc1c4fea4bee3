"""What every command shares: nothing printed raises, words that mean files, who imports what."""

import io
import subprocess
import sys

import pytest

from dbdist.commands.command_line import announce, print_anything, with_first, with_home


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["digits", "--seed", "1"], ["--config", "digits", "--seed", "1"]),
        (["--seed", "1"], ["--seed", "1"]),
        (["--config", "digits"], ["--config", "digits"]),
        ([], []),
    ],
)
def test_a_leading_word_is_what_the_command_is_about(words, expected):
    assert with_first("--config", words) == expected


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("~/runs", "/home/of/me/runs"),
        ("~", "/home/of/me"),
        ("--out=~/x", "--out=/home/of/me/x"),
        ("0=~/a", "0=/home/of/me/a"),
        ("a~b", "a~b"),
        ("--seed=1", "--seed=1"),
    ],
)
def test_home_is_put_in_place_of_its_sign_in_every_word(monkeypatch, word, expected):
    monkeypatch.setenv("HOME", "/home/of/me")
    assert with_home(word) == expected


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_what_a_terminal_cannot_show_is_printed_as_a_number(monkeypatch, encoding):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    print_anything()
    for stream in (sys.stdout, sys.stderr):
        print("läufe \udce9 ┏", file=stream, flush=True)
        text = stream.buffer.getvalue().decode(encoding)
        assert text.startswith("l")
        assert "\\udce9" in text


def test_an_output_that_a_notebook_replaced_is_left_as_it_is(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    print_anything()


def modules_after(*words):
    """The modules that a command has imported when it ends."""
    code = (
        "import sys\nfrom dbdist.cli import main\n"
        f"try:\n    main({list(words)!r})\nexcept SystemExit:\n    pass\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return set(result.stderr.split())


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["configs"], ["configs", "--help"]])
def test_what_needs_no_torch_imports_none(words):
    assert not modules_after(*words) & {"torch", "jsonargparse", "numpy", "yaml", "rich"}


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_help_of_options_and_mistakes_in_them_need_no_torch(command):
    assert "torch" not in modules_after(command, "--help")


def test_the_package_imports_no_torch():
    code = "import dbdist, sys; print('torch' in sys.modules)"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert result.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("rank", "line"), [("0", "dbdist train: starting 3 ranks, importing torch\n"), ("1", "")]
)
def test_rank_0_says_that_a_command_starts_before_torch_is_there(monkeypatch, capsys, rank, line):
    place = {"RANK": rank, "WORLD_SIZE": "3", "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "3"}
    for name, value in {**place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(sys.modules, "torch", io)
    announce("dbdist train")
    assert capsys.readouterr().out == ""
    monkeypatch.delitem(sys.modules, "torch")
    announce("dbdist train")
    assert capsys.readouterr().out == line
