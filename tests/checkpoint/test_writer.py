"""Saving: in the background, complete or not at all, and no reason to stop training."""

import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from machine import wait_for_text
from ranks import config_of, setup_of, warnings_from_now_on

from dbdist import log
from dbdist.bench.save import measure
from dbdist.checkpoint.manifest import complete_folders, find_checkpoint, open_folder
from dbdist.checkpoint.writer import CheckpointWriter
from dbdist.config.parse import parse_config
from dbdist.data.images import random_images
from dbdist.data.sources import dataset_spec, load_dataset
from dbdist.errors import CheckpointError
from dbdist.parallel.layout import Layout
from dbdist.parallel.mailbox import Mailbox
from dbdist.parallel.topology import Topology
from dbdist.training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
ABOUT = {"model": {"layers_per_block": [2, 1], "data": "digits"}}
FILE = "shared.safetensors"


@pytest.fixture(autouse=True)
def usual_terminal():
    yield
    log.share_terminal(None)


def writer_of(run_dir, keep_last=10, **options):
    """A writer, and what it warns of."""
    writer = CheckpointWriter(run_dir, Topology(Layout(1)), {0}, keep_last, **options)
    return writer, warnings_from_now_on()


def files(value, size=4):
    return {FILE: {"x": torch.full((size,), float(value))}}


def write(run_dir, *steps, keep_last=10):
    writer, told = writer_of(run_dir, keep_last)
    for step in steps:
        writer.save(step, files(step), ABOUT)
    writer.finish(10.0)
    assert told == []


def steps_of(run_dir):
    """The steps that have a folder, complete or not."""
    return sorted(int(p.name.removeprefix("step-")) for p in (run_dir / "checkpoints").iterdir())


def assert_holds(run_dir, step, value=None):
    """The checkpoint of a step is complete and has its values."""
    checkpoint = find_checkpoint(run_dir, step)
    assert checkpoint is not None
    assert checkpoint.tensors(FILE)["x"].eq(step if value is None else value).all()


# -- in the background -----------------------------------------------------------------------------


class Disk:
    """Brings nothing to disk until it is let go."""

    def __init__(self, monkeypatch):
        self._free, self._fsync = threading.Event(), os.fsync
        monkeypatch.setattr(os, "fsync", self._wait)

    def let_go(self):
        self._free.set()

    def _wait(self, descriptor):
        assert self._free.wait(30)
        self._fsync(descriptor)


@pytest.fixture
def busy_disk(monkeypatch):
    disk = Disk(monkeypatch)
    yield disk
    disk.let_go()


def test_saving_returns_while_the_disk_is_busy_and_keeps_the_values_of_then(tmp_path, busy_disk):
    writer, _ = writer_of(tmp_path)
    tensors = files(7)
    writer.save(1, tensors, ABOUT)
    tensors[FILE]["x"].zero_()
    for _ in range(5):
        writer.poll()
    assert find_checkpoint(tmp_path) is None
    busy_disk.let_go()
    writer.finish(10.0)
    assert_holds(tmp_path, 1, value=7)


def test_a_save_waits_for_the_one_before_and_takes_the_same_memory(tmp_path, busy_disk):
    writer, _ = writer_of(tmp_path)
    writer.save(1, files(1), ABOUT)
    memory = writer._snapshots[FILE]
    threading.Timer(0.3, busy_disk.let_go).start()
    start = time.monotonic()
    writer.save(2, files(2), ABOUT)
    assert time.monotonic() - start > 0.25
    assert writer._snapshots[FILE] is memory
    writer.save(3, files(3, size=9), ABOUT)
    assert writer._snapshots[FILE] is not memory, "tensors of another shape"
    writer.finish(10.0)
    for step in (1, 2, 3):
        assert_holds(tmp_path, step)


