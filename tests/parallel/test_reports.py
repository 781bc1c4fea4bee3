"""What torchrun's agent says about ranks that failed, read from the files they wrote."""

import json
import sys

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from dbdist.parallel.reports import shorten, write_line, write_traceback


@pytest.fixture
def usual(monkeypatch):
    """What the interpreter's own hook was asked to show."""
    shown = []
    monkeypatch.setattr(sys, "excepthook", lambda *error: shown.append(error[1]))
    shorten()
    return shown


def failed(*files):
    failures = {
        rank: ProcessFailure(rank, 100 + rank, 2, str(path)) for rank, path in enumerate(files)
    }
    return ChildFailedError("dbdist.train", failures)


def raise_in_hook(error):
    sys.excepthook(type(error), error, None)


def test_a_mistake_is_reported_as_its_line_alone(tmp_path, capsys, usual):
    write_line(str(tmp_path / "0.json"), "[r0] dbdist train: error: no such file")
    raise_in_hook(failed(tmp_path / "0.json", tmp_path / "absent.json"))
    assert capsys.readouterr().err == "[r0] dbdist train: error: no such file\n"
    assert usual == []


@pytest.mark.parametrize(
    "content",
    [
        None,
        {"message": "killed"},
        {"message": {"message": "x", "extraInfo": {"timestamp": "1", "py_callstack": "y"}}},
    ],
)
def test_reports_about_others_stay_as_they_are(tmp_path, capsys, usual, content):
    if content is not None:
        (tmp_path / "0.json").write_text(json.dumps(content))
    error = failed(tmp_path / "0.json")
    raise_in_hook(error)
    raise_in_hook(ValueError("x"))
    assert usual[0] is error
    assert str(usual[1]) == "x"
    assert capsys.readouterr().err == ""


def test_torchrun_shows_the_line_and_the_traceback_that_were_written(tmp_path):
    write_line(str(tmp_path / "0.json"), "the line")
    assert "the line" in str(failed(tmp_path / "0.json"))
    try:
        raise ValueError("broken")
    except ValueError as error:
        write_traceback(str(tmp_path / "1.json"), error)
    report = str(failed(tmp_path / "1.json"))
    assert "Traceback (most recent call last)" in report
    assert "ValueError: broken" in report


def test_a_file_that_cannot_be_written_is_no_error(tmp_path):
    write_line(str(tmp_path / "absent" / "0.json"), "the line")
