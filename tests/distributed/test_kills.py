"""One run that loses a rank twenty times, at random and at the worst moments: nothing of it shows
in what it leaves."""

import json
import random
import re
import signal
import time
from pathlib import Path

import pytest
from faults import MOMENTS
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dbdist.bench.processes import marked
from dbdist.bench.soak import Launcher, read_metrics, send
from dbdist.checkpoint.manifest import find_checkpoint

ROOT = Path(__file__).resolve().parents[2]
LAST = 160
WORDS = (
    f"--config {ROOT}/configs/digits.yaml --model.num_layers 3 --train.max_steps {LAST} "
    "--train.schedule_steps 160 --train.warmup_steps 5 --train.log_every 3 "
    "--checkpoint.every_steps 7 --eval.every_steps 20"
).split()
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
CLOCKS = re.compile(r"time_s|perf/.*|memory/.*")
"""What a record says of time and memory; all else is compared."""


SHORT = ("before a file is whole", "in a broadcast", "after the manifest", "a record posted")


def plan_of(seed, is_short):
    """What happens in each attempt: every moment once, and thrice two ranks are killed at once,
    from outside and at any time; short: four moments, and once two ranks."""
    draw = random.Random(seed)
    plan = [
        {
            "moment": moment,
            "rank": 0 if moment in OF_RANK_0 else draw.randrange(3),
            "count": COUNTS.get(moment, 1),
        }
        for moment in (SHORT if is_short else MOMENTS)
    ]
    for after_s in (draw.uniform(0, 4), draw.uniform(2, 6), draw.uniform(4, 9))[is_short * 2 :]:
        plan.append({"moment": None, "ranks": draw.sample(range(3), 2), "after_s": after_s})
    draw.shuffle(plan)
    return plan


def kill_from_outside(launcher, plan):
    """Does what the plan leaves to us, until the run is over; (kills, number of the last
    attempt)."""
    kills, attempt = 0, -1
    while launcher.process.poll() is None:
        time.sleep(0.05)
        found = marked(launcher.mark)
        ranks = {pid: found[pid] for pid in launcher.ranks().values() if pid in found}
        attempts = {variables.get("TORCHELASTIC_RESTART_COUNT") for variables in ranks.values()}
        if len(ranks) < 3 or len(attempts) > 1 or attempts & {None, str(attempt)}:
            continue  # some have just ended, or are just beginning, or we have been here
        attempt = int(attempts.pop())
        if attempt < len(plan) and plan[attempt]["moment"] is None:
            time.sleep(plan[attempt]["after_s"])
            victims = [p for p, v in ranks.items() if int(v["RANK"]) in plan[attempt]["ranks"]]
            kills += len(marked(launcher.mark).keys() & victims)
            for pid in victims:
                send(pid, signal.SIGKILL)
    return kills, attempt


def metrics_of(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not CLOCKS.fullmatch(k)} for line in lines]


def result_of(run_dir):
    """The hashes of the last checkpoint's weights and optimizer states, and the evaluation."""
    checkpoint = find_checkpoint(run_dir)
    assert checkpoint.step == LAST
    hashes = {name: file["sha256"] for name, file in checkpoint.manifest["files"].items()}
    assert len([name for name in hashes if name.endswith(".optimizer.safetensors")]) == 4
    evaluation = json.loads((run_dir / "evaluation.json").read_text())
    del evaluation["samples_per_s"]
    return hashes, evaluation


def tensorboard_of(run_dir, tag):
    board = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return [(event.step, event.value) for event in board.Scalars(tag)]


@pytest.fixture(scope="module")
def untouched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("untouched")
    words = ["-m", "dbdist.train", *WORDS, "--run_dir", str(folder / "run")]
    launcher = Launcher(3, words, folder / "log", max_restarts=0)
    try:
        assert launcher.process.wait(200) == 0, launcher.log.read_text()[-4000:]
    finally:
        launcher.end()
    return folder / "run"


@pytest.mark.timeout(900)
@pytest.mark.parametrize("num_kills", [6, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_that_loses_ranks_leaves_what_an_untouched_one_leaves(untouched, tmp_path, num_kills):
    plan, run_dir = plan_of(seed=0, is_short=num_kills == 6), tmp_path / "run"
    from_outside = sum(len(fault.get("ranks", ())) for fault in plan)
    assert sum(fault["moment"] is not None for fault in plan) + from_outside == num_kills
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    words = [f"{ROOT}/tests/faults.py", f"{tmp_path}/plan.json", *WORDS, "--run_dir", str(run_dir)]
    launcher = Launcher(3, words, tmp_path / "log", max_restarts=len(plan))
    try:
        kills, last_attempt = kill_from_outside(launcher, plan)
    finally:
        left = launcher.end(0.0 if launcher.process.poll() is None else 5.0)
    assert launcher.process.returncode == 0, launcher.log.read_text()[-4000:]
    assert left == 0
    assert (kills, last_attempt) == (from_outside, len(plan)), launcher.log.read_text()[-4000:]

    assert result_of(run_dir) == result_of(untouched)
    assert read_metrics(run_dir)[1] == [], "steps that are there twice"
    assert metrics_of(run_dir) == metrics_of(untouched)
    tag = "train/loss/block0"
    assert tensorboard_of(run_dir, tag) == tensorboard_of(untouched, tag)