def test_a_checkpoint_is_complete_only_when_the_metrics_up_to_it_are_written(tmp_path):
    recorded: list[int] = []
    writer, _ = writer_of(tmp_path, is_recorded=recorded.__contains__)
    writer.save(1, files(1), ABOUT)
    with pytest.raises(CheckpointError, match="step 1: a rank's metrics have not arrived"):
        writer.finish(0.5)
    writer.save(2, files(2), ABOUT)
    recorded.append(2)
    writer.finish(10.0)
    assert [path.name for path in complete_folders(tmp_path / "checkpoints")] == ["step-00000002"]


def test_only_the_callers_thread_communicates(tmp_path, monkeypatch):
    threads = set()
    for name in ("post", "collect"):
        real = getattr(Mailbox, name)

        def noted(self, *words, real=real):
            threads.add(threading.current_thread())
            return real(self, *words)

        monkeypatch.setattr(Mailbox, name, noted)
    write(tmp_path, 1, 2)
    assert threads == {threading.current_thread()}


@pytest.mark.slow
def test_saving_a_block_of_the_cifar_model_takes_less_than_a_step(tmp_path):
    words = f"--config configs/cifar100.yaml --run_dir {tmp_path}/run"
    sizes = "--data.num_workers 0 --train.batch_size 8 --train.warmup_steps 0"
    config = parse_config("test", "", f"{words} {sizes}".split()).validate()
    train_set = random_images(dataset_spec(config.data), 256)
    result = measure(config, train_set, block=1, warmup=1, steps=3, saves=2)
    assert result["checkpoint_mb"] > 40
    assert result["first_stall_ms"] < result["step_ms"]
    assert result["stall_ms"] < result["step_ms"] / 2
    for step in (3, 4):  # the last two are kept
        checkpoint = find_checkpoint(tmp_path / "run", step)
        assert len(checkpoint.manifest["files"]) == 2
        for name in checkpoint.manifest["files"]:
            checkpoint.tensors(name)


@pytest.mark.gpu
def test_what_lies_on_a_gpu_is_saved_as_it_was(tmp_path):
    device = torch.device("cuda", torch.cuda.current_device())
    writer = CheckpointWriter(tmp_path, Topology(Layout(1), device=device), {0}, 10)
    x = torch.zeros(2**22, device=device)
    for step in (1, 2):
        x += 1
        writer.save(step, {FILE: {"x": x, "on the CPU": torch.tensor(step), "half": x[::2]}}, ABOUT)
        assert writer._snapshots[FILE]._data.is_pinned()
    x.zero_()
    writer.finish(60.0)
    for step in (1, 2):
        assert_holds(tmp_path, step)


# -- incomplete and old ones -----------------------------------------------------------------------


def test_a_folder_without_manifest_is_ignored_and_cleaned_up(tmp_path):
    write(tmp_path, 5, 9)
    (tmp_path / "checkpoints/step-00000009/manifest.json").unlink()
    assert_holds(tmp_path, 5)
    assert find_checkpoint(tmp_path).step == 5
    (tmp_path / "checkpoints" / "notes").mkdir()
    writer_of(tmp_path)[0].clean()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "notes",
        "step-00000005",
    ]


@pytest.mark.parametrize("keep_last", [1, 2, 3])
def test_the_last_complete_ones_are_kept(tmp_path, keep_last):
    write(tmp_path, 1, 2, 3, 4, keep_last=keep_last)
    assert steps_of(tmp_path) == [1, 2, 3, 4][-keep_last:]


def test_the_last_ones_are_those_of_the_highest_steps(tmp_path):
    write(tmp_path, 99_999_999, 100_000_000, keep_last=1)
    assert steps_of(tmp_path) == [100_000_000]


def test_saving_a_step_again_replaces_it(tmp_path):
    write(tmp_path, 5)
    writer, _ = writer_of(tmp_path)
    writer.save(5, {FILE: {"y": torch.ones(2)}}, ABOUT)
    writer.finish(10.0)
    assert find_checkpoint(tmp_path).tensors(FILE).keys() == {"y"}


# -- several ranks ---------------------------------------------------------------------------------


