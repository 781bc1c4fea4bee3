"""Pictures drawn in a process of their own."""

import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from dbdist.monitor.levels import levels_of
from dbdist.monitor.painter import Painter
from dbdist.processes.gaussian import NoiseSchedule

LEVELS = levels_of(NoiseSchedule(2))
assert LEVELS is not None
REQUEST = {"levels": asdict(LEVELS)}

pytestmark = pytest.mark.usefixtures("pictures")


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""  # a zombie has no words
    except OSError:
        return False


def test_pictures_come_in_order_nobody_waits_and_the_process_ends():
    painter = Painter()
    started = time.monotonic()
    for step in (1, 2):
        painter.ask("a", step, REQUEST)
        assert painter.collect() == []
    assert time.monotonic() - started < 1.0
    process = painter._process
    assert process is not None
    pictures = painter.collect(patience_s=60.0)
    assert [(tag, step) for tag, step, _ in pictures] == [("a", 1), ("a", 2)]
    assert all(png.startswith(b"\x89PNG") for *_, png in pictures)
    assert painter.collect() == []
    painter.close()
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)

    painter.ask("b", 3, {"levels": {}})
    with pytest.raises(OSError, match="KeyError"):
        painter.collect(patience_s=60.0)
    assert painter.collect() == []
    painter.close()


def test_the_process_ends_when_the_one_that_asks_is_killed():
    code = f"""
import os, signal
from dbdist.monitor.painter import Painter
painter = Painter()
painter.ask("a", 1, {REQUEST!r})
painter.collect()
print(painter._process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    command = [sys.executable, "-c", code]
    pid = int(subprocess.run(command, capture_output=True, check=False).stdout)
    until = time.monotonic() + 60
    while is_running(pid) and time.monotonic() < until:
        time.sleep(0.05)
    assert not is_running(pid)


def test_a_process_that_dies_is_an_error_and_the_next_picture_has_another():
    painter = Painter()
    painter.ask("a", 1, REQUEST)
    painter.collect()
    assert painter._process is not None
    painter._process.kill()
    with pytest.raises(OSError, match="ended with code -9"):
        painter.collect(patience_s=60.0)
    painter.close()
