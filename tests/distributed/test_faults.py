"""Signals, stuck ranks and lost ones, on real processes: what is saved, what is reported, what is
left."""

import re
import signal
import sys
import time

import pytest
from cases import cases
from machine import signal_group, wait_for_checkpoint, wait_until
from reading import complete_steps, hashes_of, lines_of

from dbdist.bench.processes import listeners, listeners_of
from dbdist.checkpoint.manifest import newest_steps

TWO = """--config configs/digits.yaml --model.num_blocks 2 --model.num_layers 2 --train.log_every 5
    --checkpoint.every_steps 5 --checkpoint.keep_last 1000""".split()
ENDLESS = ["--train.max_steps", "100000"]


@pytest.fixture(scope="module")
def timeout_s(machine):
    """For stuck ranks: well above what two ranks need here and now from their start to a
    checkpoint."""
    start = time.monotonic()
    words = (*TWO, "--train.max_steps", 5, "--run_dir", machine.folder / "pace")
    machine.finish(machine.torchrun(2, "dbdist.train", *words))
    return max(6.0, 3 * (time.monotonic() - start))


def train(machine, ranks, *words, **more):
    return machine.torchrun(ranks, "dbdist.train", *TWO, *words, **more)


def stop_by_signal(machine, run_dir, *words, **more):
    """(step, what was printed) of two ranks of torchrun that stop because rank 1 gets SIGTERM."""
    job = train(machine, 2, *words, "--run_dir", run_dir, **more)
    wait_for_checkpoint(job, run_dir)
    signal_group(job.ranks()[1])  # what loads its data is not meant
    printed = machine.finish(job)
    (stopped,) = re.findall(r"stopped at step (\d+) \(SIGTERM on rank 1 \(block 1\)\)", printed)
    assert not (run_dir / "evaluation.json").exists()
    assert complete_steps(run_dir)[-1] == int(stopped)
    return int(stopped), printed


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_after_the_same_step(machine):
    _, printed = stop_by_signal(machine, machine.folder / "step", *ENDLESS, is_new=True)
    command = re.search(r"to continue: (torchrun --standalone .*)", printed)
    assert command is not None, printed
    assert "--nproc_per_node=2 --max-restarts=0 -m dbdist.train --config configs" in command[1]


def test_a_run_that_was_stopped_by_a_signal_goes_on_to_the_same_bits(machine):
    run_dir, untouched = machine.folder / "stopped", machine.folder / "untouched"
    step, _ = stop_by_signal(machine, run_dir, "--train.max_steps", 300)
    last = ("--train.max_steps", step + 5)
    printed = machine.finish(train(machine, 2, *last, "--run_dir", run_dir))
    assert f"continuing from step {step}" in printed
    machine.finish(train(machine, 2, *last, "--run_dir", untouched))
    assert hashes_of(run_dir, step + 5) == hashes_of(untouched, step + 5)
    steps = [[line["step"] for line in lines_of(folder)] for folder in (run_dir, untouched)]
    assert steps[0] == sorted({*steps[1], step})


@pytest.mark.slow
def test_blocks_that_never_wait_for_each_other_stop_after_the_same_step_too(machine):
    words = (*ENDLESS, "--parallel.sync", "never", "--data.num_workers", 1)
    stop_by_signal(machine, machine.folder / "never", *words)


@pytest.mark.slow
def test_a_block_that_has_finished_stops_with_one_that_is_far_behind(machine):
    """The others would need longer to its last step than launchers wait: each saves what it has."""
    run_dir, last = machine.folder / "finished", 500
    words = ("--parallel.sync", "never", "--train.max_steps", last, "--run_dir", run_dir)
    uneven = ("--model.num_layers", 9, "--model.layers_per_block", "[1,8]")
    job = train(machine, 2, *words, *uneven)
    report = run_dir / f"checkpoints/step-{last:08d}/block-0.part.json"
    wait_until(job, report.exists)
    signal_group(job.ranks()[0])
    printed = machine.finish(job)
    assert f"stopped at step {last} (SIGTERM on rank 0 (block 0)); to continue: " in printed
    assert "warning" not in printed
    first, second = newest_steps(run_dir, 2)
    assert first == last
    assert 0 < second < last - 50


def test_one_process_saves_and_ends_with_0_and_says_how_to_continue(machine):
    run_dir = machine.folder / "alone"
    words = (*TWO, *ENDLESS, "--mode", "sequential", "--run_dir", run_dir)
    job = machine.start(sys.executable, "-m", "dbdist.train", *words)
    wait_for_checkpoint(job, run_dir)
    job.send_signal(signal.SIGINT)
    printed = machine.finish(job)
    assert "dbdist train: SIGINT: finishes the step and saves; again ends at once" in printed
    step = complete_steps(run_dir)[-1]
    told = re.search(rf"stopped at step {step} \(SIGINT on .*\); to continue: (.*)", printed)
    assert told is not None, printed
    assert told[1].startswith("python -m dbdist.train --config configs/digits.yaml")


