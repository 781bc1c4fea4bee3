"""Parts: what each block has saved by itself, and when they are a checkpoint together."""

import json
import os

import pytest
import torch
from ranks import warnings_from_now_on

from dbdist import log
from dbdist.checkpoint.manifest import (
    complete_folders,
    find_checkpoint,
    newest_steps,
    open_folder,
    read_manifest,
    saved_folders,
)
from dbdist.checkpoint.names import blocks_in, part_file, step_of
from dbdist.checkpoint.parts import assemble, read_part, remove_block
from dbdist.checkpoint.snapshot import Snapshot
from dbdist.checkpoint.weights import load_weights
from dbdist.checkpoint.writer import CheckpointWriter
from dbdist.errors import CheckpointError
from dbdist.parallel.layout import Layout
from dbdist.parallel.topology import Topology


def find_blocks(run_dir, blocks):
    """The newest step that these blocks have; None without one."""
    found = saved_folders(run_dir / "checkpoints", blocks)
    return open_folder(found[-1], blocks) if found else None


ABOUT = {
    "samples_seen": 5,
    "seed": 0,
    "data": {"name": "digits", "class_names": ["a", "b"]},
    "model": {
        "task": "classification",
        "layers_per_block": [1, 2, 1],
        "boundaries": [0.1, 1.0, 2.0, 3.0],
    },
    "config": {"seed": 0},
}


@pytest.fixture(autouse=True)
def usual_terminal():
    yield
    log.share_terminal(None)


def writer_of(run_dir, block, keep_last=10, trained=None):
    """The writer of a run of one block, and the lines it tells."""
    topology, trained = Topology(Layout(1)), (block,) if trained is None else trained
    writer = CheckpointWriter(run_dir, topology, {0}, keep_last, block, trained)
    return writer, warnings_from_now_on()


def files(block, value):
    names = f"block-{block}.safetensors", f"block-{block}.optimizer.safetensors"
    return {name: {"x": torch.full((3,), float(value))} for name in names}


def write(run_dir, block, *steps, keep_last=10, about=ABOUT):
    writer, told = writer_of(run_dir, block, keep_last)
    for step in steps:
        writer.save(step, files(block, step), about)
    writer.finish(10.0)
    assert told == []


def write_jointly(run_dir, *steps, keep_last=10, num_blocks=3):
    """As one process that has all blocks; the manifest is written, and block 0's part alone."""
    writer = CheckpointWriter(run_dir, Topology(Layout(1)), {0}, keep_last, 0)
    for step in steps:
        every = {k: v for block in range(num_blocks) for k, v in files(block, step).items()}
        writer.save(step, every, ABOUT)
    writer.finish(10.0)


def folder_of(run_dir, step):
    return run_dir / f"checkpoints/step-{step:08d}"


def steps_of(run_dir, block):
    folders = (run_dir / "checkpoints").iterdir()
    return sorted(step_of(path) for path in folders if block in blocks_in(path))


def complete_steps(run_dir):
    return [step_of(path) for path in complete_folders(run_dir / "checkpoints")]


# -- what is a checkpoint --------------------------------------------------------------------------


def test_the_parts_of_all_blocks_are_a_checkpoint_and_those_of_some_are_none(tmp_path):
    write(tmp_path, 0, 4, 8)
    write(tmp_path, 2, 4)
    assert find_checkpoint(tmp_path) is None
    assert find_blocks(tmp_path, [0, 1]) is None
    assert find_blocks(tmp_path, [0]).step == 8
    assert find_blocks(tmp_path, [2, 0]).step == 4
    assert newest_steps(tmp_path, 3) == [8, None, 4]
    write(tmp_path, 1, 4)
    checkpoint = find_checkpoint(tmp_path)
    assert checkpoint.step == 4
    assert checkpoint.manifest["model"] == ABOUT["model"]
    assert len(checkpoint.manifest["files"]) == 6
    for name in checkpoint.manifest["files"]:
        assert checkpoint.tensors(name)["x"].eq(4).all()
    assert not (checkpoint.path / "manifest.json").exists(), "reading writes nothing"


def test_the_checkpoint_of_some_blocks_has_their_files_alone(tmp_path):
    for block in range(3):
        write(tmp_path, block, 4)
    assert set(find_blocks(tmp_path, [1]).manifest["files"]) == set(files(1, 0))
    assert set(read_part(folder_of(tmp_path, 4), 1)["files"]) == set(files(1, 0))