def save_on_rank(rank, run_dir, steps, silent):
    """What this rank was told, and how it ended. Ranks in `silent` do not save."""
    topology = rank.join(Layout(3))
    writer = CheckpointWriter(run_dir, topology, {0, 1, 2}, 1)
    told, ending = warnings_from_now_on(), ""
    for step in steps if topology.rank not in silent else ():
        own = {f"block-{topology.rank}.safetensors": {"x": torch.full((2,), float(topology.rank))}}
        writer.save(step, own, ABOUT if topology.is_coordinator else {})
    try:
        writer.finish(0.5 if silent else 10.0)
    except CheckpointError as error:
        ending = str(error)
    topology.barrier()
    return told, ending


def test_a_checkpoint_is_complete_when_every_rank_has_written(ranks, tmp_path):
    assert ranks.run(3, save_on_rank, tmp_path, [4], ()) == [([], "")] * 3
    checkpoint = find_checkpoint(tmp_path)
    for block in range(3):
        assert checkpoint.tensors(f"block-{block}.safetensors")["x"].tolist() == [block, block]


def test_a_rank_that_does_not_write_is_named_and_there_is_no_checkpoint(ranks, tmp_path):
    endings = [ending for _, ending in ranks.run(3, save_on_rank, tmp_path, [4], (1,))]
    assert "step 4: rank 1 " in endings[0]
    assert endings[1:] == ["", ""]
    assert find_checkpoint(tmp_path) is None


def test_a_rank_that_cannot_write_costs_that_checkpoint_and_no_other(ranks, tmp_path):
    """Something of rank 1's file's name is in its way, at step 5 alone."""
    (tmp_path / "checkpoints/step-00000005/block-1.safetensors").mkdir(parents=True)
    (told, ending), *others = ranks.run(3, save_on_rank, tmp_path, [4, 5, 6], ())
    assert len(told) == 1
    assert re.search(
        r"^checkpoint of step 5 failed: rank 1: .*step-00000005 cannot be written "
        r"\(Is a directory\)",
        told[0],
    )
    assert (ending, others) == ("", [([], "")] * 2)
    assert steps_of(tmp_path) == [6]


def test_a_last_checkpoint_that_fails_is_an_error_on_the_coordinator(ranks, tmp_path):
    (tmp_path / "checkpoints/step-00000005/block-2.safetensors").mkdir(parents=True)
    (told, ending), *others = ranks.run(3, save_on_rank, tmp_path, [4, 5], ())
    assert told == []
    assert "step 5, the last, failed: rank 2: " in ending
    assert "newest complete one is step 4" in ending
    assert others == [([], "")] * 2
    assert steps_of(tmp_path) == [4]


# -- disks that are full or may not be written -----------------------------------------------------


def poll_until(writer, told, num_lines):
    deadline = time.monotonic() + 10
    while len(told) < num_lines and time.monotonic() < deadline:
        writer.poll()
        time.sleep(0.01)
    assert len(told) == num_lines


def test_a_full_disk_is_told_and_training_goes_on_with_the_checkpoint_before(small_disk):
    writer, told = writer_of(small_disk.path, keep_last=1)
    writer.save(1, files(1), ABOUT)
    writer.save(2, files(2, size=2**20), ABOUT)
    poll_until(writer, told, 1)
    assert re.fullmatch(
        r"checkpoint of step 2 failed: rank 0: .*/step-00000002 cannot be written "
        r"\(No space left on device\); training goes on, the newest complete one is step 1",
        told[0],
    )
    assert steps_of(small_disk.path) == [1], "what was written of the other is gone"
    assert_holds(small_disk.path, 1)
    writer.save(3, files(3), ABOUT)
    writer.finish(10.0)
    assert len(told) == 1
    assert steps_of(small_disk.path) == [3]
    assert_holds(small_disk.path, 3)


