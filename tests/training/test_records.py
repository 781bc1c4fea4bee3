"""What a rank records between two lines of metrics."""

from ranks import config_of

from dbdist.data import load_dataset
from dbdist.parallel.layout import Layout
from dbdist.parallel.topology import Topology
from dbdist.training.trainer import Trainer


def test_a_step_that_is_recorded_twice_is_measured_once(tmp_path):
    """As when a run is stopped just after a line: the second time would tell of no steps."""
    config = config_of(f"run_dir={tmp_path}", "mode=sequential", "train.max_steps=4")
    data = load_dataset(config.data, "train"), load_dataset(config.data, "test")
    trainer = Trainer(config, Topology(Layout(1)), *data)
    trainer.state.set_training(True)
    for step in range(2):
        trainer.train_step(step)
    assert trainer.records.measure(2)["perf/samples_per_s/block0"] > 0
    assert trainer.records.measure(2) == {}
    trainer.train_step(2)
    assert "comm/bytes_per_step/rank0" in trainer.records.measure(3)
    trainer.close()