def test_a_manifest_gives_every_block_also_without_parts(tmp_path):
    write_jointly(tmp_path, 4)
    assert blocks_in(folder_of(tmp_path, 4)) == [0]
    assert find_blocks(tmp_path, [1, 2]).step == 4
    assert newest_steps(tmp_path, 3) == [4, 4, 4]


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("seed", {"seed": 1}),
        ("data.name", {"data": {"name": "mnist5k", "class_names": ["a", "b"]}}),
        ("data.class_names", {"data": {"name": "digits", "class_names": ["b", "a"]}}),
        ("model.boundaries", {"model": {**ABOUT["model"], "boundaries": [0.1, 1.5, 2.0, 3.0]}}),
    ],
)
def test_parts_of_two_models_are_refused_by_the_key_and_both_values(tmp_path, key, change):
    write(tmp_path, 0, 4)
    write(tmp_path, 1, 4, about=ABOUT | change)
    write(tmp_path, 2, 4)
    with pytest.raises(CheckpointError, match=rf"block-1\.part\.json has {key} .*/block-0\.part"):
        find_checkpoint(tmp_path)
    assert find_blocks(tmp_path, [0, 2]).step == 4


def test_an_incomplete_folder_has_no_manifest(tmp_path):
    write(tmp_path, 0, 4)
    with pytest.raises(CheckpointError, match="step-00000004 is incomplete"):
        read_manifest(folder_of(tmp_path, 4))


# -- damage ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"step": 5},
        {"step": "4"},
        {"block": 0},
        {"model": None},
        {"seed": "0"},
        {"data": {}},
        {"config": []},
        {"files": {"block-0.safetensors": {"bytes": 1, "sha256": ""}}},
        {"files": {"../block-1.safetensors": {"bytes": 1, "sha256": ""}}},
        {"files": {"block-1.safetensors": {"bytes": "1", "sha256": ""}}},
        {"files": []},
        {"is_alone": 0},
    ],
)
def test_a_part_that_says_otherwise_is_refused_by_name(tmp_path, change):
    for block in range(3):
        write(tmp_path, block, 4)
    path = folder_of(tmp_path, 4)
    part = json.loads((path / part_file(1)).read_text())
    (path / part_file(1)).write_text(json.dumps(part | change))
    for read in (lambda: read_part(path, 1), lambda: assemble(path), lambda: read_manifest(path)):
        with pytest.raises(CheckpointError, match=r"block-1\.part\.json is damaged"):
            read()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b"{}", b"[" * 5000])
def test_a_part_that_is_no_part_is_refused_and_the_others_can_go_on(tmp_path, content):
    for block in range(3):
        write(tmp_path, block, 4)
    (folder_of(tmp_path, 4) / part_file(2)).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"block-2\.part\.json is damaged"):
        find_checkpoint(tmp_path)
    assert find_blocks(tmp_path, [0, 1]).step == 4


# -- cleaning and retiring -------------------------------------------------------------------------


def test_a_run_of_a_block_retires_its_own_parts_alone(tmp_path):
    write(tmp_path, 0, 1, 2, 3, 4)
    write(tmp_path, 1, 1, 2, 3, 4, keep_last=2)
    assert steps_of(tmp_path, 0) == [1, 2, 3, 4]
    assert steps_of(tmp_path, 1) == [3, 4]
    left = sorted(p.name for p in folder_of(tmp_path, 1).iterdir())
    assert left == ["block-0.optimizer.safetensors", "block-0.part.json", "block-0.safetensors"]


def test_a_part_counts_though_older_ones_cannot_be_listed(tmp_path, monkeypatch):
    write(tmp_path, 1, 2)
    writer, told = writer_of(tmp_path, 1, keep_last=1)
    with monkeypatch.context() as patch:

        def refuse(folder):
            raise CheckpointError(f"{folder} cannot be read (Stale file handle)")

        patch.setattr("dbdist.checkpoint.retention.step_folders", refuse)
        writer.save(4, files(1, 4), ABOUT)
        writer.finish(10.0)
    assert told == []
    assert steps_of(tmp_path, 1) == [2, 4]


def test_folders_go_with_their_last_block(tmp_path):
    for block in range(3):
        write(tmp_path, block, 1, 2, 3, keep_last=1)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]


def test_a_run_of_a_block_leaves_the_newest_complete_checkpoints_whole(tmp_path):
    for block in range(3):
        write(tmp_path, block, 1, 2)
    write(tmp_path, 0, 3, 4, 5, keep_last=1)
    assert complete_steps(tmp_path) == [2], "step 1 is complete, but beyond keep_last"
    assert steps_of(tmp_path, 0) == [2, 5]
    write(tmp_path, 1, 5, keep_last=1)
    write(tmp_path, 2, 5, keep_last=1)
    assert complete_steps(tmp_path) == [5]
    write(tmp_path, 0, 6, keep_last=1)
    assert steps_of(tmp_path, 0) == [5, 6]


