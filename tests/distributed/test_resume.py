"""Checkpoints of real runs: resumed bit for bit, topology-free, exported; nothing half-written
counts."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from cases import cases
from ranks import config_of
from reading import lines_of, tensors_of
from safetensors.torch import load_file

import dbdist
from dbdist.checkpoint.choose import Candidates
from dbdist.checkpoint.manifest import find_checkpoint
from dbdist.commands.export import export
from dbdist.data.sources import load_dataset
from dbdist.errors import CheckpointError, ConfigError, UserError
from dbdist.inference.of_run import evaluate_run, layout_for_evaluation
from dbdist.parallel.layout import Layout, layout_of
from dbdist.training.setup import train


def train_run(rank, options):
    config = config_of(*options)
    topology = rank.join(layout_of(config, rank.launch.world_size))
    return train(config, topology)


def assert_same_files(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].keys() == b[name].keys(), name
        for key, tensor in a[name].items():
            assert torch.equal(tensor, b[name][key]), f"{name}: {key}"


def run_options(run_dir, steps, *more):
    return [f"run_dir={run_dir}", f"train.max_steps={steps}", "train.log_every=5", *more]


RUNS = {
    "step": ("parallel.sync=step", "train.ema_decay=0.9"),
    "every": ("parallel.sync=every", "parallel.sync_every=8"),
    "outer": (
        "parallel.sync=every",
        "parallel.sync_every=5",
        "parallel.outer_lr=0.7",
        "parallel.outer_momentum=0.9",
    ),
    "never": ("parallel.sync=never", "train.ema_decay=0.9"),
    "dropout": (
        "model.dropout=0.2",
        "task.condition_dropout=0.1",
        "train.accumulation_steps=2",
        "train.warmup_steps=15",
    ),
}


@pytest.mark.parametrize("name", cases(RUNS, fast=["dropout"]))
def test_twenty_steps_equal_ten_and_resume_and_ten_bit_for_bit(ranks, tmp_path, name):
    more = RUNS[name]
    ranks.run(3, train_run, run_options(tmp_path / "straight", 20, *more))
    ranks.run(3, train_run, run_options(tmp_path / "parts", 10, *more))
    ranks.run(3, train_run, run_options(tmp_path / "parts", 20, *more))
    assert_same_files(tensors_of(tmp_path / "parts", 20), tensors_of(tmp_path / "straight", 20))
    straight = [x for x in lines_of(tmp_path / "straight") if x["step"] in (15, 20)]
    resumed = [x for x in lines_of(tmp_path / "parts") if x["step"] in (15, 20)]
    for a, b in zip(straight, resumed, strict=True):
        assert {k: v for k, v in a.items() if "bytes" not in k} == {
            k: v for k, v in b.items() if "bytes" not in k
        }
    steps = [line["step"] for line in lines_of(tmp_path / "parts")]
    assert steps == sorted(set(steps)), "no step appears twice"


@pytest.mark.parametrize("mode", ["sequential", "end_to_end"])
def test_the_other_modes_resume_bit_for_bit(ranks, tmp_path, mode):
    more = (f"mode={mode}", "model.dropout=0.1", "train.ema_decay=0.5")
    ranks.run(1, train_run, run_options(tmp_path / "straight", 8, *more))
    ranks.run(1, train_run, run_options(tmp_path / "parts", 4, *more))
    ranks.run(1, train_run, run_options(tmp_path / "parts", 8, *more))
    assert_same_files(tensors_of(tmp_path / "parts", 8), tensors_of(tmp_path / "straight", 8))


def test_a_checkpoint_is_continued_by_another_topology(ranks, tmp_path):
    """colocated R=1, then dedicated, then R=2: the same as straight, to rounding."""
    more = ("model.num_blocks=2", "model.num_layers=2")
    ranks.run(2, train_run, run_options(tmp_path / "straight", 9, *more))
    ranks.run(2, train_run, run_options(tmp_path / "parts", 3, *more))
    ranks.run(
        3, train_run, run_options(tmp_path / "parts", 6, *more, "parallel.coordinator=dedicated")
    )
    assert_same_files(
        tensors_of(tmp_path / "parts", 6),
        _train_to(ranks, tmp_path / "six", 6, more),
    )
    ranks.run(4, train_run, run_options(tmp_path / "parts", 9, *more, "parallel.replicas=2"))
    a, b = tensors_of(tmp_path / "parts", 9), tensors_of(tmp_path / "straight", 9)
    for name in ("shared.safetensors", "block-0.safetensors", "block-1.safetensors"):
        for key, tensor in a[name].items():
            torch.testing.assert_close(tensor, b[name][key], rtol=0, atol=2e-3)  # a fraction of lr


def _train_to(ranks, run_dir, steps, more):
    ranks.run(2, train_run, run_options(run_dir, steps, *more))
    return tensors_of(run_dir, steps)


def test_the_files_of_a_run_are_the_documented_ones(ranks, tmp_path):
    more = ("checkpoint.every_steps=2", "checkpoint.keep_last=2", "eval.every_steps=5")
    ranks.run(3, train_run, run_options(tmp_path, 10, *more))
    top = sorted({p.name for p in tmp_path.iterdir()} - {".lock"})
    names = [
        "checkpoints",
        "config.yaml",
        "evaluation.json",
        "events.out.tfevents",
        "metrics.jsonl",
    ]
    assert all(found.startswith(name) for found, name in zip(top, names, strict=True))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000008",
        "step-00000010",
    ]
    checkpoint = find_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.step == 10
    blocks = [f"block-{b}{kind}.safetensors" for b in range(3) for kind in ("", ".optimizer")]
    assert set(checkpoint.manifest["files"]) == {
        "shared.safetensors",
        "shared.optimizer.safetensors",
        *blocks,
    }
    names = load_file(checkpoint.path / "block-1.safetensors").keys()
    assert {n.split(".")[1] for n in names} == {"1"}, "a block's file holds its own layers"
    lines = lines_of(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 4, 5, 6, 8, 10]
    assert {
        "train/loss/block0",
        "train/cross_entropy/block2",
        "val/accuracy",
        "comm/bytes_per_step/rank0",
    } <= set(lines[-1])
    assert "val/accuracy_after_block/2" in lines[3]
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    assert evaluation["num_samples"] == 360
    assert evaluation["world_size"] == 3
    assert evaluation["step"] == 10
    assert len(evaluation["accuracy_after_block"]) == 3


def evaluate_rank(rank, options, run_options_):
    config = config_of(*run_options_, *options)
    layout = layout_for_evaluation(config, rank.launch.world_size)
    return evaluate_run(config, rank.join(layout))


@pytest.mark.parametrize("sync", cases(["step", "never"], fast=["step"]))
def test_evaluation_and_export_agree_for_any_number_of_processes(ranks, tmp_path, sync):
    options = run_options(tmp_path / "run", 30, f"parallel.sync={sync}", "eval.micro_batch_size=33")
    trained = ranks.run(3, train_run, options)[0]
    for world_size in (1, 3, 6):
        evaluation = ranks.run(world_size, evaluate_rank, [], options)[0]
        assert evaluation.value == trained.value
        assert evaluation.after_block == trained.after_block
    config = config_of(*options)
    export(config, tmp_path / "out")
    data = load_dataset(config.data, "test")
    images, labels = data.__getitems__(list(range(len(data)))).values()
    pixels = (
        images * torch.tensor(data.spec.std)[:, None, None]
        + torch.tensor(data.spec.mean)[:, None, None]
    )
    model = dbdist.load(tmp_path / "out")
    predicted = model.predict(pixels.clamp(0, 1))
    assert (predicted == labels).double().mean().item() == pytest.approx(trained.value)
    has_private = any(
        k.startswith("block-2.shared.") for k in load_file(tmp_path / "out/model.safetensors")
    )
    assert has_private == (sync == "never")


def failure_of_rank(rank, options):
    config = config_of(*options)
    topology = rank.join(layout_of(config, rank.launch.world_size))
    try:
        train(config, topology)
    except UserError as error:
        return type(error).__name__, str(error)
    return None


@pytest.mark.slow
def test_wrong_run_directories_and_damaged_checkpoints_are_refused_on_every_rank(ranks, tmp_path):
    run = tmp_path / "run"
    ranks.run(3, train_run, run_options(run, 4))
    before = {p: p.read_bytes() for p in run.rglob("*.safetensors")} | {
        run: (run / "config.yaml").read_bytes()
    }

    def failures(*more, steps=6):
        told = ranks.run(3, failure_of_rank, run_options(run, steps, *more))
        assert len(set(told)) == 1, "every rank says the same"
        assert told[0] is not None
        return told[0]

    assert "train.lr" in failures("train.lr=0.5")[1]
    assert failures("model.hidden_size=24")[0] == ConfigError.__name__
    assert "checkpoint.resume" in failures("checkpoint.resume=false")[1]
    assert {p: p.read_bytes() for p in run.rglob("*.safetensors")} | {
        run: (run / "config.yaml").read_bytes()
    } == before, "nothing was touched"

    weights = run / "checkpoints/step-00000004/block-2.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-10])
    kind, text = failures()
    assert kind == CheckpointError.__name__
    assert "block-2.safetensors" in text
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert "damaged" in failures()[1]
    weights.unlink()
    assert "block-2.safetensors" in failures()[1]
    weights.write_bytes(content)

    (run / "config.yaml").unlink()  # the checkpoint itself knows its shape
    assert "hidden_size" in failures("model.hidden_size=24")[1]


def refusal_of_rank(rank, folder):
    topology = rank.join(Layout(2))
    own = Path(folder) / str(topology.rank)
    try:
        Candidates(own, topology, {}, lambda _: [], fallback=True, is_training=True).newest()
    except CheckpointError as error:
        return str(error).replace(str(own), "OWN")
    return None


def test_ranks_that_see_different_folders_are_told(ranks, tmp_path):
    path = tmp_path / "0/checkpoints/step-00000004"
    path.mkdir(parents=True)
    (path / "manifest.json").write_text("{}")
    told = ranks.run(2, refusal_of_rank, str(tmp_path))
    assert told[0] is not None
    assert "OWN is not the same folder on all ranks" in told[0]
    assert "'step-00000004', 'none'" in told[0]
    assert told[1] == told[0]


def test_an_incomplete_checkpoint_is_ignored_and_cleaned_up(ranks, tmp_path):
    ranks.run(3, train_run, run_options(tmp_path / "a", 4, "checkpoint.every_steps=2"))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b/checkpoints/step-00000004/manifest.json").unlink()
    checkpoint = find_checkpoint(tmp_path / "b")
    assert checkpoint is not None
    assert checkpoint.step == 2
    ranks.run(3, train_run, run_options(tmp_path / "b", 4, "checkpoint.every_steps=2"))
    assert_same_files(tensors_of(tmp_path / "b", 4), tensors_of(tmp_path / "a", 4))
