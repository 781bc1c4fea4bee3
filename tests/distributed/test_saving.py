"""Runs whose checkpoints cannot be written, and runs that are killed: what is told and left."""

import re
import signal
import subprocess
import sys
import time

import pytest
from test_torchrun import ROOT, run

from dbdist.checkpoint.manifest import complete_folders, find_checkpoint
from dbdist.checkpoint.names import step_folders

OFTEN = ("--config", "configs/digits.yaml", "--checkpoint.every_steps", "2")


def complete_steps(run_dir):
    return [int(path.name[5:]) for path in complete_folders(run_dir / "checkpoints")]


def stand_in_the_way(run_dir, step):
    """No checkpoint of this step can be written."""
    path = run_dir / f"checkpoints/step-{step:08d}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("a file where a folder should be")


@pytest.mark.parametrize("num_ranks", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_training_goes_on_without_a_checkpoint_that_cannot_be_written(tmp_path, num_ranks):
    stand_in_the_way(tmp_path, 4)
    mode = ("--mode", "sequential") if num_ranks == 1 else ()
    words = "dbdist.train", *OFTEN, *mode, "--train.max_steps", 6, "--run_dir", tmp_path
    code, out, err, _ = run(*words, ranks=num_ranks)
    assert code == 0, err
    told = [line for line in err.splitlines() if "checkpoint of step" in line]
    assert len(told) == 1, err
    assert "warning: checkpoint of step 4 failed: rank 0: " in told[0]
    # On a busy machine step 6 may be complete by then.
    assert re.search(r"training goes on, the newest complete one is step [26]$", told[0])
    assert complete_steps(tmp_path) == [2, 6]
    assert "Summary" in out


@pytest.mark.slow
def test_a_run_whose_last_checkpoint_fails_ends_on_every_rank_with_that_error(tmp_path):
    stand_in_the_way(tmp_path, 6)
    words = "dbdist.train", *OFTEN, "--train.max_steps", 6, "--run_dir", tmp_path
    _, out, err, _ = run(*words, ranks=3)
    lines = [line for line in err.splitlines() if "dbdist train: error: " in line]
    assert len({line[:4] for line in lines}) == len(lines) == 3, "each rank's line begins [r0]"
    text = r"error: checkpoint of step 6, the last, failed: rank 0: .* complete one is step 4$"
    assert all(re.search(text, line) for line in lines), lines
    assert len(re.findall(r"exitcode +: 2 ", err)) == 3, err
    assert "Traceback" not in out + err[: err.index("torch/distributed/elastic")]
    assert complete_steps(tmp_path) == [2, 4]


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_from_a_complete_checkpoint(tmp_path):
    words = ["-m", "dbdist.train", "--config", "configs/digits.yaml", "--mode", "sequential"]
    words += ["--checkpoint.every_steps", "1", "--run_dir", str(tmp_path), "--train.max_steps"]
    process = subprocess.Popen(
        [sys.executable, *words, "100000"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 100
    while len(step_folders(tmp_path / "checkpoints")) < 3 and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read().decode()
    process.send_signal(signal.SIGKILL)  # two are complete and kept, the third has just begun
    process.communicate()
    checkpoint = find_checkpoint(tmp_path)
    assert checkpoint is not None
    for name in checkpoint.manifest["files"]:
        checkpoint.tensors(name)
    code, out, err, _ = run(*words[1:], checkpoint.step + 2)
    assert code == 0, err
    assert f"continuing from step {checkpoint.step}" in out
    steps = [checkpoint.step + 1, checkpoint.step + 2]
    assert complete_steps(tmp_path) == steps
    assert len(step_folders(tmp_path / "checkpoints")) == 2, "what was incomplete is gone"
