"""Measures where the time of one training step goes.

    python -m dbdist.bench.step --config configs/cifar100.yaml

One process trains one block (`--block`; it sends nothing to other ranks) with the configuration's
own loader. A step's matrix products are counted, and whole steps are timed; then, in further steps,
their phases, each of which waits for the GPU. Without the dataset's files, random samples of the
same form take their place, which the result says. Prints a table and one line of JSON for each
`--variant`.
"""

import dataclasses
import json
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from dbdist.bench.environment import environment
from dbdist.build import build_setup
from dbdist.commands.command_line import OneLineParser, guarded
from dbdist.config import registry
from dbdist.config.config import Config
from dbdist.config.parse import parse_config
from dbdist.data.base import Dataset
from dbdist.data.sources import load_dataset
from dbdist.errors import DataError
from dbdist.monitor.ownership import peak_memory_mb
from dbdist.parallel.layout import Layout
from dbdist.parallel.topology import Topology, choose_device
from dbdist.training.trainer import Trainer

COMPUTE = ("forward", "backward", "optimizer")
PHASES = ("load", "noise", *COMPUTE, "sync")
PEAK_TFLOPS = {
    "H200": {"fp32": 66.9, "bf16": 989.4},
    "H100": {"fp32": 66.9, "bf16": 989.4},
    "A100": {"fp32": 19.5, "bf16": 312.0},
}
"""Dense matrix products, by the card's maker; fp32 without TF32."""
MOST_PHASE_STEPS = 10
"""Steps whose phases are timed, after those that are timed whole."""


class PhaseTrainer(Trainer):
    """A trainer that can time its phases; each then waits until the device is done."""

    phase_ms: dict[str, float] | None = None
    """Milliseconds of each phase so far; None: they are not timed."""

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        with super()._phase(name):
            start = time.perf_counter()
            yield
            if self.phase_ms is not None:
                synchronize()
                self.phase_ms[name] += 1e3 * (time.perf_counter() - start)


def main(argv: list[str] | None = None) -> None:
    guarded("dbdist.bench.step", lambda: run(sys.argv[1:] if argv is None else argv))


def run(argv: list[str]) -> None:
    parser = OneLineParser(prog="dbdist.bench.step", description=__doc__)
    parser.add_argument("--block", type=int, default=1, help="the block to train (default: 1)")
    parser.add_argument("--steps", type=int, default=10, help="measured steps (default: 10)")
    parser.add_argument("--warmup", type=int, default=10, help="steps before (default: 10)")
    parser.add_argument(
        "--variant",
        action="append",
        help="further options, such as '--train.precision bf16'; each is measured in turn",
    )
    parser.add_argument("--out", type=Path, help="a file to add the lines of JSON to")
    given, rest = parser.parse_known_args(argv)
    if given.steps < 1:
        parser.error("--steps must be at least 1")
    for variant in given.variant or [""]:
        words = [*rest, *shlex.split(variant)]
        config = parse_config("dbdist.bench.step", "", words).validate()
        with prepared(config) as (config, train_set, images):
            result = measure(config, train_set, given.block, given.warmup, given.steps)
        command = ["python", "-m", "dbdist.bench.step", *words]
        command += ["--steps", str(given.steps), "--warmup", str(given.warmup)]
        facts = environment(config.device, command)
        line = json.dumps({"config": config.data.name, "images": images, **result, **facts})
        show(result, variant)
        print(line, flush=True)
        if given.out is not None:
            with given.out.open("a") as file:
                file.write(line + "\n")


def show(result: dict[str, Any], variant: str) -> None:
    """The result as a table."""
    if variant:
        print(variant)
    for phase in PHASES:
        print(f"{phase:<10}{result['ms'][phase]:>10.2f} ms {result['share'][phase]:>7.1%}")
    p10, median, p90 = (result[key] for key in ("step_ms_p10", "step_ms", "step_ms_p90"))
    print(f"{'step':<10}{median:>10.2f} ms (p10 {p10:.2f}, p90 {p90:.2f}), ", end="")
    print(f"of its phases compute {result['compute_share']:.1%}")
    share = result["share_of_peak"]
    print(
        f"{result['tflops']:.3g} TFLOP/s" + (f", {share:.1%} of the card's peak" if share else "")
    )


