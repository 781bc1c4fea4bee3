"""Measures where the time of one training step goes.

    python -m dbdist.bench.step --config configs/cifar100.yaml

One process trains one block (`--block`; it sends nothing to other ranks) with the configuration's
own loader, and the profiler sums up the step's phases. Without the dataset's files, random images
of the same form take their place, which the result says. Prints a table and one line of JSON.
"""

import dataclasses
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from dbdist.build import build_setup
from dbdist.commands.command_line import OneLineParser, guarded
from dbdist.config.config import Config
from dbdist.config.parse import parse_config
from dbdist.data.base import Dataset
from dbdist.data.images import random_images
from dbdist.data.options import ImageOptions
from dbdist.data.sources import dataset_spec, load_dataset
from dbdist.errors import DataError
from dbdist.monitor.ownership import peak_memory_mb
from dbdist.parallel.layout import Layout
from dbdist.parallel.topology import Topology, choose_device
from dbdist.training.trainer import Trainer

COMPUTE = ("forward", "backward", "optimizer")
PHASES = ("load", "noise", *COMPUTE, "sync")


def main(argv: list[str] | None = None) -> None:
    guarded("dbdist.bench.step", lambda: run(sys.argv[1:] if argv is None else argv))


def run(argv: list[str]) -> None:
    parser = OneLineParser(prog="dbdist.bench.step", description=__doc__)
    parser.add_argument("--block", type=int, default=1, help="the block to train (default: 1)")
    parser.add_argument("--steps", type=int, default=10, help="measured steps (default: 10)")
    parser.add_argument("--warmup", type=int, default=2, help="steps before (default: 2)")
    given, rest = parser.parse_known_args(argv)
    config = parse_config("dbdist.bench.step", "", rest).validate()
    with prepared(config) as (config, train_set, images):
        result = measure(config, train_set, given.block, given.warmup, given.steps)
    for phase in PHASES:
        share = result["share"][phase]
        print(f"{phase:<10}{result['ms'][phase]:>10.2f} ms {share:>7.1%}")
    print(
        f"{'step':<10}{result['step_ms']:>10.2f} ms, of which compute {result['compute_share']:.1%}"
    )
    print(json.dumps({"config": config.data.name, "images": images, **result}))


def measure(
    config: Config, train_set: Dataset, block: int, warmup: int, steps: int
) -> dict[str, Any]:
    """Means over steps of each phase's milliseconds and share of the step."""
    trainer = build_trainer(config, train_set, block)
    for step in range(warmup):
        trainer.train_step(step)
        synchronize()
    walls: list[float] = []
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for step in range(warmup, warmup + steps):
            start = time.perf_counter()
            trainer.train_step(step)
            synchronize()
            walls.append(1e3 * (time.perf_counter() - start))
    peak = peak_memory_mb(trainer.topology.device)
    trainer.close()
    totals = dict.fromkeys(PHASES, 0.0)
    for event in profiler.key_averages():
        name = event.key.removeprefix("dbdist::")
        if event.key.startswith("dbdist::"):
            totals[name] += event.cpu_time_total / 1e3 / steps
    wall = statistics.fmean(walls)
    return {
        "mode": config.mode,
        "block": block,
        "batch_size": config.train.batch_size,
        "step_ms": wall,
        "ms": totals,
        "share": {phase: ms / wall for phase, ms in totals.items()},
        "compute_share": sum(totals[phase] for phase in COMPUTE) / wall,
        "samples_per_s": config.train.batch_size / wall * 1e3,
        "peak_mb": peak,
        "num_workers": config.data.num_workers,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "torch": torch.__version__,
    }


@contextmanager
def prepared(config: Config) -> Iterator[tuple[Config, Dataset, str]]:
    """(the configuration with a run_dir that goes away, images to train on, whose they are)."""
    with tempfile.TemporaryDirectory() as folder:
        config = dataclasses.replace(config, run_dir=f"{folder}/run")
        try:
            train_set, images = load_dataset(config.data, "train"), "the dataset's"
        except DataError:
            if not isinstance(config.data, ImageOptions) or config.data.name == "image_folder":
                raise
            spec = dataset_spec(config.data)
            train_set, images = random_images(spec, 2048, config.data.augment), "random"
        yield config, train_set, images


def build_trainer(config: Config, train_set: Dataset, block: int) -> Trainer:
    """The trainer of one block, in a world of its own."""
    if config.mode == "block_parallel":
        config = dataclasses.replace(
            config, parallel=dataclasses.replace(config.parallel, sync="never")
        )
    device = choose_device(config.device, local_rank=0)
    blocks = [0] if config.mode == "end_to_end" else [block]
    setup = build_setup(config, train_set.spec)
    trainer = Trainer(
        setup, Topology(Layout(1), device=device), train_set, train_set, blocks=blocks
    )
    trainer.state.set_training(True)
    return trainer


def synchronize() -> None:
    """Waits for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
