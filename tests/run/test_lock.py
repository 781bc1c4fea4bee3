"""Two jobs never train the same block of a run directory; who dies holds nothing."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from dbdist.config.config import Config
from dbdist.config.options import TrainConfig
from dbdist.errors import ConfigError
from dbdist.models.options import ViTOptions
from dbdist.parallel.layout import Layout
from dbdist.parallel.topology import Topology
from dbdist.run import lock as run_lock
from dbdist.run.lock import NAME, RECORD_BYTES, sole_trainer
from dbdist.training.setup import train

HOLD = """
import os, sys, time
from pathlib import Path
from dbdist.run.lock import sole_trainer
with sole_trainer(Path(sys.argv[1]), [int(block) for block in sys.argv[2].split(",")], 1.0):
    worker = os.fork()  # as data loading does
    if worker:
        print(worker, flush=True)
    time.sleep(60)
"""


@contextmanager
def another_job(run_dir, blocks):
    """(a process that trains these blocks, the pid of its worker)"""
    words = [sys.executable, "-c", HOLD, str(run_dir), ",".join(map(str, blocks))]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout is not None
        worker = int(job.stdout.readline())
        try:
            yield job, worker
        finally:
            job.kill()
            os.kill(worker, signal.SIGKILL)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(run_lock, "PATIENCE_S", 0.3)


def test_the_same_block_is_refused_by_name_and_others_are_not(tmp_path):
    run_dir = tmp_path / "run"
    with another_job(run_dir, [0, 2]) as (job, _):
        with sole_trainer(run_dir, [1], 1.0):
            pass
        for blocks in ([2], [1, 2], range(3)):
            with pytest.raises(ConfigError) as told:
                with sole_trainer(run_dir, blocks, 1.0):
                    pytest.fail("two jobs train one block")
            block = 0 if 0 in blocks else 2
            assert f"{run_dir} is in use: process {job.pid} on " in str(told.value)
            assert f"trains block {block} there" in str(told.value)


def test_who_is_killed_holds_nothing_though_its_worker_lives(tmp_path):
    with another_job(tmp_path, [0]) as (job, worker):
        job.kill()
        job.wait()
        os.kill(worker, 0)  # raises if it has ended
        with sole_trainer(tmp_path, [0], 1.0):
            pass


def test_a_holder_on_another_machine_is_waited_for(tmp_path, capsys):
    with another_job(tmp_path, [0]) as (job, _):
        path = tmp_path / NAME
        path.write_bytes(path.read_bytes().replace(socket.gethostname().encode(), b"elsewhere"))
        start = time.monotonic()
        with pytest.raises(ConfigError, match="on elsewhere trains block 0"):
            with sole_trainer(tmp_path, [0], 1.0):
                pytest.fail("two jobs train one block")
        assert 1.0 < time.monotonic() - start < 3.0, "as long as the limit says"
        assert f"waits up to 1 s for process {job.pid} on elsewhere" in capsys.readouterr().err
        job.kill()  # as a file system gives the lock of a lost machine back
        with sole_trainer(tmp_path, [0], 5.0):
            assert f"process {os.getpid()} on".encode() in path.read_bytes()[:RECORD_BYTES]


def test_who_waits_while_others_come_and_go_is_the_only_one(tmp_path):
    """No file is removed under somebody who waits for it."""
    run_dir = tmp_path / "new/run"
    with pytest.raises(ConfigError, match="something else"):
        with sole_trainer(run_dir, [0], 1.0):
            raise ConfigError("something else")
    with another_job(run_dir, [1]):
        with pytest.raises(ConfigError, match="something else"):
            with sole_trainer(run_dir, [0], 1.0):
                raise ConfigError("something else")
        with pytest.raises(ConfigError, match="is in use"):
            with sole_trainer(run_dir, [0, 1], 1.0):
                pytest.fail("two jobs train one block")


def test_a_folder_that_cannot_be_made_is_told_in_a_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"):
        with sole_trainer(tmp_path / "file" / "run", [0], 1.0):
            pytest.fail("there is no folder")


def test_training_is_refused_before_anything_is_written(tmp_path):
    run_dir = tmp_path / "run"
    config = Config(
        mode="sequential",
        run_dir=str(run_dir),
        model=ViTOptions(num_layers=3),
        train=TrainConfig(max_steps=2),
    )
    with another_job(run_dir, [1]) as (job, _):
        with pytest.raises(ConfigError, match=f"process {job.pid} on .* trains block 1"):
            train(config.validate(), Topology(Layout(1)))
        assert os.listdir(run_dir) == [NAME]
