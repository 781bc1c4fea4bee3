"""Signs of life between real ranks: nobody is accused without a reason, and who is gone is named.

That a stuck rank is named, and what happens then, is in tests/distributed/test_faults.py: it ends
processes.
"""

import time

import pytest
from ranks import config_of, setup_of

from dbdist.data.sources import load_dataset
from dbdist.parallel.health.guard import Guard
from dbdist.parallel.layout import Layout, layout_of
from dbdist.training.trainer import Trainer

TIMEOUT_S = 5.0


def train_slowly(rank, options):
    """Takes longer than the timeout, but no step does. Returns what the watch said."""
    config = config_of(*options)
    topology = rank.join(layout_of(config, rank.launch.world_size))
    data = load_dataset(config.data, "train"), load_dataset(config.data, "test")
    trainer = Trainer(setup_of(config), topology, *data)
    step = trainer.train_step

    def slow_step(index):
        time.sleep(0.6 if topology.block == 0 else 0)
        step(index)

    trainer.train_step = slow_step
    said = []
    topology.start_watch(TIMEOUT_S, said.append)  # a verdict would also end this process
    trainer.fit()
    topology.close()
    return said, trainer.step


@pytest.mark.slow
def test_slow_ranks_and_those_that_wait_for_them_are_not_stuck(ranks, tmp_path):
    """A dedicated coordinator does nothing but wait."""
    options = ("model.num_blocks=2", "model.num_layers=2", f"run_dir={tmp_path}")
    more = ("parallel.coordinator=dedicated", "train.max_steps=12")
    assert ranks.run(3, train_slowly, (*options, *more)) == [([], 12)] * 3


def leave(rank, how):
    """Rank 2 leaves, saying how, or without a word; the others say who is missing."""
    topology = rank.join(Layout(3))
    topology.start_watch(60.0, lambda line: None)
    topology.watch.at("forward")
    topology.watch.stopping.may_begin(6)
    time.sleep(1.2)
    if topology.rank == 2 and how == "silently":
        topology.watch._guard._is_closing.set()
    elif topology.rank == 2:
        topology.watch.close(how)
    topology.barrier()
    told = topology.watch.missing() if topology.rank != 2 else topology.watch.here()
    topology.barrier()
    topology.close()
    return told


@pytest.mark.slow
def test_who_is_gone_is_named_with_its_step_and_phase(ranks):
    for told in ranks.run(3, leave, "silently")[:2]:
        assert told == "rank 2 (block 2) is gone, it was at step 7, forward"


def test_who_says_why_it_ends_is_quoted(ranks):
    told = ranks.run(3, leave, "ended: disk full")
    assert told[0] == told[1] == "rank 2 (block 2) is gone, it was at step 7, ended: disk full"
    assert told[2] == "rank 2 (block 2) at step 7, ended: disk full"


def test_who_has_finished_is_not_missing(ranks):
    assert ranks.run(3, leave, "finished")[:2] == ["", ""]


def test_a_stuck_rank_leaves_its_stack(tmp_path):
    guard = object.__new__(Guard)
    guard._stack_file = tmp_path / "stuck/rank-1.txt"
    assert guard._leave_stack().endswith("; its stack is in " + str(guard._stack_file))
    assert "test_a_stuck_rank_leaves_its_stack" in guard._stack_file.read_text()
