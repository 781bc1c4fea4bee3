"""`torchrun … tests/faults.py PLAN OPTION …`: dbdist.train, whose ranks kill themselves at exact
moments.

PLAN is a JSON file, a list with an entry for each attempt of torchrun: the rank that dies, the
moment, and how often that has to come. Without a moment, or beyond the list, none does.
"""

import json
import os
import signal
import sys
from functools import wraps
from pathlib import Path

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from dbdist.checkpoint import snapshot
from dbdist.checkpoint.writer import CheckpointWriter
from dbdist.monitor import record_files
from dbdist.parallel.launch import Launch
from dbdist.parallel.mailbox import Mailbox
from dbdist.run import folder as run_dir
from dbdist.train import main
from dbdist.training import trainer

MOMENTS = {
    # On any rank:
    "meeting the other ranks": (Launch, "_meet", "before"),
    "before a broadcast": (dist, "broadcast", "before"),
    "in a broadcast": (dist, "broadcast", "after"),  # it has begun, and is not waited for yet
    "before a file is whole": (os, "fsync", "before"),  # NAME.partial holds all or nothing of it
    "between the files of a checkpoint": (snapshot.Snapshot, "write", "after"),
    "a part written and not reported": (CheckpointWriter, "_write_part", "after"),
    "a part reported, a record not": (Mailbox, "post", "before"),
    "a record posted": (Mailbox, "post", "after"),
    "in an evaluation": (trainer, "evaluate", "before"),
    # On rank 0:
    "claiming the run directory": (run_dir, "write_yaml", "before"),
    "before the manifest": (CheckpointWriter, "_write_manifest", "before"),
    "after the manifest": (CheckpointWriter, "_write_manifest", "after"),
    "before a line of metrics": (record_files.MetricsFile, "write", "before"),
    "after a line of metrics": (record_files.MetricsFile, "write", "after"),
}


def arm(moment, count):
    """Kills this process when `moment` comes for the count-th time."""
    holder, name, when = MOMENTS[moment]
    function, num_calls = getattr(holder, name), 0

    @wraps(function)
    def counted(*args, **kwargs):
        nonlocal num_calls
        num_calls += 1
        if num_calls == count and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*args, **kwargs)
        if num_calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(holder, name, counted)


if __name__ == "__main__":
    plan = json.loads(Path(sys.argv[1]).read_text())
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    fault = plan[attempt] if attempt < len(plan) else {"moment": None}
    if fault["moment"] is not None and fault["rank"] == int(os.environ["RANK"]):
        arm(fault["moment"], fault["count"])
    record(main)(sys.argv[2:])