def measure(
    config: Config, train_set: Dataset, block: int, warmup: int, steps: int
) -> dict[str, Any]:
    """The median step in milliseconds, then the mean of each phase and its share of their sum."""
    trainer = build_trainer(config, train_set, block)
    device = trainer.topology.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    phase_steps = min(steps, MOST_PHASE_STEPS)
    try:
        for step in range(warmup):
            trainer.train_step(step)
        with FlopCounterMode(display=False) as counter:
            trainer.train_step(warmup)
        warmup += 1
        walls = timed_steps(trainer, range(warmup, warmup + steps))
        peak = peak_memory_mb(device)
        trainer.phase_ms = dict.fromkeys(PHASES, 0.0)
        timed_steps(trainer, range(warmup + steps, warmup + steps + phase_steps))
    finally:
        trainer.close()
    ms = {phase: total / phase_steps for phase, total in trainer.phase_ms.items()}
    whole, median = sum(ms.values()), statistics.median(walls)
    return {
        "mode": config.mode,
        "block": block,
        "batch_size": config.train.batch_size,
        "precision": config.train.precision,
        "steps": steps,
        "warmup": warmup,
        "step_ms": median,
        "step_ms_p10": percentile(walls, 0.1),
        "step_ms_p90": percentile(walls, 0.9),
        "ms": ms,
        "share": {phase: value / whole for phase, value in ms.items()},
        "compute_share": sum(ms[phase] for phase in COMPUTE) / whole,
        "samples_per_s": config.train.batch_size / median * 1e3,
        "tflops": counter.get_total_flops() / median / 1e9,
        "share_of_peak": share_of_peak(
            device, config.train.precision, counter.get_total_flops() / median * 1e3
        ),
        "peak_mb": peak,
        "num_workers": config.data.num_workers,
        "threads": torch.get_num_threads(),
    }


def share_of_peak(device: torch.device, precision: str, flops_per_s: float) -> float | None:
    """Of what the card's tensor cores (bf16) or its other cores (fp32) can do; None if unknown."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    known = (peaks for card, peaks in PEAK_TFLOPS.items() if card in name)
    return next((flops_per_s / (1e12 * peaks[precision]) for peaks in known), None)


def timed_steps(trainer: Trainer, steps: range) -> list[float]:
    """Trains these steps; the milliseconds of each, until the device is done with it."""
    walls: list[float] = []
    synchronize()
    for step in steps:
        start = time.perf_counter()
        trainer.train_step(step)
        synchronize()
        walls.append(1e3 * (time.perf_counter() - start))
    return walls


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which this share of the values lies."""
    return torch.tensor(values, dtype=torch.float64).quantile(share).item()


@contextmanager
def prepared(config: Config) -> Iterator[tuple[Config, Dataset, str]]:
    """(the configuration with a run_dir that goes away, samples to train on, whose they are)."""
    with tempfile.TemporaryDirectory() as folder:
        config = dataclasses.replace(config, run_dir=f"{folder}/run")
        try:
            train_set, images = load_dataset(config.data, "train"), "the dataset's"
        except DataError:
            code = registry.find("data", config.data.name).load()
            if not hasattr(code, "random_samples"):
                raise
            train_set, images = code.random_samples(config.data, 2048), "random"
        yield config, train_set, images


def build_trainer(config: Config, train_set: Dataset, block: int) -> PhaseTrainer:
    """The trainer of one block, in a world of its own."""
    if config.mode == "block_parallel":
        config = dataclasses.replace(
            config, parallel=dataclasses.replace(config.parallel, sync="never")
        )
    device = choose_device(config.device, local_rank=0)
    blocks = [0] if config.mode == "end_to_end" else [block]
    setup = build_setup(config, train_set.spec)
    trainer = PhaseTrainer(
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
