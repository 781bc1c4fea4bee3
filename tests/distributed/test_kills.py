"""One run that loses a rank twenty times, at random and at the worst moments: nothing of it shows
in what it leaves."""

import random
import signal
import time
from dataclasses import dataclass

import pytest
from reading import complete_steps, lines_of, result_of
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dbdist.bench.faults import MOMENTS, fail_at
from dbdist.bench.job import send
from dbdist.bench.soak import read_metrics

LAST = 160
COMMON = (
    f"--model.num_layers 3 --train.max_steps {LAST} --train.log_every 3 --checkpoint.every_steps 7 "
    "--train.warmup_steps 5"
)
TASKS = {
    "classification": "digits --train.schedule_steps 160 --eval.every_steps 20",
    "generation": "digits-dit --model.hidden_size 16 --train.batch_size 16 --eval.every_steps 80 "
    "--eval.batch_size 60",
    "masked_text": "kjv-mdm --model.hidden_size 16 --train.batch_size 4 --data.length 32 "
    "--train.schedule_steps 160 --eval.every_steps 80",
}
"""Preset and options of each."""
OF_RANK_0 = (
    "in a broadcast",
    "claiming the run directory",
    "before the manifest",
    "after the manifest",
    "before a line of metrics",
    "after a line of metrics",
)
COUNTS = {
    "before a broadcast": 4,
    "in a broadcast": 9,
    "before a file is whole": 2,
    "a part written and not reported": 2,
    "a record posted": 3,
    "before a line of metrics": 2,
    "after a line of metrics": 3,
}
"""How often a moment comes before it is the one, where that is not once."""


@dataclass
class FromOutside:
    """Two ranks are killed at once in one start, at any time after a checkpoint is there."""

    attempt: int
    ranks: list[int]
    step: int
    after_s: float


def plan_of(seed, starts):
    """The faults of each attempt: of 17, every moment once and thrice from outside."""
    draw = random.Random(seed)
    order = [*(moment for moment in MOMENTS if moment != "a step"), None, None, None]
    draw.shuffle(order)
    order = order[:starts]
    plan, from_outside = [], {}
    for attempt, moment in enumerate(order):
        if moment is None:
            two, step = draw.sample(range(3), 2), draw.randrange(7, 50)
            from_outside[attempt] = FromOutside(attempt, two, step, draw.uniform(0, 1))
        else:
            rank = 0 if moment in OF_RANK_0 else draw.randrange(3)
            count = COUNTS.get(moment, 1)
            plan.append(fail_at(rank, moment=moment, count=count, attempt=attempt))
    return plan, from_outside


def kill_from_outside(job, from_outside, run_dir):
    """Does it until the run is over; (the number of kills, the last start that was seen)."""
    kills, todo, start = 0, dict(from_outside), 0
    while job.poll() is None:
        time.sleep(0.05)
        start += bool(job.ranks(start + 1))
        for attempt, blow in [*todo.items()]:
            ranks = job.ranks(attempt)
            if len(ranks) == 3 and max(complete_steps(run_dir), default=0) >= blow.step:
                time.sleep(blow.after_s)
                for rank in blow.ranks:
                    kills += ranks[rank] in job.processes()
                    send(ranks[rank], signal.SIGKILL)
                del todo[attempt]
    return kills, start


def tensorboard_of(run_dir, tag):
    board = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    return [(event.step, event.value) for event in board.Scalars(tag)]


def words_of(task, run_dir):
    config, *options = TASKS[task].split()
    words = ("--config", f"configs/{config}.yaml", *options, *COMMON.split())
    return (*words, "--run_dir", run_dir)


@pytest.mark.timeout(900)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "seed", "starts"),
    [("classification", 0, 17), ("generation", 1, 6), ("masked_text", 2, 6)],
)
def test_a_run_that_loses_ranks_leaves_what_an_untouched_one_leaves(
    machine, tmp_path, task, seed, starts
):
    untouched = tmp_path / "untouched"
    machine.run("dbdist.train", *words_of(task, untouched), ranks=3)
    hashes, _ = result_of(untouched)
    assert len([name for name in hashes if name.endswith(".optimizer.safetensors")]) == 4
    assert complete_steps(untouched)[-1] == LAST

    run_dir = tmp_path / "run"
    plan, from_outside = plan_of(seed, starts)
    assert len(plan) + len(from_outside) == starts
    job = machine.failing(3, plan, *words_of(task, run_dir), restarts=starts, is_new=True)
    seen = kill_from_outside(job, from_outside, run_dir)
    printed = machine.finish(job)
    assert seen == (2 * len(from_outside), starts), printed

    assert result_of(run_dir) == result_of(untouched)
    assert read_metrics(run_dir)[1] == [], "steps that are there twice"
    assert lines_of(run_dir) == lines_of(untouched)
    tag = "train/loss/block0"
    assert tensorboard_of(run_dir, tag) == tensorboard_of(untouched, tag)
