"""Merging runs by ownership: what is taken from where, and what is refused with which reason."""

import dataclasses
import json
import os
import re

import pytest
import torch
from ranks import config_of, setup_of

from dbdist.checkpoint.manifest import find_checkpoint
from dbdist.checkpoint.names import part_file
from dbdist.checkpoint.writer import CheckpointWriter
from dbdist.commands import merge
from dbdist.config.yaml_files import write_yaml
from dbdist.errors import UserError
from dbdist.parallel.layout import Layout
from dbdist.parallel.topology import Topology
from dbdist.run.folder import read_config


def make_run(path, blocks, *options, steps=(4,), class_names=("a", "b")):
    """A run that has saved these blocks; a tensor says whose it is."""
    config = config_of(f"run_dir={path}", "parallel.sync=never", *options)
    about = {
        "samples_seen": 5,
        "seed": config.seed,
        "data": {"name": config.data.name, "class_names": class_names},
        "model": setup_of(config).describe(),
        "config": dataclasses.asdict(config),
    }
    for block in blocks:
        writer = CheckpointWriter(path, Topology(Layout(1)), {0}, 10, block, (block,))
        for step in steps:
            name, owner = f"block-{block}.safetensors", sum(path.name.encode())
            writer.save(step, {name: {"x": torch.tensor([owner, block, step])}}, about)
        writer.finish(10.0)
    path.mkdir(exist_ok=True)
    write_yaml(config, path / "config.yaml")
    return path


def owner_of(out, block, step):
    tensors = find_checkpoint(out, step).tensors(f"block-{block}.safetensors")
    owner, own_block, own_step = tensors["x"].tolist()
    assert (own_block, own_step) == (block, step)
    return owner


def name_sum(path):
    return sum(path.name.encode())


def refused(match, *words):
    with pytest.raises(UserError) as caught:
        merge.run([str(word) for word in words])
    assert "\n" not in str(caught.value)
    assert re.search(match, str(caught.value)), str(caught.value)


@pytest.fixture
def three(tmp_path):
    """Block 0 to step 8, block 1 to step 12, block 2 to step 8, each in a run of its own."""
    ends = {0: (4, 8), 1: (4, 8, 12), 2: (4, 8)}
    return [make_run(tmp_path / f"run{b}", [b], steps=steps) for b, steps in ends.items()]


# -- what is taken ---------------------------------------------------------------------------------


def test_the_newest_common_step_of_each_block_is_taken_from_its_run(three, tmp_path, capsys):
    out = tmp_path / "new/out"
    merge.run([*map(str, three), str(out)])
    checkpoint = find_checkpoint(out)
    assert checkpoint.step == 8
    assert [owner_of(out, b, 8) for b in range(3)] == [name_sum(path) for path in three]
    names = {part_file(b) for b in range(3)} | {f"block-{b}.safetensors" for b in range(3)}
    assert {p.name for p in checkpoint.path.iterdir()} == {"manifest.json", *names}
    assert {p.name for p in out.iterdir()} == {"config.yaml", "checkpoints"}
    expected = dataclasses.replace(read_config(three[0]), run_dir=str(out))
    assert read_config(out) == expected
    assert find_checkpoint(out, 8).manifest["config"]["run_dir"] == str(out)
    printed = capsys.readouterr().out
    assert f"block 1 of step 8 from {three[1]}" in printed
    assert f"dbdist evaluate {out}" in printed
    (checkpoint.path / "manifest.json").unlink()
    assert find_checkpoint(out).step == 8, "the parts are a checkpoint as well"


def test_another_step_and_an_empty_folder_will_do(three, tmp_path):
    (tmp_path / "out").mkdir()
    merge.run([*map(str, three), str(tmp_path / "out"), "--step", "4"])
    assert find_checkpoint(tmp_path / "out").step == 4


def test_a_block_of_two_runs_needs_a_source(three, tmp_path):
    other = make_run(tmp_path / "other", [1, 2], steps=(4, 8))
    refused(
        rf"block 1 of step 8 is in {three[1]} and {other}; say which with --from 1=",
        *three,
        other,
        tmp_path / "out",
    )
    sources = "--from", f"1={other}", "--from", f"2={three[2]}/"
    merge.run([*map(str, [*three, other]), str(tmp_path / "out"), *sources])
    owners = [owner_of(tmp_path / "out", b, 8) for b in range(3)]
    assert owners == [name_sum(path) for path in (three[0], other, three[2])]


def test_a_source_decides_the_step_as_well(three, tmp_path):
    """Blocks 0 and 2 would be at step 12 in `other`, but block 1 shall come from one at step 8."""
    other = make_run(tmp_path / "other", [0, 2], steps=(8, 12))
    old = make_run(tmp_path / "old", [1], steps=(8,))
    merge.run([str(other), str(old), str(tmp_path / "out"), "--from", f"1={old}"])
    assert find_checkpoint(tmp_path / "out").step == 8


def test_never_and_every_give_a_never_run(tmp_path):
    every = ("parallel.sync=every", "parallel.outer_lr=0.5", "parallel.outer_momentum=0.9")
    runs = [make_run(tmp_path / "a", [0], *every), make_run(tmp_path / "b", [1, 2])]
    merge.run([*map(str, runs), str(tmp_path / "out")])
    parallel = read_config(tmp_path / "out").validate().parallel
    assert (parallel.sync, parallel.outer_lr, parallel.outer_momentum) == ("never", 1.0, 0.0)
    both = [runs[0], make_run(tmp_path / "c", [1, 2], *every)]
    merge.run([*map(str, both), str(tmp_path / "both")])
    assert read_config(tmp_path / "both").parallel.sync == "every"


