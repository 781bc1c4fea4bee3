"""What runs leave, read back by tests: checkpoints, metrics, evaluations."""

import json
import re

from dbdist.checkpoint.manifest import complete_folders, find_checkpoint

CLOCKS = re.compile(r"time_s|perf/.*|memory/.*")
"""What a record says of time and memory."""


def complete_steps(run_dir):
    return [int(path.name[5:]) for path in complete_folders(run_dir / "checkpoints")]


def lines_of(run_dir):
    """The records of metrics.jsonl, without what a clock or a memory meter says."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not CLOCKS.fullmatch(k)} for line in lines]


def evaluation_of(run_dir):
    """evaluation.json without what depends on the machine."""
    values = json.loads((run_dir / "evaluation.json").read_text())
    return {k: v for k, v in values.items() if k != "samples_per_s"}


def hashes_of(run_dir, step=None):
    """{file: SHA-256} of the weights and optimizer states of a checkpoint."""
    files = find_checkpoint(run_dir, step).manifest["files"].items()
    return {name: file["sha256"] for name, file in files if name.endswith(".safetensors")}


def result_of(run_dir):
    """(the last checkpoint's hashes, the evaluation): what a run is for."""
    return hashes_of(run_dir), evaluation_of(run_dir)


def tensors_of(run_dir, step=None):
    """{file: its tensors by name} of a checkpoint."""
    checkpoint = find_checkpoint(run_dir, step)
    assert checkpoint is not None
    return {name: checkpoint.tensors(name) for name in checkpoint.manifest["files"]}
