"""Blocks that are trained by themselves: in separate jobs, at the same time, after a rank has died,
and merged; always the weights of the joint run, bit for bit."""

import io
import json
import shutil
from contextlib import redirect_stderr, redirect_stdout

import pytest
import torch
from ranks import config_of
from reading import complete_steps, evaluation_of
from safetensors.torch import load_file

from dbdist import train as launched
from dbdist.bench.faults import fail_at
from dbdist.checkpoint.manifest import find_checkpoint, newest_steps
from dbdist.checkpoint.names import SHARED, blocks_in, split_private
from dbdist.commands import merge
from dbdist.config.parse import parse_config
from dbdist.errors import ConfigError, UserError
from dbdist.inference.of_run import evaluate_run
from dbdist.parallel.layout import Layout, layout_of
from dbdist.parallel.topology import Topology
from dbdist.run.folder import read_config
from dbdist.training.setup import check_not_ahead, train

TINY = ["--config", "configs/digits.yaml", "--model.num_layers", "3", "--train.max_steps", "12"]
TINY += ["--checkpoint.every_steps", "4", "--train.ema_decay", "0.5"]
NEVER = [*TINY, "--parallel.sync", "never"]


def job(machine, run_dir, block, **more):
    words = "dbdist.train", *NEVER, "--run_dir", run_dir, "--parallel.blocks", block
    return machine.python(*words, **more)


def train_here(run_dir, block):
    """The same in this process."""
    words = [*NEVER, "--run_dir", str(run_dir), "--parallel.blocks", str(block)]
    config = parse_config("test", "", words).validate()
    assert train(config, Topology(layout_of(config, 1))) is None


def assert_same_weights(run_dir, expected, step=12):
    own, other = find_checkpoint(run_dir, step), find_checkpoint(expected, step)
    assert own.manifest["files"] == other.manifest["files"], "sizes and SHA-256 of every file"
    for name in own.manifest["files"]:
        own.tensors(name)  # they are what is there


def scored(run_dir):
    """The evaluation of the model that one process reads from a run."""
    evaluate_run(read_config(run_dir).validate(), Topology(Layout(1)))
    return without_world(run_dir)


def without_world(run_dir):
    return {k: v for k, v in evaluation_of(run_dir).items() if k != "world_size"}


@pytest.fixture(scope="module")
def joint(machine):
    """All three blocks in one torchrun."""
    folder = machine.folder / "joint"
    machine.run("dbdist.train", *NEVER, "--run_dir", folder, ranks=3)
    return folder


def test_a_job_trains_its_block_by_itself_and_says_what_is_there(machine, tmp_path, joint, capsys):
    """Three jobs in one directory, the first two at the same time."""
    folder = tmp_path / "new/run"
    pair = [job(machine, folder, block) for block in (0, 1)]
    outs = [machine.finish(each) for each in pair]
    assert "block 2" in outs[0]
    assert "not trained" in outs[0]
    assert "dbdist evaluate" not in outs[0] + outs[1]
    assert complete_steps(folder) == []
    assert read_config(folder).parallel.blocks is None
    train_here(folder, 2)
    assert f"dbdist evaluate {folder}" in capsys.readouterr().out
    assert complete_steps(folder) == [8, 12]
    assert_same_weights(folder, joint)
    assert_same_weights(folder, joint, 8)
    assert scored(folder) == without_world(joint)
    names = {p.name for p in folder.iterdir()} - {"evaluation.json"}
    metrics = {f"metrics.blocks-{block}.jsonl" for block in range(3)}
    boards = {f"blocks-{block}" for block in range(3)}
    assert names == {".lock", "config.yaml", "checkpoints", *metrics, *boards}
    assert all(list((folder / board).glob("events.out.tfevents.*")) for board in boards)
    lines = (folder / "metrics.blocks-1.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 4, 8, 10, 12]
    losses = {k: v for k, v in json.loads(lines[-1]).items() if k.startswith("train/")}
    jointly = json.loads((joint / "metrics.jsonl").read_text().splitlines()[-1])
    assert losses == {k: v for k, v in jointly.items() if k.endswith("block1") and "train" in k}


@pytest.mark.slow
def test_blocks_of_three_directories_merge_to_the_joint_run(machine, joint, tmp_path):
    """Each block in a run directory and a new process of its own, two jobs at a time."""
    folders = [tmp_path / f"run{block}" for block in range(3)]
    machine.finish(*(job(machine, folders[block], block, is_new=True) for block in (0, 1)))
    machine.finish(job(machine, folders[2], 2, is_new=True))
    merge.run([*map(str, folders), str(tmp_path / "out")])
    assert_same_weights(tmp_path / "out", joint)
    assert scored(tmp_path / "out") == without_world(joint)


@pytest.fixture(scope="module")
def bereft(machine):
    """A joint run whose rank 1 was killed in step 7, when the others had saved their last."""
    run_dir = machine.folder / "bereft"
    last = run_dir / "checkpoints/step-00000012"
    after = [last / f"block-{block}.part.json" for block in (0, 2)]
    fault = fail_at(rank=1, step=7, after=after)
    machine.finish(machine.failing(3, [fault], *NEVER, "--run_dir", run_dir), code=1)
    return run_dir


@pytest.mark.slow
def test_a_block_whose_rank_was_killed_is_continued_alone(bereft, joint, tmp_path, capsys):
    folder = shutil.copytree(bereft, tmp_path / "run")
    assert newest_steps(folder, 3) == [12, 4, 12]
    assert complete_steps(folder) == [4]
    assert not (folder / "evaluation.json").exists()
    others = {p: p.stat().st_mtime_ns for b in (0, 2) for p in folder.rglob(f"block-{b}.*")}
    train_here(folder, 1)
    assert "continuing from step 4" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in others} == others, "nothing of theirs was touched"
    assert complete_steps(folder) == [8, 12]
    assert_same_weights(folder, joint)
    assert scored(folder) == without_world(joint)


