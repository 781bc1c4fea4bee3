"""Trains with ranks that fail at exact moments.

    python -m dbdist.bench.faults PLAN OPTION…

PLAN is a JSON file with a list of faults; the options are dbdist.train's. To write a plan:

    plan = [fail_at(rank=1, step=3), fail_at(rank=0, moment="before the manifest", attempt=1)]
    write_plan(path, plan)
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from dbdist.bench.job import SIGNALS, Kind
from dbdist.checkpoint import snapshot, writer
from dbdist.checkpoint.writer import CheckpointWriter
from dbdist.monitor import record_files
from dbdist.parallel.launch import Launch
from dbdist.parallel.mailbox import Mailbox
from dbdist.run import folder as run_folder
from dbdist.train import main
from dbdist.training import trainer

MOMENTS: dict[str, tuple[Any, str, str]] = {
    "a step": (trainer.Trainer, "train_step", "before"),
    # On any rank:
    "meeting the other ranks": (Launch, "_meet", "before"),
    "before a broadcast": (dist, "broadcast", "before"),
    "in a broadcast": (dist, "broadcast", "after"),  # it has begun, and is not waited for yet
    "before a file is whole": (os, "fsync", "before"),  # NAME.partial holds all or nothing of it
    "between the files of a checkpoint": (snapshot.Snapshot, "write", "after"),
    "a part written and not reported": (CheckpointWriter, "_write", "after"),
    "a part reported, a record not": (Mailbox, "post", "before"),
    "a record posted": (Mailbox, "post", "after"),
    "in an evaluation": (trainer, "evaluate", "before"),
    # On rank 0:
    "claiming the run directory": (run_folder, "write_yaml", "before"),
    "before the manifest": (writer, "write_manifest", "before"),
    "after the manifest": (writer, "write_manifest", "after"),
    "before a line of metrics": (record_files.MetricsFile, "write", "before"),
    "after a line of metrics": (record_files.MetricsFile, "write", "after"),
}
"""Of each moment, the function (its owner and name) that a rank is about to call, or has called."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One rank is killed or stopped at a moment of one of the launcher's starts."""

    rank: int
    moment: str
    count: int
    """How often the moment comes before it is the one."""
    step: int | None
    """In place of `count`: the step, from 1."""
    attempt: int
    """Restarts of the launcher before it."""
    kind: Kind
    after: list[str]
    """Files that are there first: the rank waits for them."""


def fail_at(
    rank: int,
    step: int | None = None,
    *,
    moment: str = "a step",
    count: int = 1,
    attempt: int = 0,
    kind: Kind = "kill",
    after: Iterable[Path] = (),
) -> Fault:
    """A fault of this rank before a step, or when a moment has come `count` times."""
    assert moment in MOMENTS, moment
    assert (step is not None) == (moment == "a step"), "step belongs to the moment `a step`"
    return Fault(
        rank=rank,
        moment=moment,
        count=count,
        step=step,
        attempt=attempt,
        kind=kind,
        after=[str(path) for path in after],
    )


def write_plan(path: Path, plan: Sequence[Fault]) -> None:
    """Writes the file that the command reads."""
    path.write_text(json.dumps([asdict(fault) for fault in plan]))


def arm(fault: Fault) -> None:
    """Makes this process fail when the moment comes."""
    owner, name, when = MOMENTS[fault.moment]
    function: Callable[..., Any] = getattr(owner, name)
    num_calls = 0

    def strike() -> None:
        while not all(Path(path).exists() for path in fault.after):
            time.sleep(0.02)
        os.kill(os.getpid(), SIGNALS[fault.kind])

    @wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        is_due = num_calls == fault.count if fault.step is None else args[-1] == fault.step - 1
        if is_due and when == "before":
            strike()
        result = function(*args, **kwargs)
        if is_due and when == "after":
            strike()
        return result

    setattr(owner, name, counted)


if __name__ == "__main__":
    launch = Launch.from_environment()
    for values in json.loads(Path(sys.argv[1]).read_text()):
        if (values["attempt"], values["rank"]) == (launch.attempt, launch.rank):
            arm(Fault(**values))
    record(main)(sys.argv[2:])
