"""DDP, FSDP2 and DeepSpeed ZeRO inside a block, on real ranks: the same training as one process
with the joined batch, apart from other blocks, and checkpoints that any of them continues."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from cases import cases
from ranks import RankPool, config_of, setup_of
from replicas import DEEPSPEED, LINEAR, engine_options

from dbdist.checkpoint.manifest import find_checkpoint
from dbdist.data.sources import load_dataset
from dbdist.parallel.layout import layout_of
from dbdist.sampling.evaluation import Evaluation
from dbdist.training.trainer import Trainer

# Adam divides by the root of the squared gradient: of a gradient that is zero but for rounding it
# makes a whole step. eps well above rounding lets the comparison see everything else.
COMMON = (
    "model.num_blocks=2",
    "model.num_layers=4",
    "train.max_steps=20",
    "train.eps=1e-3",
    "eval.batch_size=150",
    "eval.micro_batch_size=40",
    "data.name=digits",
)


@dataclass
class Result:
    weights: dict
    shared: dict
    evaluation: Evaluation
    received: dict


def train_rank(rank, options, is_float64=False):
    """Trains, or continues the run directory's newest checkpoint."""
    torch.set_default_dtype(torch.float64 if is_float64 else torch.float32)
    torch.nn.functional.linear = LINEAR
    config = config_of(*options)
    topology = rank.join(layout_of(config, rank.launch.world_size))
    data = load_dataset(config.data, "train"), load_dataset(config.data, "test")
    trainer = Trainer(setup_of(config), topology, *data, find_checkpoint(Path(config.run_dir)))
    evaluation = trainer.fit()
    weights = {}
    for owned in trainer.state.blocks:
        weights = {k: v.tolist() for k, v in owned.engine.weights().items()}
    shared = {k: v.tolist() for k, v in trainer.state.shared_parameters.items()}
    return Result(weights, shared, evaluation, dict(topology.meter.received))


def saved(run_dir, step=None):
    """Every tensor of a checkpoint."""
    checkpoint = find_checkpoint(Path(run_dir), step)
    assert checkpoint is not None
    return {
        f"{file}:{name}": tensor
        for file in checkpoint.manifest["files"]
        for name, tensor in checkpoint.tensors(file).items()
    }


def assert_close(own, expected, atol):
    assert own.keys() == expected.keys()
    worst = max(own, key=lambda k: (own[k].double() - expected[k].double()).abs().max())
    difference = (own[worst].double() - expected[worst].double()).abs().max().item()
    assert difference <= atol, f"{worst} differs by {difference}"


def run(ranks, folder, engine, *more, replicas=2, is_float64=False):
    """Trains under folder/engine; returns each rank's result."""
    options = [f"run_dir={folder / engine}", *COMMON, *more, f"parallel.replicas={replicas}"]
    options += engine_options(folder, engine)
    world = layout_of(config_of(*options), 1).world_size
    return ranks.run(world, train_rank, options, is_float64, timeout_s=240)


ENGINES = ["ddp", "fsdp", "zero1", "zero2", "zero3", "zero2-offload", "zero3-offload"]


@pytest.fixture(scope="module", autouse=True)
def deepspeed(ranks):
    """Its import takes each rank some seconds."""
    ranks.preload(*DEEPSPEED)


@pytest.fixture(scope="module")
def joined(ranks, tmp_path_factory):
    """One process a block with the joined batch: its checkpoints of 10 and 20 steps."""
    folder = tmp_path_factory.mktemp("joined")
    results = run(ranks, folder, "ddp", "checkpoint.every_steps=10", replicas=1)
    return folder / "ddp", results


