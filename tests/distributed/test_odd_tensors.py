"""Buffers, frozen and tied weights, and several dtypes: trained, saved, continued and scored on
real ranks, with every way to share modules and every engine."""

import shutil
from pathlib import Path

import pytest
import torch
from cases import cases
from odd_modules import odd
from ranks import config_of, setup_of
from replicas import LINEAR, engine_options

from dbdist.checkpoint.manifest import find_checkpoint
from dbdist.data.sources import load_dataset
from dbdist.errors import ConfigError
from dbdist.inference.of_run import evaluate_run
from dbdist.parallel.layout import Layout, layout_of
from dbdist.parallel.topology import Topology
from dbdist.training.trainer import Trainer

COMMON = ("data.name=digits", "train.ema_decay=0.9", "checkpoint.every_steps=2")


def train_rank(rank, options, follow=True, table="bfloat16"):
    """Trains, or continues. Returns the accuracies, and what the tensors were at the start."""
    torch.nn.functional.linear = LINEAR
    config = config_of(*options)
    with odd(follow=follow, table=getattr(torch, table)):
        topology = rank.join(layout_of(config, rank.launch.world_size))
        data = load_dataset(config.data, "train"), load_dataset(config.data, "test")
        trainer = Trainer(setup_of(config), topology, *data, find_checkpoint(Path(config.run_dir)))
        start = {
            f"{place}.{name}": tensor.detach().double().tolist()
            for place, module in (("shared", trainer.state.shared), *blocks_of(trainer))
            for name, tensor in (*module.named_parameters(), *module.named_buffers())
        }
        for _, module in (("shared", trainer.state.shared), *blocks_of(trainer)):
            names = dict(module.named_parameters(remove_duplicate=False))
            twins = [name for name in names if name.endswith("twin.scale")]
            assert all(names[twin] is names[twin.replace("twin.", "")] for twin in twins)
            assert twins
        evaluation = trainer.fit()
    return (evaluation.figures if evaluation else None), start


def blocks_of(trainer):
    split = any(owned.engine.split.weights for owned in trainer.state.blocks)
    return [] if split else [(str(o.index), o.module) for o in trainer.state.blocks]


def score(rank, options):
    config = config_of(*options)
    with odd():
        return evaluate_run(config, Topology(Layout(1))).figures


def saved(run_dir):
    checkpoint = find_checkpoint(Path(run_dir))
    assert checkpoint is not None
    return {
        f"{file}:{name}": tensor
        for file in checkpoint.manifest["files"]
        for name, tensor in checkpoint.tensors(file).items()
    }


def assert_same_bits(own, expected):
    assert own.keys() == expected.keys()
    assert [k for k in own if not torch.equal(own[k], expected[k])] == []


WAYS = {
    "coordinated": (),
    "dedicated": ("parallel.coordinator=dedicated",),
    "sharded": ("parallel.coordinator=sharded",),
    "averaged": ("parallel.sync=every", "parallel.sync_every=2", "parallel.outer_momentum=0.9"),
    "private": ("parallel.sync=never",),
}


@pytest.mark.parametrize("way", cases(WAYS, fast=["coordinated", "sharded"]))
def test_a_model_with_odd_tensors_continues_bit_for_bit(ranks, tmp_path, way):
    more = (*COMMON, *WAYS[way])
    if way in ("coordinated", "sharded", "dedicated"):
        more += ("parallel.check_every=1",)
    options = [f"run_dir={tmp_path / 'whole'}", *more]
    world = layout_of(config_of(*options), 1).world_size
    whole = ranks.run(world, train_rank, options)
    options[0] = f"run_dir={tmp_path / 'halves'}"
    ranks.run(world, train_rank, [*options, "train.max_steps=2"])
    halves = ranks.run(world, train_rank, options)
    end, start = saved(tmp_path / "whole"), whole[-1][1]
    assert_same_bits(saved(tmp_path / "halves"), end)
    assert halves[0][0] == whole[0][0], "the same answers"
    assert ranks.run(1, score, options)[0] == whole[0][0], "in one process too"

    shared = (
        "block-2.safetensors:shared"
        if way in ("averaged", "private")
        else ("shared.safetensors:shared")
    )
    for place in (f"{shared}.", "block-2.safetensors:2."):
        file, _, prefix = place.partition(":")
        at = {"shared": "" if file.startswith("shared") else "shared."}.get(prefix[:-1], "")
        layer = "" if prefix == "shared." else "layers.2."
        own = {
            n: end[f"{file}:{at}{layer}extras.{n}"]
            for n in ("scale", "offset", "table.weight", "running", "steps")
        }
        first = {n: start[f"{prefix}{layer}extras.{n}"] for n in own}
        assert own["table.weight"].dtype == torch.bfloat16
        assert own["offset"].double().tolist() == first["offset"], "not even decay moves it"
        assert own["steps"] == 4
        for name in ("scale", "table.weight", "running"):
            assert own[name].double().tolist() != first[name], f"{name} is trained, or follows"
    assert not [k for k in end if "twin" in k], "stored once"
    assert not [k for k in end if "optimizer" in k and ("offset" in k or "running" in k)]
    average = end["block-2.ema.safetensors:layers.2.extras.table.weight"]
    assert average.dtype == torch.float32, "in which small changes count"
    for name in ("running", "steps", "offset"):
        assert torch.equal(
            end[f"block-2.ema.safetensors:layers.2.extras.{name}"],
            end[f"block-2.safetensors:layers.2.extras.{name}"],
        )


