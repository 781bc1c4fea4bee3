"""What a rank records between two lines of metrics."""

import torch
from ranks import config_of, setup_of

from dbdist.data.sources import load_dataset
from dbdist.parallel.layout import Layout
from dbdist.parallel.topology import Topology
from dbdist.training.records import StepResult
from dbdist.training.trainer import Trainer


def build_trainer(tmp_path):
    config = config_of(f"run_dir={tmp_path}", "mode=sequential", "train.max_steps=4")
    data = load_dataset(config.data, "train"), load_dataset(config.data, "test")
    return Trainer(setup_of(config), Topology(Layout(1)), *data)


def test_a_record_has_means_over_steps_and_samples_under_the_tasks_names(tmp_path):
    trainer = build_trainer(tmp_path)
    trainee, records = trainer.trainees[0], trainer.records
    trainee.seconds = 1.0
    for step, loss in enumerate((1.0, 2.0)):
        halves = [{"kl": torch.full((2,), value)} for value in (loss, loss + 4)]
        level_N = [torch.full((2,), trainee.histogram.low)] * 2
        done = StepResult(torch.tensor(loss, dtype=torch.float64), halves, level_N)
        records.note(trainee, done, loss, grad_norm=10.0 * (step + 1))
    found = records.measure(2)
    assert found["train/kl/block0"] == 3.5
    assert (found["train/loss/block0"], found["train/grad_norm/block0"]) == (1.5, 15.0)
    assert "train/kl/block1" not in found
    assert trainee.histogram.sums["kl"][0] == 2 * (1.0 + 5.0) + 2 * (2.0 + 6.0)
    assert "train/loss/block0" not in records.measure(3), "the sums begin anew"
    trainer.close()


def test_a_step_that_is_recorded_twice_is_measured_once(tmp_path):
    """As when a run is stopped just after a line: the second time would tell of no steps."""
    trainer = build_trainer(tmp_path)
    trainer.state.set_training(True)
    for step in range(2):
        trainer.train_step(step)
    assert trainer.records.measure(2)["perf/samples_per_s/block0"] > 0
    assert trainer.records.measure(2) == {}
    trainer.train_step(2)
    assert "comm/bytes_per_step/rank0" in trainer.records.measure(3)
    trainer.close()