@pytest.mark.parametrize("engine", cases(ENGINES, fast=["ddp", "fsdp"]))
def test_an_engine_equals_one_process_with_the_joined_batch(ranks, tmp_path, joined, engine):
    expected, single = joined
    results = run(ranks, tmp_path, engine)
    assert_close(saved(tmp_path / engine), saved(expected), atol=1e-6)
    for rank, own in enumerate(results):
        first = results[rank // 2 * 2]
        assert (own.weights, own.shared) == (first.weights, first.shared), "bit-identical"
        size = 4 * sum(torch.tensor(v).numel() for v in own.weights.values())
        shared_size = 4 * sum(torch.tensor(v).numel() for v in own.shared.values())
        passes = 3 if engine.startswith(("fsdp", "zero3")) else 2
        # Of two copies, each passes on half; what is shared is all-reduced.
        assert own.received["replica"] == 20 * (passes * size // 2 + shared_size)
        # 360 images in batches of 150: the replicas have 6 and 4 micro-batches to go through.
        assert own.evaluation.after_block == single[0].evaluation.after_block


@pytest.mark.parametrize("engine", cases(["fsdp", "zero3"], fast=["fsdp"]))
def test_end_to_end_training_is_split_among_all_processes(ranks, tmp_path, engine):
    """The control of honest comparisons, for whole models that outgrow one GPU."""
    options = ("mode=end_to_end", "train.max_steps=5")
    run(ranks, tmp_path, "ddp", *options, replicas=1)
    words = [f"run_dir={tmp_path / engine}", *COMMON, *options]
    ranks.run(2, train_rank, [*words, *engine_options(tmp_path, engine)], timeout_s=240)
    assert_close(saved(tmp_path / engine), saved(tmp_path / "ddp"), atol=1e-6)


@pytest.mark.slow
def test_ddp_equals_the_joined_batch_in_float64(ranks, tmp_path):
    run(ranks, tmp_path / "1", "ddp", replicas=1, is_float64=True)
    run(ranks, tmp_path / "2", "ddp", replicas=2, is_float64=True)
    assert_close(saved(tmp_path / "2/ddp"), saved(tmp_path / "1/ddp"), atol=1e-10)


CLIPPED = ("train.clip_norm=0.05", "train.max_steps=5")


@pytest.fixture(scope="module")
def clipped(ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("clipped")
    run(ranks, folder, "ddp", *CLIPPED, replicas=1)
    run(ranks, folder / "free", "ddp", *CLIPPED, "train.clip_norm=null", replicas=1)
    with pytest.raises(AssertionError):  # with this eps, AdamW does not hide a missing clip
        assert_close(saved(folder / "ddp"), saved(folder / "free/ddp"), atol=1e-3)
    return folder / "ddp"


@pytest.mark.parametrize("engine", cases(ENGINES, fast=["fsdp"]))
def test_clipping_takes_in_the_block_and_its_shared_modules_and_accumulation_reduces_once(
    ranks, tmp_path, clipped, engine
):
    results = run(ranks, tmp_path, engine, *CLIPPED, "train.accumulation_steps=2")
    assert_close(saved(tmp_path / engine), saved(clipped), atol=1e-6)
    if engine in ("ddp", "zero1"):
        whole = run(ranks, tmp_path / "whole", engine, *CLIPPED)
        assert results[0].received == whole[0].received


@pytest.mark.parametrize("engine", cases(ENGINES[:5], fast=["ddp"]))
def test_bf16_keeps_fp32_master_weights(ranks, tmp_path, joined, engine):
    expected, _ = joined
    run(ranks, tmp_path, engine, "train.precision=bf16")
    own, exact = saved(tmp_path / engine), saved(expected)
    assert {tensor.dtype for tensor in own.values()} == {torch.float32}
    name = "block-0.safetensors:layers.0.mlp_in.weight"
    assert not torch.equal(own[name], own[name].bfloat16().float()), "more than bf16 can hold"
    assert not torch.equal(own[name], exact[name]), "bf16 was on"
    assert (own[name] - exact[name]).abs().max() < 20 * 0.01, "at most lr a step apart"


MATRIX = [
    ("ddp", "colocated", "every"),
    ("ddp", "dedicated", "step"),
    ("ddp", "sharded", "step"),
    ("fsdp", "colocated", "never"),
    ("fsdp", "dedicated", "every"),
    ("zero2", "colocated", "every"),
    ("zero2", "dedicated", "step"),
    ("zero2", "sharded", "step"),
]
"""Every engine with every coordinator and every sync; (colocated, step) is what the tests above
train. The pairs that are left out are refused by name (tests/config/test_config.py)."""
SHORT = ("train.max_steps=4", "parallel.sync_every=2", "train.ema_decay=0.5")


@pytest.fixture(scope="module")
def by_sync(ranks, tmp_path_factory):
    """Of each sync mode, the checkpoint of a colocated run without replicas."""
    folder = tmp_path_factory.mktemp("matrix")
    for sync in ("step", "every", "never"):
        run(ranks, folder / sync, "ddp", *SHORT, f"parallel.sync={sync}", replicas=1)
    return folder


@pytest.mark.parametrize(("engine", "coordinator", "sync"), cases(MATRIX, fast=MATRIX[:4]))
def test_engine_coordinator_and_sync_go_together(
    ranks, tmp_path, by_sync, engine, coordinator, sync
):
    more = (f"parallel.coordinator={coordinator}", f"parallel.sync={sync}")
    results = run(ranks, tmp_path, engine, *SHORT, *more)
    assert_close(saved(tmp_path / engine), saved(by_sync / sync / "ddp"), atol=1e-6)
    for result in results:
        assert (result.received.get("shared", 0) == 0) == (sync == "never")


@pytest.mark.slow
def test_deepspeed_takes_a_blocks_copies_for_the_whole_world(ranks, forks, tmp_path):
    """Blocks of different sizes, each with its own order of layers, and a rank without any."""
    more = ("train.max_steps=3", "model.layers_per_block=[3,1]")
    run(ranks, tmp_path, "ddp", *more, replicas=1)
    fresh = RankPool(forks)  # DeepSpeed keeps what it knows of a process's world for its lifetime
    try:
        run(fresh, tmp_path, "zero3", *more, "parallel.coordinator=dedicated")
    finally:
        fresh.close()
    assert_close(saved(tmp_path / "zero3"), saved(tmp_path / "ddp"), atol=1e-6)


OTHERS = ["fsdp", "zero2", "zero3"]


@pytest.mark.slow
def test_every_engine_continues_what_ddp_wrote(ranks, tmp_path, joined):
    half = ("train.max_steps=10", "train.ema_decay=0")
    run(ranks, tmp_path / "half", "ddp", *half)
    for engine in OTHERS:
        shutil.copytree(tmp_path / "half/ddp", tmp_path / engine)
        run(ranks, tmp_path, engine)
        assert_close(saved(tmp_path / engine), saved(joined[0]), atol=1e-6)


@pytest.mark.parametrize("engine", cases(OTHERS, fast=["zero2"]))
def test_ddp_continues_what_every_engine_wrote(ranks, tmp_path, joined, engine):
    run(ranks, tmp_path, engine, "train.max_steps=10", "train.ema_decay=0")
    (tmp_path / engine).rename(tmp_path / "ddp")
    run(ranks, tmp_path, "ddp")
    assert_close(saved(tmp_path / "ddp"), saved(joined[0]), atol=1e-6)


@pytest.mark.slow
def test_a_checkpoint_moves_between_numbers_of_replicas(ranks, tmp_path):
    one_block = ("model.num_blocks=1", "train.ema_decay=0.9")
    run(ranks, tmp_path / "straight", "ddp", *one_block, replicas=1)
    folder = tmp_path / "moving"
    last = None
    for steps, engine, replicas in ((6, "ddp", 2), (12, "fsdp", 4), (20, "zero1", 1)):
        if last is not None:
            (folder / last).rename(folder / engine)
        folder.mkdir(exist_ok=True)
        run(ranks, folder, engine, *one_block, f"train.max_steps={steps}", replicas=replicas)
        last = engine
    assert_close(saved(folder / "zero1"), saved(tmp_path / "straight/ddp"), atol=1e-6)


@pytest.mark.parametrize("replicas", cases([1, 2], fast=[2]))
def test_a_sharded_coordinator_equals_a_colocated_one(ranks, tmp_path, replicas):
    def train(folder, coordinator, steps):
        more = (f"parallel.coordinator={coordinator}", f"train.max_steps={steps}")
        return run(ranks, folder, "ddp", *more, replicas=replicas, is_float64=True)

    train(tmp_path / "a", "colocated", 10)
    results = train(tmp_path / "b", "sharded", 10)
    assert_close(saved(tmp_path / "b/ddp"), saved(tmp_path / "a/ddp"), atol=1e-10)
    world = 2 * replicas
    # A reduce-scatter and an all-gather: all but its own part arrives twice.
    size = 8 * sum(torch.tensor(v).numel() for v in results[0].shared.values())
    padded = size + -(size // 8) % world * 8
    assert results[0].received["shared"] == 10 * 2 * padded * (world - 1) // world
    train(tmp_path / "a", "sharded", 20)
    train(tmp_path / "b", "colocated", 20)
    assert_close(saved(tmp_path / "b/ddp"), saved(tmp_path / "a/ddp"), atol=1e-10)
