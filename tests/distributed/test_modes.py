"""The three modes in the same trainer: what each trains, and options that change how, not what."""

import math

import pytest
import torch
from ranks import config_of, setup_of

from dbdist import seeds
from dbdist.bench.step import measure
from dbdist.config.parse import parse_config
from dbdist.data.images import random_images
from dbdist.data.sources import dataset_spec, load_dataset
from dbdist.parallel.layout import layout_of
from dbdist.parallel.topology import Topology
from dbdist.training.trainer import Trainer


def trained(tmp_path, *options):
    """A trainer of one process, after its last step."""
    config = config_of(f"run_dir={tmp_path}", *options)
    data = load_dataset(config.data, "train"), load_dataset(config.data, "test")
    trainer = Trainer(setup_of(config), Topology(layout_of(config, 1)), *data)
    trainer.fit()
    return trainer


def test_sequential_trains_one_random_block_a_step_and_leaves_the_others_alone(tmp_path):
    trainer = trained(tmp_path, "mode=sequential", "train.max_steps=1", "train.weight_decay=0.5")
    generator = seeds.generator(0, "block")
    order = torch.randint(3, (3,), generator=generator).tolist()
    assert [trainee.steps_done for trainee in trainer.trainees] == [
        order.count(b) for b in range(3)
    ]
    untrained = [owned for owned in trainer.state.blocks if owned.index not in order]
    fresh = Trainer(trainer.setup, trainer.topology, trainer.train_set, trainer.test_set)
    for owned in untrained:  # not even decayed
        for a, b in zip(
            owned.module.parameters(),
            fresh.state.blocks[owned.index].module.parameters(),
            strict=True,
        ):
            assert torch.equal(a, b)


def test_activation_checkpointing_changes_no_weight(tmp_path, float64):
    plain = trained(tmp_path / "a", "mode=end_to_end", "model.dropout=0.2")
    frugal = trained(
        tmp_path / "b",
        "mode=end_to_end",
        "model.dropout=0.2",
        "train.activation_checkpointing=true",
    )
    for a, b in zip(
        plain.state.blocks[0].module.parameters(),
        frugal.state.blocks[0].module.parameters(),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_bf16_keeps_parameters_in_float32(tmp_path):
    trainer = trained(tmp_path, "mode=sequential", "train.precision=bf16")
    assert {p.dtype for p in trainer.state.parameters.values()} == {torch.float32}
    exact = trained(tmp_path / "exact", "mode=sequential")
    for a, b in zip(trainer.state.blocks, exact.state.blocks, strict=True):
        for p, q in zip(a.module.parameters(), b.module.parameters(), strict=True):
            assert torch.isfinite(p).all()
            assert (p - q).abs().max() < 4 * 0.01 * 4, "at most lr a step apart"
    assert not all(
        torch.equal(p, q)
        for p, q in zip(
            trainer.state.shared.parameters(), exact.state.shared.parameters(), strict=True
        )
    ), "bf16 was on"


def test_the_learning_rate_warms_up_then_follows_half_a_cosine(tmp_path):
    options = (
        "train.lr=0.1",
        "train.warmup_steps=4",
        "train.schedule=cosine",
        "train.max_steps=14",
    )
    trainer = trained(tmp_path, "mode=sequential", *options, "train.min_lr_ratio=0.2")
    optimizer = trainer.state.blocks[0].engine.optimizer

    def lr(step):
        trainer.state.set_lr(float(step), trainer.max_steps)
        return optimizer.param_groups[0]["lr"]

    assert [lr(s) for s in range(4)] == pytest.approx([0.02, 0.04, 0.06, 0.08])
    assert lr(4) == pytest.approx(0.1)
    assert lr(9) == pytest.approx(0.1 * (0.2 + 0.8 * 0.5))
    assert lr(14) == pytest.approx(0.02)
    expected = 0.1 * (0.2 + 0.8 * (1 + math.cos(math.pi * 0.3)) / 2)
    assert lr(7) == pytest.approx(expected)


@pytest.mark.slow
def test_a_block_step_of_the_cifar100_shape_is_forward_backward_and_optimizer():
    """At least 95 % of its time, with the configuration's own augmentation in one worker."""
    words = ["--config", "configs/cifar100.yaml", "--data.num_workers=1"]
    config = parse_config("test", "", words).validate()
    train_set = random_images(dataset_spec(config.data), 512, config.data.augment)
    result = measure(config, train_set, block=1, warmup=1, steps=1)
    assert result["compute_share"] >= 0.95, result["share"]
