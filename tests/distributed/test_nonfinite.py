"""Losses and gradients that are not finite, on real ranks: all stop at the same step, or the block
skips its step and nobody else is touched."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from cases import cases
from ranks import config_of, setup_of, warnings_from_now_on
from reading import lines_of
from replicas import DEEPSPEED, LINEAR, engine_options

from dbdist import seeds
from dbdist.build import build_process
from dbdist.checkpoint.manifest import complete_folders
from dbdist.checkpoint.names import blocks_in, step_folders
from dbdist.data.loader import BatchStream
from dbdist.data.sources import load_dataset
from dbdist.errors import Fault
from dbdist.monitor.monitor import Monitor
from dbdist.parallel.layout import layout_of
from dbdist.training.trainer import Trainer

THREE = ("model.num_blocks=3", "train.max_steps=8", "train.log_every=1")
ONE = ("model.num_blocks=1", "model.num_layers=2", "train.max_steps=6", "train.eps=1e-3")


@dataclass
class Result:
    fault: str | None
    step: int
    weights: dict
    shared: dict
    updates: float
    """The optimizer's own count of its steps."""
    warnings: list


def train_rank(rank, options, bad, what="gradient"):
    """Trains. bad: {step: (block, replica)} whose loss, or gradient alone, is not finite there; or
    whose loss jumps."""
    torch.set_default_dtype(torch.float32)
    torch.nn.functional.linear = LINEAR
    config = config_of(*options)
    topology = rank.join(layout_of(config, rank.launch.world_size))
    topology.start_watch(60.0, lambda line: None)
    data = load_dataset(config.data, "train"), load_dataset(config.data, "test")
    monitor = None
    if topology.is_coordinator:
        reporters = set(range(topology.world_size))
        monitor = Monitor(Path(config.run_dir), None, 3, reporters, 0, 8)
    trainer = Trainer(setup_of(config), topology, *data, monitor=monitor)
    owned = trainer.state.blocks[0]

    def is_bad():
        here = topology.block, topology.replica
        return bad.get(trainer.trainees[0].steps_done) == here

    backward, objective = owned.engine.backward, owned.objective.forward
    if what == "gradient":
        owned.engine.backward = lambda loss: backward(loss * math.inf if is_bad() else loss)
    else:  # a constant, which has no gradient

        def spoiled(*inputs):
            loss = objective(*inputs)
            extra = 50.0 if what == "jump" else math.nan
            return loss._replace(value=loss.value + (extra if is_bad() else 0))

        owned.objective.forward = spoiled
    fault, warnings = None, warnings_from_now_on()
    try:
        trainer.fit()
    except Fault as caught:
        fault = str(caught)
    if monitor is not None:
        monitor.close()
    state = owned.engine.optimizer_state()
    result = Result(
        fault,
        trainer.step,
        {k: v.tolist() for k, v in owned.engine.weights().items()},
        {k: v.tolist() for k, v in trainer.state.shared_parameters.items()},
        next(iter(state.values()))["step"].item() if state else 0.0,
        warnings,
    )
    topology.close()
    return result


@pytest.mark.parametrize("sync", cases(["step", "every", "never"], fast=["step"]))
def test_all_ranks_stop_at_the_same_step_and_the_bad_one_is_kept(ranks, tmp_path, sync):
    options = (*THREE, f"parallel.sync={sync}", "parallel.sync_every=2", f"run_dir={tmp_path}")
    results = ranks.run(3, train_rank, options, {3: (1, 0)})
    assert len({result.fault.partition("; blocks ")[0] for result in results}) == 1
    assert "rank 1, block 1, step 4: loss " in results[0].fault
    assert "gradient norm nan" in results[0].fault
    assert len({result.step for result in results}) == 1
    assert 4 <= results[0].step <= 8
    folder = tmp_path / "checkpoints"
    assert not complete_folders(folder)
    parts = {path.name: blocks_in(path) for path in step_folders(folder)}
    if sync == "step":
        assert not parts, "no block goes on without the others"
    else:
        assert parts == {f"step-{results[0].step:08d}": [0, 2]}, "these keep their work"
        if results[0].step < 8:  # else it was the last, which is saved in any case
            assert results[2].fault.endswith(f"; blocks [2] saved step {results[0].step}")

    (path,) = (tmp_path / "nonfinite").iterdir()
    assert path.name == "step-00000004-block-1-rank-1.json"
    assert str(path) in results[0].fault
    report = json.loads(path.read_text())
    config = config_of(*options)
    stream = BatchStream(load_dataset(config.data, "train"), 8, config.seed, 1)
    assert report["batch_indices"] == stream.indices_of_step(3)
    generator = seeds.generator(config.seed, "sigma", 1, 3)
    sigma = build_process(config).partition.sample_level(1, 8, generator)
    assert report["sigma"] == pytest.approx(sigma.tolist())
    assert len(report["cross_entropy"]) == 8
    assert "nan" in report["grad_norms"].values()
    assert any(name.startswith("shared.") for name in report["grad_norms"])