def test_retiring_a_block_of_a_joint_checkpoint_unmakes_its_manifest_first(tmp_path):
    write_jointly(tmp_path, 1, 2)
    (folder_of(tmp_path, 1) / "shared.safetensors").write_bytes(b"x")
    write(tmp_path, 0, 3, 4, keep_last=1)
    assert complete_steps(tmp_path) == [2]
    assert not (folder_of(tmp_path, 1) / "manifest.json").exists()
    for block in (1, 2):
        remove_block(folder_of(tmp_path, 1), block)
    assert not folder_of(tmp_path, 1).exists(), "what all blocks shared is gone with the last"


def test_a_run_of_all_blocks_cleans_up_what_is_no_part_and_what_is_older(tmp_path):
    write(tmp_path, 0, 1, 2, 3)
    write(tmp_path, 1, 2)
    write(tmp_path, 2, 2, 4)
    folder_of(tmp_path, 5).mkdir()
    (folder_of(tmp_path, 5) / "block-0.safetensors.partial").write_text("")
    CheckpointWriter(tmp_path, Topology(Layout(1)), {0}, 10, 0).clean()
    assert complete_steps(tmp_path) == [2]
    assert [steps_of(tmp_path, block) for block in range(3)] == [[2, 3], [2], [2, 4]]
    assert not folder_of(tmp_path, 1).exists()
    assert not folder_of(tmp_path, 5).exists()


def test_a_run_of_a_block_cleans_up_its_own_files_alone(tmp_path):
    write(tmp_path, 0, 1)
    write(tmp_path, 1, 1)
    path = folder_of(tmp_path, 1)
    for block in (0, 1):
        (path / part_file(block)).unlink()
    writer_of(tmp_path, 1)[0].clean()
    assert sorted(p.name for p in path.iterdir()) == sorted(files(0, 0))


def test_a_folder_that_another_run_removes_meanwhile_is_made_again(tmp_path, monkeypatch):
    real, removed = Snapshot.write, []

    def write_late(snapshot, path):
        if not removed:
            removed.append(path.parent)
            path.parent.rmdir()
        return real(snapshot, path)

    monkeypatch.setattr(Snapshot, "write", write_late)
    write(tmp_path, 1, 4)
    assert removed
    assert find_blocks(tmp_path, [1]).tensors("block-1.safetensors")["x"].eq(4).all()


# -- alone -----------------------------------------------------------------------------------------


def save_without_rank_1(rank, run_dir, steps, told_step):
    """Rank 1 is silent from `told_step` on; the others save on alone and end."""
    topology = rank.join(Layout(3))
    block = topology.block
    writer = CheckpointWriter(run_dir, topology, {0, 1, 2}, 2, block)
    told = warnings_from_now_on()
    for step in steps:
        if block == 1 and step >= told_step:
            break
        save = writer.save_own_block if step > told_step else writer.save
        save(step, files(block, step), ABOUT)
        if step < told_step:
            writer.finish(10.0)
    if block != 1:
        writer.finish(5.0)
    else:
        writer.close(0.5)
    topology.barrier()
    return told


@pytest.mark.slow
def test_who_saves_alone_waits_for_nobody_and_retires_nothing(ranks, tmp_path):
    """Step 4 is joint, step 8 waits for a rank that is gone, and those after it are alone."""
    assert ranks.run(3, save_without_rank_1, tmp_path, [4, 8, 12, 16], 8) == [[], [], []]
    assert complete_steps(tmp_path) == [4]
    assert steps_of(tmp_path, 0) == steps_of(tmp_path, 2) == [4, 8, 12, 16]
    assert steps_of(tmp_path, 1) == [4]
    write(tmp_path, 1, 12)
    assert complete_steps(tmp_path) == [4, 12]


def test_a_part_that_cannot_be_written_is_told_and_costs_that_part(tmp_path):
    (folder_of(tmp_path, 2) / "block-1.safetensors").mkdir(parents=True)
    writer, told = writer_of(tmp_path, 1)
    for step in (1, 2, 3):
        writer.save(step, files(1, step), ABOUT)
    writer.finish(10.0)
    assert len(told) == 1
    assert "checkpoint of step 2 failed: rank 0: " in told[0]
    assert told[0].endswith("block 1's newest part is of step 1") or "step 3" in told[0]
    assert steps_of(tmp_path, 1) == [1, 3]