# -- in this process -------------------------------------------------------------------------------


def train_rank(rank, options):
    """What this rank printed."""
    config = config_of(*options)
    topology = rank.join(layout_of(config, rank.launch.world_size))
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(out):
        evaluation = train(config, topology)
    assert (evaluation is None) == (config.parallel.blocks is not None)
    return out.getvalue()


def options_of(run_dir, *more, sync="never", steps=6):
    base = f"run_dir={run_dir} train.max_steps={steps} checkpoint.every_steps=2"
    return [*base.split(), f"parallel.sync={sync}", *more]


@pytest.fixture(scope="module")
def jointly(ranks, tmp_path_factory):
    """Three ranks, six steps: {sync: its run directory}."""
    folder = tmp_path_factory.mktemp("jointly")
    every = "parallel.sync_every=4", "parallel.outer_momentum=0.9", "parallel.outer_lr=0.7"
    for sync, more in (("never", ()), ("every", every)):
        ranks.run(3, train_rank, options_of(folder / sync, *more, sync=sync))
    return folder, every


def test_two_blocks_train_in_one_job_and_a_third_by_itself(ranks, tmp_path, jointly):
    folder, _ = jointly
    options = options_of(tmp_path)
    ranks.run(2, train_rank, [*options, "parallel.blocks=[2,0]"])
    assert newest_steps(tmp_path, 3) == [6, None, 6]
    assert (tmp_path / "metrics.blocks-0-2.jsonl").exists()
    ranks.run(1, train_rank, [*options, "parallel.blocks=1"])
    assert_same_weights(tmp_path, folder / "never", 6)


@pytest.mark.slow
def test_a_merged_run_is_continued_as_the_joint_one(ranks, tmp_path, jointly):
    """Blocks 0 and 2 from one run, block 1 from another; then all together."""
    folder, _ = jointly
    for blocks, name in (("[0,2]", "a"), ("1", "b")):
        num_ranks = 2 if name == "a" else 1
        options = options_of(tmp_path / name, f"parallel.blocks={blocks}")
        ranks.run(num_ranks, train_rank, options)
    merge.run([str(tmp_path / name) for name in ("a", "b", "out")])
    shutil.copytree(folder / "never", tmp_path / "joint")
    for name in ("out", "joint"):
        told = ranks.run(3, train_rank, options_of(tmp_path / name, steps=8))[0]
        assert "continuing from step 6" in told
    assert_same_weights(tmp_path / "out", tmp_path / "joint", 8)
    assert without_world(tmp_path / "out") == without_world(tmp_path / "joint")


def test_replicas_of_a_block_train_it_alone(ranks, tmp_path, jointly):
    folder, _ = jointly
    options = options_of(tmp_path, "parallel.blocks=1", "parallel.replicas=2")
    ranks.run(2, train_rank, options)
    path = tmp_path / "checkpoints/step-00000006"
    assert blocks_in(path) == [1]
    own = torch.cat([t.flatten() for t in tensors_of(path, 1).values()])
    expected = tensors_of(folder / "never/checkpoints/step-00000006", 1).values()
    torch.testing.assert_close(own, torch.cat([t.flatten() for t in expected]), rtol=0, atol=1e-4)


def tensors_of(path, block):
    return dict(sorted(load_file(path / f"block-{block}.safetensors").items()))