def test_a_skipped_step_leaves_the_block_as_it_was_and_touches_no_other(ranks, tmp_path):
    options = (*THREE, "parallel.sync=never", "train.nonfinite=skip")
    plain = ranks.run(3, train_rank, (*options, f"run_dir={tmp_path / 'plain'}"), {})
    bad = ranks.run(3, train_rank, (*options, f"run_dir={tmp_path / 'bad'}"), {3: (1, 0)})
    for other in (0, 2):
        assert bad[other].weights == plain[other].weights
        assert bad[other].shared == plain[other].shared
        assert bad[other].updates == 8
    assert bad[1].updates == 7
    assert bad[1].weights != plain[1].weights
    before = ranks.run(3, train_rank, (*options, "train.max_steps=3"), {})[1]
    after = ranks.run(3, train_rank, (*options, "train.max_steps=4"), {3: (1, 0)})[1]
    assert after.weights == before.weights
    assert after.shared == before.shared

    skipped = [line["train/skipped/block1"] for line in lines_of(tmp_path / "bad")]
    assert skipped == [0, 0, 0, 1, 0, 0, 0, 0]
    assert "train/loss/block1" not in lines_of(tmp_path / "bad")[3]
    (warning,) = bad[0].warnings
    assert "rank 1, block 1, step 4: " in warning
    assert "the step is skipped, see " in warning


@pytest.mark.slow
def test_with_common_shared_modules_a_skipped_blocks_gradient_counts_as_zeros(ranks, tmp_path):
    """Against the coordinator's own step on the mean of the other blocks' gradients."""
    options = (*THREE, "train.nonfinite=skip", f"run_dir={tmp_path}", "train.max_steps=1")
    for coordinator in ("colocated", "sharded"):
        more = (*options, f"parallel.coordinator={coordinator}")
        results = ranks.run(3, train_rank, more, {0: (1, 0)})
        assert results[0].shared == results[1].shared == results[2].shared
        assert results[1].updates == 0
        for values in results[0].shared.values():
            assert torch.tensor(values).isfinite().all()
        # AdamW's first step has the sign of the gradient: the two others' sum.
        expected = ranks.run(1, sign_of_the_others, more)[0]
        start = ranks.run(1, initial, more)[0]
        for name, sign in expected.items():
            moved = torch.tensor(results[0].shared[name]) - torch.tensor(start[name]) * (1 - 1e-4)
            clear = torch.tensor(sign).abs() > 1e-6
            assert torch.equal(moved[clear].sign(), -torch.tensor(sign)[clear].sign()), name


def initial(rank, options):
    trainer = alone(options, [0])
    return {k: v.tolist() for k, v in trainer.state.shared_parameters.items()}


def alone(options, blocks):
    from dbdist.parallel.layout import Layout
    from dbdist.parallel.topology import Topology

    config = config_of(*options, "parallel.sync=never", "parallel.coordinator=colocated")
    data = load_dataset(config.data, "train"), load_dataset(config.data, "test")
    return Trainer(setup_of(config), Topology(Layout(1)), *data, blocks=blocks)


def sign_of_the_others(rank, options):
    """The sum of the clipped gradients of blocks 0 and 2."""
    torch.set_default_dtype(torch.float32)
    total = {}
    for block in (0, 2):
        trainer = alone(options, [block])
        trainer.state.set_training(True)
        trainer.state.sync.step = lambda *_, **__: None
        trainer.train_step(0)
        for name, parameter in trainer.state.shared_parameters.items():
            total[name] = total.get(name, 0) + parameter.grad
    return {name: value.tolist() for name, value in total.items()}


@pytest.mark.parametrize("what", ["gradient", "loss"])
@pytest.mark.parametrize(
    "engine",
    cases(["ddp", "fsdp", "zero1", "zero2", "zero3"], fast=["ddp", "fsdp"]),
)
def test_every_engine_skips_on_all_replicas_what_is_bad_on_one(ranks, tmp_path, engine, what):
    if engine.startswith("zero"):
        ranks.preload(*DEEPSPEED)
    options = (*ONE, "train.nonfinite=skip", f"run_dir={tmp_path / 'run'}")
    control = ranks.run(1, train_rank, options, {2: (0, 0)}, what)[0]
    assert control.updates == 5
    more = (*options, "parallel.replicas=2", *engine_options(tmp_path, engine))
    first, second = ranks.run(2, train_rank, more, {2: (0, 1)}, what)
    assert first.fault is second.fault is None
    assert first.weights == second.weights
    assert first.updates == 5
    for name, values in first.weights.items():
        torch.testing.assert_close(
            torch.tensor(values), torch.tensor(control.weights[name]), rtol=0, atol=1e-6
        )
    assert len(list((tmp_path / "run/nonfinite").iterdir())) == 2, "of both copies"


def test_more_than_max_skipped_in_a_row_stop_the_run(ranks, tmp_path):
    options = (*THREE, "train.nonfinite=skip", "train.max_skipped=2", f"run_dir={tmp_path}")
    here = (1, 0)
    results = ranks.run(3, train_rank, options, dict.fromkeys((1, 2, 4, 5), here))
    assert [result.fault for result in results] == [None] * 3
    results = ranks.run(3, train_rank, options, dict.fromkeys((1, 2, 3), here))
    assert len({result.fault for result in results}) == 1
    assert "step 4" in results[0].fault
    assert "in 3 steps in a row (train.max_skipped)" in results[0].fault


def test_a_loss_that_jumps_is_told_in_the_log(ranks, tmp_path):
    options = (*THREE, "train.max_steps=36", f"run_dir={tmp_path}")
    results = ranks.run(3, train_rank, options, {33: (2, 0)}, "jump")
    assert [result.fault for result in results] == [None] * 3
    (warning,) = results[0].warnings
    assert warning.startswith("block 2, step 34: loss 5")
    assert "on average in 33 steps" in warning