def test_a_disk_that_is_full_for_the_manifest_alone_fails_that_checkpoint(small_disk):
    writer, told = writer_of(small_disk.path)
    writer.save(1, files(1), ABOUT)
    writer.save(2, files(2), ABOUT | {"filler": "x" * 2**20})
    poll_until(writer, told, 1)
    writer.close()
    assert len(told) == 1, "it is told once"
    assert "step-00000002/manifest.json cannot be written (No space left on device)" in told[0]
    assert steps_of(small_disk.path) == [1]


def test_a_read_only_folder_is_told_and_later_ones_are_saved_again(small_disk):
    writer, told = writer_of(small_disk.path, keep_last=1)
    writer.save(1, files(1), ABOUT)
    writer.finish(10.0)
    small_disk.make_writable(False)
    for step in (2, 3):
        writer.save(step, files(step), ABOUT)
        poll_until(writer, told, step - 1)
        assert f"step {step} failed" in told[-1]
        assert "(Read-only file system)" in told[-1]
        assert_holds(small_disk.path, 1)
    small_disk.make_writable(True)
    writer.save(4, files(4), ABOUT)
    writer.finish(10.0)
    assert steps_of(small_disk.path) == [4]


def test_old_checkpoints_that_cannot_be_removed_are_told_and_cost_nothing(tmp_path, monkeypatch):
    write(tmp_path, 1)
    writer, told = writer_of(tmp_path, keep_last=1)
    with monkeypatch.context() as patch:

        def refuse(path):
            raise OSError(1, "Operation not permitted", str(path))

        patch.setattr("dbdist.checkpoint.retention.remove_checkpoint", refuse)
        writer.save(2, files(2), ABOUT)
        writer.finish(10.0)
    assert len(told) == 1
    assert "keep_last cannot be removed" in told[0]
    assert steps_of(tmp_path) == [1, 2]


def test_a_folder_that_cannot_be_listed_is_told_and_costs_nothing(tmp_path, monkeypatch):
    write(tmp_path, 1)
    writer, told = writer_of(tmp_path, keep_last=1)
    with monkeypatch.context() as patch:

        def refuse(folder):
            raise CheckpointError(f"{folder} cannot be read (Stale file handle)")

        for place in ("writer", "retention"):
            patch.setattr(f"dbdist.checkpoint.{place}.complete_folders", refuse)
        writer.save(2, files(2), ABOUT)
        writer.finish(10.0)
        writer._warn_of(3, "something")
    assert len(told) == 2
    assert "keep_last cannot be removed" in told[0]
    assert told[1].endswith("training goes on, " + f"{tmp_path}/checkpoints cannot be read")
    assert_holds(tmp_path, 2)