def test_a_shared_buffer_is_the_one_of_block_0_wherever_the_coordinator_sits(ranks, tmp_path):
    found = []
    for way in ("coordinated", "dedicated", "sharded"):
        options = [f"run_dir={tmp_path / way}", *COMMON, *WAYS[way]]
        ranks.run(layout_of(config_of(*options), 1).world_size, train_rank, options)
        found.append(saved(tmp_path / way)["shared.safetensors:extras.running"])
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(found[0], found[2])


def test_averaged_buffers_are_the_blocks_mean(ranks, tmp_path):
    more = (*COMMON, "parallel.sync=every", "parallel.sync_every=4")
    ranks.run(3, train_rank, [f"run_dir={tmp_path / 'every'}", *more])
    options = [f"run_dir={tmp_path / 'never'}", *COMMON, "parallel.sync=never"]
    ranks.run(3, train_rank, options)
    end, apart = saved(tmp_path / "every"), saved(tmp_path / "never")
    own = [apart[f"block-{b}.safetensors:shared.extras.running"] for b in range(3)]
    assert torch.equal(end["shared.safetensors:extras.running"], sum(own[1:], own[0].clone()) / 3)
    assert end["shared.safetensors:extras.steps"] == 4


ONE_BLOCK = (
    "data.name=digits",
    "train.eps=1e-3",
    "model.num_blocks=1",
    "model.num_layers=2",
    "checkpoint.every_steps=2",
)


@pytest.mark.parametrize(
    "engine", cases(["ddp", "fsdp", "zero1", "zero2", "zero3"], fast=["ddp", "fsdp"])
)
def test_frozen_tied_and_buffered_tensors_go_through_every_engine(ranks, tmp_path, engine):
    averages = "0" if engine == "zero3" else "0.9"  # refused by name
    more = (*ONE_BLOCK, f"train.ema_decay={averages}")
    table = "float32" if engine == "zero3" else "bfloat16"  # stage 3 trains one dtype
    ranks.run(1, train_rank, [f"run_dir={tmp_path / 'one'}", *more], False, table)
    options = [f"run_dir={tmp_path / engine}", *more, "parallel.replicas=2"]
    options += engine_options(tmp_path, engine)
    ranks.run(2, train_rank, options, False, table)
    own, expected = saved(tmp_path / engine), saved(tmp_path / "one")
    assert own.keys() == expected.keys()
    for name, tensor in own.items():
        assert "optimizer" in name or tensor.dtype == expected[name].dtype, name
        atol = 2e-2 if "table" in name and table == "bfloat16" else 1e-5
        difference = (tensor.double() - expected[name].double()).abs().max().item()
        assert difference <= atol, f"{name} differs by {difference}"
    shutil.copytree(tmp_path / "one", tmp_path / "again")
    options[0] = f"run_dir={tmp_path / 'again'}"
    ranks.run(2, train_rank, [*options, "train.max_steps=5"], False, table)
    assert saved(tmp_path / "again")["block-0.safetensors:layers.1.extras.steps"] == 5


def test_a_dtype_that_deepspeed_cannot_train_is_refused_by_name(ranks, tmp_path):
    options = [f"run_dir={tmp_path}", *ONE_BLOCK, *engine_options(tmp_path, "zero3")]
    message = ranks.run(1, refusal, options)[0]
    assert "layers.0.extras.table.weight is torch.bfloat16" in message


def refusal(rank, options):
    with pytest.raises(ConfigError) as caught:
        train_rank(rank, options)
    return str(caught.value)