def test_a_joint_run_goes_on_where_all_blocks_are_and_tells_of_those_ahead(
    ranks, tmp_path, jointly
):
    folder, _ = jointly
    shutil.copytree(folder / "never", tmp_path / "run")
    options = options_of(tmp_path / "run", steps=10)
    ranks.run(1, train_rank, [*options, "parallel.blocks=1"])
    assert newest_steps(tmp_path / "run", 3) == [6, 10, 6]
    assert complete_steps(tmp_path / "run") == [4, 6]
    told = ranks.run(3, train_rank, options_of(tmp_path / "run", steps=8))[0]
    assert "continuing from step 6" in told
    assert "block 1 has step 10, but all blocks start from step 6" in told
    assert "--parallel.blocks [0,2] would train" in told
    assert newest_steps(tmp_path / "run", 3) == [8, 10, 8], "what is ahead stays"
    assert complete_steps(tmp_path / "run") == [6, 8]


def test_every_goes_on_from_parts_with_the_mean_of_the_blocks(ranks, tmp_path, jointly):
    """From step 6 each block alone to 8; the joint run then averages what the blocks hold."""
    folder, every = jointly
    run = shutil.copytree(folder / "every", tmp_path / "run")
    options = options_of(run, *every, sync="every", steps=8)
    for block in range(3):
        ranks.run(1, train_rank, [*options, f"parallel.blocks={block}"])
    checkpoint = find_checkpoint(run)
    assert checkpoint.step == 8
    assert not checkpoint.has(SHARED)
    copies = [split_private(checkpoint.tensors(f"block-{b}.safetensors"))[1] for b in range(3)]
    name = min(copies[0])
    assert not torch.equal(copies[0][name], copies[1][name]), "they have gone their own ways"
    told = ranks.run(3, train_rank, options_of(run, *every, sync="every", steps=9))[0]
    assert "was saved block by block: the common parameters are the mean" in told
    assert "outer momentum starts at zero" in told
    anchor = find_checkpoint(run, 9).tensors(SHARED)[name]  # step 9 averages nothing
    torch.testing.assert_close(anchor, sum(c[name] for c in copies) / 3, rtol=0, atol=1e-7)


def test_every_does_not_replace_what_blocks_did_by_themselves(ranks, tmp_path, jointly):
    """Blocks 0 and 1 alone from 6 to 8, beyond block 2."""
    folder, every = jointly
    run = shutil.copytree(folder / "every", tmp_path / "run")
    for block in range(2):
        options = options_of(run, *every, sync="every", steps=8)
        ranks.run(1, train_rank, [*options, f"parallel.blocks={block}"])
    before = sorted(path.name for path in run.rglob("block-*"))
    config = config_of(*options_of(run, *every, sync="every", steps=9))
    checkpoint = find_checkpoint(run)
    with pytest.raises(ConfigError) as caught:
        check_not_ahead(config, checkpoint, ())
    assert str(caught.value) == (
        f"{run} has blocks that were trained by themselves, block 0 to step 8, block 1 to step 8, "
        "beyond step 6, the newest that all have; bring the others there first "
        "(--parallel.blocks 2 --train.max_steps 8), or give another run_dir"
    )
    with pytest.raises(AssertionError, match="block 0 to step 8, block 1 to step 8, beyond step 6"):
        ranks.run(3, train_rank, options_of(run, *every, sync="every", steps=9))
    assert sorted(path.name for path in run.rglob("block-*")) == before
    ahead = [run / "checkpoints/step-00000008"]
    check_not_ahead(config, checkpoint, ahead)  # as it will be set aside
    check_not_ahead(config_of(*options_of(run, sync="never")), checkpoint, ())


def test_blocks_of_other_configurations_and_numbers_of_ranks_are_refused(tmp_path, jointly):
    folder, _ = jointly
    words = [*NEVER, "--run_dir", str(tmp_path / "run"), "--parallel.blocks", "[0,1]"]
    with pytest.raises(UserError, match="2 blocks x 1 replica need 2 proc"):
        launched.run(words)
    assert not (tmp_path / "run").exists()
    run = shutil.copytree(folder / "never", tmp_path / "held")
    (run / "metrics.jsonl").unlink()
    for path in run.rglob("manifest.json"):
        path.unlink()
    for path in run.rglob("block-1.*"):
        path.unlink()
    for words, text in (
        (["train.lr=0.5", "parallel.blocks=1"], "train.lr 0.01, not 0.5"),
        (["checkpoint.resume=true", "parallel.blocks=1"], r"no complete checkpoint of blocks [1]"),
        (["checkpoint.resume=false", "parallel.blocks=2"], "holds a checkpoint of step 6"),
        (["train.max_steps=4", "parallel.blocks=2"], "at step 6 already"),
    ):
        with pytest.raises(UserError) as caught:
            train(config_of(*options_of(run), *words), Topology(Layout(1)))
        assert text in str(caught.value)
