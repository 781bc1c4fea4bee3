"""Signals, stuck ranks and lost ones, on real processes: what is saved, what is told, what is
left."""

import json
import os
import re
import signal
import sys
import time

import pytest
from machine import (
    Machine,
    pid_of,
    start_ranks,
    wait_for_checkpoint,
)

from dbdist.bench.processes import listeners, listeners_of
from dbdist.checkpoint.manifest import complete_folders, find_checkpoint, newest_steps

TWO = """--config configs/digits.yaml --model.num_blocks 2 --model.num_layers 2 --train.log_every 5
    --checkpoint.every_steps 5 --checkpoint.keep_last 1000""".split()
ENDLESS = ["--train.max_steps", "100000"]
TIMEOUT_S = 16


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    machine = Machine(tmp_path_factory.mktemp("faults"))
    yield machine
    machine.close(0)


@pytest.fixture(autouse=True)
def nothing_is_left(machine):
    yield
    assert not machine.close()


def torchrun(machine, ranks, *words, restarts=0, **variables):
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}")
    words = (*launcher, f"--max-restarts={restarts}", "-m", "dbdist.train", *words)
    return machine.start(sys.executable, *words, **variables)


def wait_all(machine, processes, timeout_s=60):
    """(exit codes, everything printed)."""
    codes = [process.wait(timeout_s) for process in processes]
    return codes, "\n".join(machine.logs[process.pid].read_text() for process in processes)


def hashes_of(run_dir, step):
    checkpoint = find_checkpoint(run_dir, step)
    files = checkpoint.manifest["files"].items()
    return {name: e["sha256"] for name, e in files if name.endswith(".safetensors")}


def steps_of(run_dir):
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def stop_by_signal(machine, run_dir, *words):
    """(step, what was printed) of two ranks of torchrun that stop because rank 1 gets SIGTERM."""
    agent = torchrun(machine, 2, *TWO, *words, "--run_dir", run_dir)
    wait_for_checkpoint(machine, agent, run_dir)
    # The rank's group, as torchrun does: what loads its data is not meant.
    os.killpg(os.getpgid(pid_of(machine, 1)), signal.SIGTERM)
    (code,), printed = wait_all(machine, [agent])
    assert code == 0, printed
    (stopped,) = re.findall(r"stopped at step (\d+) \(SIGTERM on rank 1 \(block 1\)\)", printed)
    assert not (run_dir / "evaluation.json").exists()
    newest = complete_folders(run_dir / "checkpoints")[-1]
    assert int(newest.name.removeprefix("step-")) == int(stopped)
    return int(stopped), printed


def test_a_signal_to_one_rank_stops_all_after_the_same_step(machine):
    _, printed = stop_by_signal(machine, machine.folder / "step", *ENDLESS)
    command = re.search(r"to continue: (torchrun --standalone .*)", printed)
    assert command is not None, printed
    assert "--nproc_per_node=2 --max-restarts=0 -m dbdist.train --config configs" in command[1]


@pytest.mark.slow
def test_a_run_that_was_stopped_by_a_signal_goes_on_to_the_same_bits(machine):
    run_dir, untouched = machine.folder / "stopped", machine.folder / "untouched"
    step, _ = stop_by_signal(machine, run_dir, "--train.max_steps", 300)
    last = ("--train.max_steps", step + 5)
    printed = machine.finish(torchrun(machine, 2, *TWO, *last, "--run_dir", run_dir))
    assert f"continuing from step {step}" in printed
    machine.finish(torchrun(machine, 2, *TWO, *last, "--run_dir", untouched))
    assert hashes_of(run_dir, step + 5) == hashes_of(untouched, step + 5)
    assert steps_of(run_dir) == sorted({*steps_of(untouched), step})


def test_blocks_that_never_wait_for_each_other_stop_after_the_same_step_too(machine):
    words = (*ENDLESS, "--parallel.sync", "never", "--data.num_workers", 1)
    stop_by_signal(machine, machine.folder / "never", *words)