def test_a_last_checkpoint_that_fails_is_an_error_that_names_what_there_is(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    writer, told = writer_of(tmp_path)
    writer.save(1, files(1), ABOUT)
    with pytest.raises(CheckpointError, match=r"step 1, the last.*checkpoints.*none is complete"):
        writer.finish(10.0)
    writer.close()
    assert told == [], "the error is told once"


def test_without_anybody_to_tell_it_is_told_on_stderr(tmp_path, capfd):
    (tmp_path / "checkpoints").write_text("a file")
    writer = CheckpointWriter(tmp_path, Topology(Layout(1)), {0}, 1)
    for step in (1, 2):
        writer.save(step, files(step), ABOUT)
    writer.close()
    lines = capfd.readouterr().err.splitlines()
    assert [line[:29] for line in lines] == [f"warning: checkpoint of step {s}" for s in (1, 2)]


# -- processes that end ----------------------------------------------------------------------------

SCRIPT = f"""
import os, sys, time
from pathlib import Path
import torch
from dbdist.checkpoint.writer import CheckpointWriter
from dbdist.parallel.layout import Layout
from dbdist.parallel.topology import Topology
from dbdist.checkpoint.snapshot import Snapshot
writer = CheckpointWriter(Path(sys.argv[1]), Topology(Layout(1)), {{0}}, 2)
def save(step, size):
    writer.save(step, {{"{FILE}": {{"x": torch.full((size,), float(step))}}}}, {ABOUT})
"""


def test_a_process_killed_in_the_middle_of_a_file_loses_that_checkpoint_alone(machine, tmp_path):
    script = """
save(1, 100)
save(2, 100)
writer.finish(10.0)
chunks = Snapshot._chunks
def half(snapshot):
    for i, chunk in enumerate(chunks(snapshot)):
        if i == 2:
            print("in the middle", flush=True)
            time.sleep(1000)
        yield chunk
Snapshot._chunks = half
save(3, 4 * 10**6)
time.sleep(1000)
"""
    job = machine.script(SCRIPT + script, tmp_path)
    wait_for_text(job, "in the middle")
    job.send_signal(signal.SIGKILL)
    job.wait(10)
    partial = tmp_path / f"checkpoints/step-00000003/{FILE}.partial"
    assert 2**20 < partial.stat().st_size < 16 * 10**6
    assert steps_of(tmp_path) == [1, 2, 3]
    assert find_checkpoint(tmp_path).step == 2
    for step in (1, 2):
        assert_holds(tmp_path, step)
    writer, _ = writer_of(tmp_path, keep_last=2)
    writer.clean()
    assert steps_of(tmp_path) == [1, 2]
    writer.save(3, files(3), ABOUT)
    writer.finish(10.0)
    assert steps_of(tmp_path) == [2, 3]


@pytest.mark.parametrize(
    ("ending", "code"),
    [
        ("raise ValueError", 1),
        ("from dbdist.commands.command_line import guarded\nguarded('x', interrupted)", 130),
    ],
)
def test_a_process_that_fails_does_not_wait_for_a_disk_that_hangs(machine, tmp_path, ending, code):
    script = f"""
def interrupted():
    raise KeyboardInterrupt
os.fsync = lambda descriptor: time.sleep(1000)
save(1, 100)
start = time.monotonic()
writer.close(timeout_s=0.2)
assert time.monotonic() - start < 5
{ending}
"""
    job = machine.script(SCRIPT + script, tmp_path)
    assert job.wait(60) == code, job.printed()
    assert "rank 0 did not write its files of step 1" in job.printed()
    assert find_checkpoint(tmp_path) is None


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_training_that_fails_after_a_save_completes_that_checkpoint(tmp_path, monkeypatch, error):
    config = config_of("mode=sequential", f"run_dir={tmp_path}")
    data = load_dataset(config.data, "train"), load_dataset(config.data, "test")
    trainer = Trainer(setup_of(config), Topology(Layout(1)), *data)

    def fail(step):
        raise error

    monkeypatch.setattr(trainer, "evaluate", fail)
    with pytest.raises(error):
        trainer.fit()
    checkpoint = find_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.step == config.train.max_steps


# -- what others read, or have put there -----------------------------------------------------------


def test_a_checkpoint_that_is_read_stays_until_it_is_let_go(tmp_path):
    """And is then retired with the next one."""
    write(tmp_path, 1, 2, keep_last=2)
    read = open_folder(tmp_path / "checkpoints/step-00000001", hold=True)
    write(tmp_path, 3, 4, keep_last=1)
    assert steps_of(tmp_path) == [1, 4]
    assert read.tensors(FILE)["x"].eq(1).all()
    read.close()
    write(tmp_path, 5, keep_last=1)
    assert steps_of(tmp_path) == [5]


def test_a_folder_that_this_run_did_not_write_is_set_aside(tmp_path):
    write(tmp_path, 5)
    for step, name in ((3, "model.pt"), (4, "block-1.safetensors.partial"), (7, "notes.txt")):
        folder = tmp_path / f"checkpoints/step-{step:08d}"
        folder.mkdir()
        (folder / name).write_text("x")
    writer, told = writer_of(tmp_path)
    writer.clean()
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000003.foreign", "step-00000005", "step-00000007.foreign"]
    assert len(told) == 2
    assert "step-00000003 is no checkpoint of dbdist (model.pt); it is now called" in told[0]