def test_a_second_signal_ends_at_once_even_where_the_first_finds_nobody(machine):
    """Rank 1 is stopped, so rank 0 waits for it in the middle of a step."""
    run_dir = machine.folder / "twice"
    ranks = machine.start_ranks(2, "dbdist.train", *TWO, *ENDLESS, "--run_dir", run_dir)
    wait_for_checkpoint(ranks[0], run_dir)
    ranks[1].send_signal(signal.SIGSTOP)
    time.sleep(0.5)
    ranks[0].send_signal(signal.SIGTERM)
    time.sleep(1.5)  # within one second they are one
    assert ranks[0].poll() is None
    ranks[0].send_signal(signal.SIGTERM)
    assert ranks[0].wait(5) == 128 + signal.SIGTERM
    ranks[1].send_signal(signal.SIGKILL)


@pytest.mark.parametrize(("sync", "stuck"), cases([("step", 1), ("never", 0)], fast=[]))
def test_a_stopped_rank_is_named_by_every_other_within_the_timeout(machine, timeout_s, sync, stuck):
    """stuck 0 holds the store: nothing answers any more."""
    run_dir = machine.folder / f"stuck-{sync}-{stuck}"
    words = (*TWO, *ENDLESS, "--parallel.sync", sync, "--parallel.timeout_s", timeout_s)
    ranks = machine.start_ranks(2, "dbdist.train", *words, "--run_dir", run_dir)
    wait_for_checkpoint(ranks[0], run_dir)
    other = ranks[1 - stuck]
    start = time.monotonic()
    ranks[stuck].send_signal(signal.SIGSTOP)
    wait_until(other, lambda: "did not arrive" in other.printed(), timeout_s + 2)
    assert time.monotonic() - start > timeout_s / 2
    assert other.wait(30) == 1
    if stuck == 1:
        assert ranks[1].wait(5) == -signal.SIGKILL, "it does not outlive the others"
    else:
        ranks[stuck].send_signal(signal.SIGKILL)
    printed = other.printed()
    (line, *_) = [line for line in printed.splitlines() if "did not arrive" in line]
    assert line.startswith(f"[r{1 - stuck}] dbdist train: error: rank {stuck} (block {stuck})")
    assert f"this is rank {1 - stuck} (block {1 - stuck}) at step " in line
    if stuck == 1:
        assert re.search(r"no sign of life for \d+ s, it was at step \d+, \w+", line)
    assert "Traceback" not in printed


@pytest.mark.slow
def test_torchrun_is_left_without_processes_and_ports_after_a_hang(machine, timeout_s):
    run_dir = machine.folder / "hang"
    words = (*ENDLESS, "--parallel.timeout_s", timeout_s, "--data.num_workers", 1)
    job = train(machine, 2, *words, "--run_dir", run_dir)
    wait_for_checkpoint(job, run_dir)
    sockets = {socket.inode for socket in listeners_of(job.processes())}
    assert sockets
    job.strike(1, "hang")
    # Not torchrun's SIGTERM, which a stopped process does not hear, and its SIGKILL 30 s later.
    assert job.wait(timeout_s + 15) != 0
    assert "rank 1 (block 1) did not arrive" in job.printed()
    assert not job.end(10.0), "no process is left"
    deadline = time.monotonic() + 5
    while left := [socket for socket in listeners() if socket.inode in sockets]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def test_a_killed_rank_is_named_by_the_others(machine):
    run_dir = machine.folder / "killed"
    ranks = machine.start_ranks(2, "dbdist.train", *TWO, *ENDLESS, "--run_dir", run_dir)
    wait_for_checkpoint(ranks[0], run_dir)
    time.sleep(1)  # signs of life come every half second, the first steps sooner
    ranks[1].send_signal(signal.SIGKILL)
    assert ranks[0].wait(20) == 1
    printed = ranks[0].printed()
    assert re.search(
        r"\[r0\] dbdist train: error: rank 1 \(block 1\) is gone, it was at step \d+, \w+; "
        r"this is rank 0 \(block 0\) at step \d+, \w+",
        printed,
    )
    assert "Traceback" not in printed


def test_ranks_end_when_their_launcher_is_killed(machine):
    run_dir = machine.folder / "orphans"
    job = train(machine, 2, *ENDLESS, "--parallel.sync", "never", "--run_dir", run_dir)
    wait_for_checkpoint(job, run_dir)
    job.send_signal(signal.SIGKILL)
    assert not job.end(patience_s=15.0)
