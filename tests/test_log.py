"""Lines on stderr: one prefix, one handler, and nothing that can end a run."""

import io
import sys

import pytest

from dbdist import log


@pytest.fixture(autouse=True)
def nowhere():
    yield
    log.leave()
    log.share_terminal(None)


def test_a_process_by_itself_has_no_prefix(capsys):
    log.warning("slow")
    assert capsys.readouterr().err == "warning: slow\n"


def test_a_rank_is_named_with_its_block_and_step(capsys):
    log.join(3, 1)
    log.warning("a")
    log.set_step(120)
    log.warning("b")
    log.join(0, None)
    log.warning("c")
    log.leave()
    log.warning("d")
    assert capsys.readouterr().err.splitlines() == [
        "[r3 b1] warning: a",
        "[r3 b1 step 120] warning: b",
        "[r0] warning: c",
        "warning: d",
    ]


def test_a_warning_of_another_rank_keeps_its_place(capsys):
    log.join(0, 0)
    log.warning("late", at="[r2 b2 step 7] ")
    assert capsys.readouterr().err == "[r2 b2 step 7] warning: late\n"


def test_a_warning_is_one_line(capsys):
    log.warning("two\n  lines and 100 %s")
    assert capsys.readouterr().err == "warning: two lines and 100 %s\n"


class Ascii(io.StringIO):
    encoding = "ascii"


def test_what_the_terminal_cannot_show_is_escaped(monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream := Ascii())
    log.warning("läufe \udce9")
    assert stream.getvalue() == "warning: l\\xe4ufe \\udce9\n"


class Broken:
    encoding = "utf-8"

    def write(self, text):
        raise OSError(28, "No space left on device")


def test_a_line_that_cannot_be_shown_is_lost_without_an_error(monkeypatch):
    closed = io.StringIO()
    closed.close()
    for stream in (closed, Broken(), None):
        monkeypatch.setattr(sys, "stderr", stream)
        log.warning("x")


def test_a_live_display_shows_the_lines_while_it_has_the_terminal(capsys):
    shown = []
    log.share_terminal(shown.append)
    log.warning("a")
    log.share_terminal(None)
    log.warning("b")
    assert shown == ["warning: a"]
    assert capsys.readouterr().err == "warning: b\n"
