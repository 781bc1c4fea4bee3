"""Runs whose checkpoints cannot be written, and runs that are killed: what is told and left."""

import re
import signal

import pytest
from cases import cases
from machine import wait_until
from reading import complete_steps

from dbdist.checkpoint.manifest import find_checkpoint
from dbdist.checkpoint.names import step_folders

OFTEN = ("--config", "configs/digits.yaml", "--checkpoint.every_steps", "2")


def stand_in_the_way(run_dir, step):
    """No checkpoint of this step can be written."""
    path = run_dir / f"checkpoints/step-{step:08d}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("a file where a folder should be")


@pytest.mark.parametrize("num_ranks", cases([1, 3], fast=[1]))
def test_training_goes_on_without_a_checkpoint_that_cannot_be_written(machine, tmp_path, num_ranks):
    stand_in_the_way(tmp_path, 4)
    mode = ("--mode", "sequential") if num_ranks == 1 else ()
    words = "dbdist.train", *OFTEN, *mode, "--train.max_steps", 6, "--run_dir", tmp_path
    printed = machine.run(*words, ranks=num_ranks)
    told = [line for line in printed.splitlines() if "checkpoint of step" in line]
    assert len(told) == 1, printed
    assert "warning: checkpoint of step 4 failed: rank 0: " in told[0]
    # On a busy machine step 6 may be complete by then.
    assert re.search(r"training goes on, the newest complete one is step [26]$", told[0])
    assert complete_steps(tmp_path) == [2, 6]
    assert "Summary" in printed


def test_a_run_whose_last_checkpoint_fails_ends_on_every_rank_with_that_error(machine, tmp_path):
    stand_in_the_way(tmp_path, 6)
    words = "dbdist.train", *OFTEN, "--train.max_steps", 6, "--run_dir", tmp_path
    text = r"error: checkpoint of step 6, the last, failed: rank 0: .* complete one is step 4$"
    machine.assert_refused(words, 3, text)
    assert complete_steps(tmp_path) == [2, 4]


def test_a_run_that_is_killed_goes_on_from_a_complete_checkpoint(machine, tmp_path):
    words = ["dbdist.train", "--config", "configs/digits.yaml", "--mode", "sequential"]
    words += ["--checkpoint.every_steps", "1", "--run_dir", tmp_path, "--train.max_steps"]
    job = machine.python(*words, 100000)
    wait_until(job, lambda: len(step_folders(tmp_path / "checkpoints")) >= 3)
    job.send_signal(signal.SIGKILL)  # two are complete and kept, the third has just begun
    assert job.wait(10) == -signal.SIGKILL
    checkpoint = find_checkpoint(tmp_path)
    assert checkpoint is not None
    for name in checkpoint.manifest["files"]:
        checkpoint.tensors(name)
    printed = machine.run(*words, checkpoint.step + 2)
    assert f"continuing from step {checkpoint.step}" in printed
    assert complete_steps(tmp_path) == [checkpoint.step + 1, checkpoint.step + 2]
    assert len(step_folders(tmp_path / "checkpoints")) == 2, "what was incomplete is gone"