def test_a_part_that_must_not_be_written_is_not_and_the_older_one_stays(tmp_path):
    writer, warned = writer_of(tmp_path, 0, keep_last=1)
    writer.save(2, files(0, 2.0), ABOUT)
    writer.finish(10.0)
    writer.save(4, files(0, 4.0), ABOUT, refusal="its copies have drifted apart")
    with pytest.raises(CheckpointError, match=r"step 4.*drifted apart.*is of step 2"):
        writer.finish(10.0)
    assert steps_of(tmp_path, 0) == [2]
    assert warned == []


def test_a_last_part_that_cannot_be_written_is_an_error(tmp_path):
    (folder_of(tmp_path, 2) / "block-1.safetensors").mkdir(parents=True)
    writer, _ = writer_of(tmp_path, 1)
    for step in (1, 2):
        writer.save(step, files(1, step), ABOUT)
    with pytest.raises(CheckpointError, match=r"step 2, the last, failed: .* part is of step 1"):
        writer.finish(10.0)


def first_rank_ahead(rank, run_dir, steps):
    """Rank 0 looks at what has arrived only when the others have saved all steps."""
    topology = rank.join(Layout(3))
    block = topology.block
    writer = CheckpointWriter(run_dir, topology, {0, 1, 2}, 1, block)
    told = warnings_from_now_on()
    collect = writer._mailbox.collect
    if block == 0:
        writer._mailbox.collect = lambda: []
    for step in steps:
        writer.save(step, files(block, step), ABOUT)
    writer._report.result()
    if block != 0:
        writer.finish(10.0)
    topology.barrier()
    writer._mailbox.collect = collect
    writer.finish(10.0)
    topology.barrier()
    return told


def test_checkpoints_whose_parts_arrive_together_are_completed_one_after_the_other(ranks, tmp_path):
    assert ranks.run(3, first_rank_ahead, tmp_path, [4, 8, 12]) == [[], [], []]
    assert complete_steps(tmp_path) == [12]
    assert (folder_of(tmp_path, 12) / "manifest.json").exists()
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1


def test_parts_that_were_saved_together_wait_for_their_manifest(tmp_path):
    """It comes after the metrics up to its step."""
    for block in range(3):
        writer = CheckpointWriter(tmp_path, Topology(Layout(1)), {0}, 10, block)
        shared = {"shared.safetensors": {"x": torch.ones(2)}} if block == 0 else {}
        writer.save(4, files(block, 4) | shared, ABOUT)
        writer.finish(10.0)
    (folder_of(tmp_path, 4) / "manifest.json").unlink()
    assert find_checkpoint(tmp_path) is None
    assert find_blocks(tmp_path, [0, 1]).step == 4
    write(tmp_path, 1, 4)
    assert find_checkpoint(tmp_path).step == 4
    assert not find_checkpoint(tmp_path).has("shared.safetensors")


def joint_with_a_failure(rank, run_dir, steps):
    topology = rank.join(Layout(3))
    writer = CheckpointWriter(run_dir, topology, {0, 1, 2}, 1, topology.block)
    told = warnings_from_now_on()
    for step in steps:
        writer.save(step, files(topology.block, step), ABOUT)
    ending = ""
    try:
        writer.finish(10.0)
    except CheckpointError as error:
        ending = str(error)
    topology.barrier()
    return told, ending


def test_a_block_that_cannot_write_costs_the_others_nothing(ranks, tmp_path):
    """A joint checkpoint that is given up: the parts of the other blocks stay."""
    for step in (8, 12):
        (folder_of(tmp_path, step) / "block-1.safetensors").mkdir(parents=True)
    (told, ending), *_ = ranks.run(3, joint_with_a_failure, tmp_path, [4, 8, 12])
    assert len(told) == 1
    assert "step 12, the last, failed: rank 1" in ending
    assert complete_steps(tmp_path) == [4]
    assert [steps_of(tmp_path, block) for block in range(3)] == [[4, 12], [4], [4, 12]]
    os.rmdir(folder_of(tmp_path, 12) / "block-1.safetensors")
    write(tmp_path, 1, 8 + 4)
    assert complete_steps(tmp_path) == [4, 12]


def test_a_pipe_in_place_of_a_file_is_refused_at_once(tmp_path):
    write(tmp_path, 1, 4)
    for name in ("block-1.part.json", "block-1.safetensors"):
        path = folder_of(tmp_path, 4) / name
        path.unlink()
        os.mkfifo(path)
    with pytest.raises(CheckpointError, match=r"part\.json cannot be read \(it is a pipe"):
        read_part(folder_of(tmp_path, 4), 1)
    with pytest.raises(CheckpointError, match="pipe"):
        load_weights(folder_of(tmp_path, 4) / "block-1.safetensors")