def test_what_was_trained_otherwise_is_told(tmp_path, capsys):
    runs = [make_run(tmp_path / "a", [0]), make_run(tmp_path / "b", [1, 2], "train.lr=0.5")]
    merge.run([*map(str, runs), str(tmp_path / "out")])
    assert f"continues with {runs[0]}'s train.lr" in capsys.readouterr().out


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "match"),
    [
        ("seed=1", "has seed 0, but .*b has 1"),
        ("noise.p_mean=-1", r"has boundaries \[0\.002, .*\], but .*b has \[0\.002"),
        ("model.hidden_size=24", r"has architecture\.hidden_size 12, but .*b has 24"),
        ("noise.overlap=0.2", r"has noise\.overlap 0\.05, but .*b has 0\.2"),
        ("data.name=mnist5k", "has data digits, but .*b has mnist5k"),
        ("train.ema_decay=0.9", r"has train\.ema_decay above 0 False, but .*b has True"),
    ],
)
def test_runs_of_two_models_are_refused_with_both_values(tmp_path, option, match):
    runs = [make_run(tmp_path / "a", [0]), make_run(tmp_path / "b", [1, 2], option)]
    refused(f"{runs[0]} {match}", *runs, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_cut_into_layers_is_refused(tmp_path):
    cuts = (("[1,2,1]", [0]), ("[2,1,1]", [1, 2]))
    runs = [
        make_run(tmp_path / f"{i}", blocks, f"model.layers_per_block={cut}", "model.num_layers=4")
        for i, (cut, blocks) in enumerate(cuts)
    ]
    refused(r"has layers_per_block \[1, 2, 1\], but .* has \[2, 1, 1\]", *runs, tmp_path / "out")


def test_other_class_names_are_refused(tmp_path):
    runs = [make_run(tmp_path / "a", [0])]
    runs += [make_run(tmp_path / "b", [1, 2], class_names=("b", "a"))]
    refused(r"data\.class_names \['a', 'b'\], but .*b has \['b', 'a'\]", *runs, tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (("parallel.sync=step",), r"parallel\.sync: step.*one set of shared modules"),
        (("parallel.sync=step", "mode=sequential"), "mode: sequential"),
    ],
)
def test_runs_whose_blocks_share_modules_are_refused(tmp_path, options, match):
    runs = [make_run(tmp_path / "a", [0]), make_run(tmp_path / "b", [1, 2], *options)]
    refused(f"{runs[1]} was trained with {match}", *runs, tmp_path / "out")


def test_a_block_in_no_run_and_steps_in_no_run_are_refused_with_what_there_is(three, tmp_path):
    out = tmp_path / "out"
    refused(
        rf"block 2 is in no run \({three[0]}: block 0 at step 4 8; {three[1]}: block 1 at",
        *three[:2],
        out,
    )
    refused(r"no run gives block 0 at step 12 \(.*block 1 at step 4 8 12", *three, out, "--step=12")
    late = make_run(tmp_path / "late", [2], steps=(16,))
    refused("no step that all blocks have", three[0], three[1], late, out)
    refused(f"block 1 is not in {three[0]}", *three, out, "--from", f"1={three[0]}")
    assert not out.exists()


def test_wrong_words_are_refused(three, tmp_path):
    out = tmp_path / "out"
    refused("needs two runs or more", three[0], out)
    refused("is named twice", *three, f"{three[0]}/", out)
    refused("--from 1 must be B=RUN", *three, out, "--from", "1")
    refused(r"--from 3=x must be B=RUN, with a block B of 0\.\.2", *three, out, "--from", "3=x")
    refused("nowhere is none of the runs", *three, out, "--from", "1=nowhere")
    twice = ("--from", f"1={three[1]}") * 2
    refused("--from names block 1 twice", *three, out, *twice)
    refused("nowhere holds no run", three[0], "nowhere", out)
    untrained = make_run(tmp_path / "untrained", [])
    refused(f"{untrained} has no block", three[0], untrained, out)
    refused("exists and is not empty", *three, three[2])
    assert not out.exists()


# -- whole or not at all ---------------------------------------------------------------------------


def all_files(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_damaged_file_is_found_while_it_is_copied_and_nothing_stays(three, tmp_path):
    weights = three[1] / "checkpoints/step-00000008/block-1.safetensors"
    content = weights.read_bytes()
    before = sorted(tmp_path.rglob("*"))
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refused(rf"{weights} is damaged", *three, tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before
    weights.unlink()
    refused(rf"{weights} cannot be read", *three, tmp_path / "out")
    part = three[1] / "checkpoints/step-00000008/block-1.part.json"
    part.write_text(json.dumps(json.loads(part.read_text()) | {"seed": 5}))
    refused("has seed 5|has seed 0, but", *three, tmp_path / "out")


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
@pytest.mark.parametrize("nth", [2, 5])
def test_who_is_interrupted_leaves_nothing(three, tmp_path, monkeypatch, error, nth):
    before = all_files(tmp_path)
    real, calls = os.fsync, []

    def fsync(descriptor):
        calls.append(descriptor)
        if len(calls) == nth:
            raise error
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    expected = KeyboardInterrupt if error is KeyboardInterrupt else UserError
    with pytest.raises(expected):
        merge.run([*map(str, three), str(tmp_path / "new/out")])
    monkeypatch.undo()
    assert all_files(tmp_path) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run0", "run1", "run2"]
    merge.run([*map(str, three), str(tmp_path / "new/out")])
    assert find_checkpoint(tmp_path / "new/out").step == 8