@pytest.mark.slow
def test_a_block_that_has_finished_stops_with_one_that_is_far_behind(machine):
    """The others would need longer to its last step than launchers wait: each saves what it has."""
    run_dir, last = machine.folder / "finished", 500
    words = (*TWO, "--parallel.sync", "never", "--train.max_steps", last, "--run_dir", run_dir)
    uneven = ("--model.num_layers", 9, "--model.layers_per_block", "[1,8]")
    agent = torchrun(machine, 2, *words, *uneven)
    deadline = time.monotonic() + 120
    while not (run_dir / f"checkpoints/step-{last:08d}/block-0.part.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(os.getpgid(pid_of(machine, 0)), signal.SIGTERM)
    (code,), printed = wait_all(machine, [agent])
    assert code == 0, printed
    assert f"stopped at step {last} (SIGTERM on rank 0 (block 0)); to continue: torchrun" in printed
    assert "warning" not in printed
    first, second = newest_steps(run_dir, 2)
    assert first == last
    assert 0 < second < last - 50


def test_one_process_saves_and_ends_with_0_and_says_how_to_continue(machine):
    run_dir = machine.folder / "alone"
    words = (*TWO, *ENDLESS, "--mode", "sequential", "--run_dir", run_dir)
    process = machine.start(sys.executable, "-m", "dbdist.train", *words)
    wait_for_checkpoint(machine, process, run_dir)
    process.send_signal(signal.SIGINT)
    (code,), printed = wait_all(machine, [process])
    assert code == 0, printed
    assert "dbdist train: SIGINT: finishes the step and saves; again ends at once" in printed
    step = int(complete_folders(run_dir / "checkpoints")[-1].name[5:])
    told = re.search(rf"stopped at step {step} \(SIGINT on .*\); to continue: (.*)", printed)
    assert told is not None, printed
    assert told[1].startswith("python -m dbdist.train --config configs/digits.yaml")


def test_a_second_signal_ends_at_once_even_where_the_first_finds_nobody(machine):
    """Rank 1 is stopped, so rank 0 waits for it in the middle of a step."""
    run_dir = machine.folder / "twice"
    ranks = start_ranks(machine, 2, "dbdist.train", *TWO, *ENDLESS, "--run_dir", run_dir)
    wait_for_checkpoint(machine, ranks[0], run_dir)
    ranks[1].send_signal(signal.SIGSTOP)
    time.sleep(0.5)
    ranks[0].send_signal(signal.SIGTERM)
    time.sleep(1.5)  # within one second they are one
    assert ranks[0].poll() is None
    ranks[0].send_signal(signal.SIGTERM)
    assert ranks[0].wait(5) == 128 + signal.SIGTERM
    ranks[1].send_signal(signal.SIGKILL)
    ranks[1].wait()


@pytest.mark.parametrize(("sync", "stuck"), [("step", 1), ("never", 0)])
def test_a_stopped_rank_is_named_by_every_other_within_the_timeout(machine, sync, stuck):
    """stuck 0 holds the store: nothing answers any more."""
    run_dir = machine.folder / f"stuck-{sync}-{stuck}"
    words = (*TWO, *ENDLESS, "--parallel.sync", sync, "--parallel.timeout_s", TIMEOUT_S)
    ranks = start_ranks(machine, 2, "dbdist.train", *words, "--run_dir", run_dir)
    wait_for_checkpoint(machine, ranks[0], run_dir)
    ranks[stuck].send_signal(signal.SIGSTOP)
    start = time.monotonic()
    other = ranks[1 - stuck]
    try:
        while "did not arrive" not in machine.logs[other.pid].read_text():
            assert time.monotonic() - start < TIMEOUT_S + 1, machine.logs[other.pid].read_text()
            time.sleep(0.1)
        assert other.wait(30) == 1
        if stuck == 1:
            assert ranks[1].wait(5) == -signal.SIGKILL, "it does not outlive the others"
    finally:
        ranks[stuck].send_signal(signal.SIGKILL)
        ranks[stuck].wait()
    printed = machine.logs[other.pid].read_text()
    (line, *_) = [line for line in printed.splitlines() if "did not arrive" in line]
    assert line.startswith(f"[r{1 - stuck}] dbdist train: error: rank {stuck} (block {stuck})")
    assert f"this is rank {1 - stuck} (block {1 - stuck}) at step " in line
    if stuck == 1:
        assert re.search(r"no sign of life for \d+ s, it was at step \d+, \w+", line)
    assert "Traceback" not in printed


def test_torchrun_is_left_without_processes_and_ports_after_a_hang(machine):
    run_dir = machine.folder / "hang"
    words = (*TWO, *ENDLESS, "--parallel.timeout_s", TIMEOUT_S, "--data.num_workers", 1)
    agent = torchrun(machine, 2, *words, "--run_dir", run_dir)
    wait_for_checkpoint(machine, agent, run_dir)
    sockets = {socket.inode for socket in listeners_of(machine.processes())}
    assert sockets
    os.kill(pid_of(machine, 1), signal.SIGSTOP)
    # Not torchrun's SIGTERM, which a stopped process does not hear, and its SIGKILL 30 s later.
    assert agent.wait(TIMEOUT_S + 10) != 0
    assert "rank 1 (block 1) did not arrive" in machine.logs[agent.pid].read_text()
    assert not machine.close(), "no process is left"
    deadline = time.monotonic() + 5  # a process loses its environment before its files
    while left := [socket for socket in listeners() if socket.inode in sockets]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def test_a_killed_rank_is_named_by_the_others(machine):
    run_dir = machine.folder / "killed"
    ranks = start_ranks(machine, 2, "dbdist.train", *TWO, *ENDLESS, "--run_dir", run_dir)
    wait_for_checkpoint(machine, ranks[0], run_dir)
    time.sleep(1)  # signs of life come every half second, the first steps sooner
    ranks[1].send_signal(signal.SIGKILL)
    assert ranks[0].wait(20) == 1
    printed = machine.logs[ranks[0].pid].read_text()
    assert re.search(
        r"\[r0\] dbdist train: error: rank 1 \(block 1\) is gone, it was at step \d+, \w+; "
        r"this is rank 0 \(block 0\) at step \d+, \w+",
        printed,
    )
    assert "Traceback" not in printed
    ranks[1].wait()


def test_ranks_end_when_their_launcher_is_killed(machine):
    run_dir = machine.folder / "orphans"
    agent = torchrun(machine, 2, *TWO, *ENDLESS, "--parallel.sync", "never", "--run_dir", run_dir)
    wait_for_checkpoint(machine, agent, run_dir)
    agent.kill()
    agent.wait()
    assert not machine.close(patience_s=15)
