"""Files on disk whole or not at all, locks on folders, and what is no file."""

import os
import threading
import time
from pathlib import Path

import pytest

from dbdist.whole_files import (
    check_file,
    hold,
    is_held,
    locked,
    open_file,
    read_file,
    write_json,
    write_whole,
    writing_whole,
)


def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})

    def refuse(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, b"other")
    assert path.read_text() == '{\n  "a": 1\n}\n'
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_file_gets_its_name_only_when_all_of_it_is_written(tmp_path):
    path = tmp_path / "a"
    with writing_whole(path) as file:
        file.write(b"one ")
        assert not path.exists()
        file.write(b"two")
    assert path.read_bytes() == b"one two"

    def write_half():
        with writing_whole(path) as file:
            file.write(b"half")
            raise KeyError

    with pytest.raises(KeyError):
        write_half()
    assert path.read_bytes() == b"one two"
    assert os.listdir(tmp_path) == ["a"]


def test_a_folder_is_locked_by_one_at_a_time(tmp_path):
    entered = []

    def enter():
        with locked(tmp_path):
            entered.append(time.monotonic())

    with locked(tmp_path):
        thread = threading.Thread(target=enter)
        thread.start()
        time.sleep(0.1)
        assert not entered
    thread.join(10)
    assert len(entered) == 1


def test_a_folder_is_held_until_the_last_holder_lets_go(tmp_path):
    assert not is_held(tmp_path)
    first, second = hold(tmp_path), hold(tmp_path)
    os.close(first)
    assert is_held(tmp_path)
    os.close(second)
    assert not is_held(tmp_path)
    assert not is_held(tmp_path / "missing")


def test_a_pipe_a_device_or_a_folder_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        for function in (open_file, check_file, read_file):
            with pytest.raises(OSError, match=r"not a file|Is a directory"):
                function(path)
    with pytest.raises(FileNotFoundError):
        read_file(tmp_path / "missing")
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "link").symlink_to("file")
    assert read_file(tmp_path / "link") == b"x"
