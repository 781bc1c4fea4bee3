"""Ranks on this machine can be ended by each other; nobody else is."""

import os
import signal
import subprocess
import sys

import pytest

from dbdist.parallel.health.neighbours import Neighbours, own_address


@pytest.fixture
def processes():
    words = [sys.executable, "-c", "input()"]
    started = [subprocess.Popen(words, stdin=subprocess.PIPE) for _ in range(3)]
    yield started
    for process in started:
        process.kill()
        process.communicate()


def test_only_those_are_ended_who_are_named_and_here(processes):
    here, number = own_address()
    assert number == os.getpid()
    named, other, elsewhere = processes
    os.kill(named.pid, signal.SIGSTOP)
    addresses = [
        (here, number),
        (here, named.pid),
        (here, other.pid),
        ("another machine, or another container here", elsewhere.pid),
        None,
    ]
    neighbours = Neighbours(addresses)
    neighbours.kill([0, 1, 3, 4])  # 0 is this process
    assert named.wait(10) == -signal.SIGKILL
    assert other.poll() is elsewhere.poll() is None
    neighbours.kill([1])  # it has ended
    neighbours.close()
    neighbours.kill([2])
    assert other.poll() is None


def test_no_file_stays_open(processes):
    before = len(os.listdir("/proc/self/fd"))
    here, _ = own_address()
    neighbours = Neighbours([(here, process.pid) for process in processes])
    assert len(os.listdir("/proc/self/fd")) == before + len(processes)
    neighbours.close()
    assert len(os.listdir("/proc/self/fd")) == before
