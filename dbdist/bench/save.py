"""Measures what saving a checkpoint costs training.

    python -m dbdist.bench.save --config configs/cifar100.yaml

One process trains one block (`--block`; it sends nothing to other ranks) and saves it again and
again, each time after the one before is complete. Images as in `dbdist.bench.step`. Prints a table
and one line of JSON: a step without saving, what `save` takes from the training (the first time it
allocates, too), how long it is until the checkpoint is complete, and a step meanwhile.
"""

import json
import statistics
import sys
import time
from typing import Any

import torch

from dbdist.bench.environment import environment
from dbdist.bench.step import build_trainer, prepared, synchronize
from dbdist.checkpoint.manifest import complete_folders
from dbdist.checkpoint.names import MANIFEST, step_folder
from dbdist.commands.command_line import OneLineParser, guarded
from dbdist.config.config import Config
from dbdist.config.parse import parse_config
from dbdist.data.base import Dataset
from dbdist.errors import UserError
from dbdist.training.state_files import files_of
from dbdist.training.trainer import Trainer

TIMEOUT_S = 600.0


def main(argv: list[str] | None = None) -> None:
    guarded("dbdist.bench.save", lambda: run(sys.argv[1:] if argv is None else argv))


def run(argv: list[str]) -> None:
    parser = OneLineParser(prog="dbdist.bench.save", description=__doc__)
    parser.add_argument("--block", type=int, default=1, help="the block to train (default: 1)")
    parser.add_argument(
        "--saves", type=int, default=5, help="saves, waited for and not (default: 5 each)"
    )
    parser.add_argument("--steps", type=int, default=10, help="steps without (default: 10)")
    parser.add_argument("--warmup", type=int, default=2, help="steps before (default: 2)")
    given, rest = parser.parse_known_args(argv)
    if min(given.steps, given.saves) < 1:
        parser.error("--steps and --saves must be at least 1")
    config = parse_config("dbdist.bench.save", "", rest).validate()
    with prepared(config) as (config, train_set, images):
        result = measure(config, train_set, given.block, given.warmup, given.steps, given.saves)
    for key in ("step_ms", "first_stall_ms", "stall_ms", "write_ms", "step_beside_write_ms"):
        print(f"{key:<22}{result[key]:>10.2f}")
    print(f"{'checkpoint_mb':<22}{result['checkpoint_mb']:>10.2f}")
    facts = environment(config.device, ["python", "-m", "dbdist.bench.save", *argv])
    print(json.dumps({"config": config.data.name, "images": images, **result, **facts}))


def measure(
    config: Config, train_set: Dataset, block: int, warmup: int, steps: int, saves: int
) -> dict[str, Any]:
    """Medians in milliseconds. Half of the saves are waited for, half have steps beside them."""
    trainer = build_trainer(config, train_set, block)
    writer, state = trainer.saving.writer, trainer.state
    about = {"model": trainer.setup.describe()}
    step_ms = [_step_ms(trainer, step) for step in range(warmup + steps)][warmup:]
    stall_ms: list[float] = []
    write_ms: list[float] = []
    beside_ms: list[float] = []
    for step in range(1, 1 + 2 * saves):
        manifest = writer.folder / step_folder(step) / MANIFEST
        start = time.perf_counter()
        writer.save(step, files_of(state), about)
        stall_ms.append(_ms_since(start))
        if step % 2:
            writer.finish(TIMEOUT_S)
            write_ms.append(_ms_since(start))
        while not manifest.exists():
            if _ms_since(start) > 1e3 * TIMEOUT_S:
                raise UserError(f"the checkpoint of step {step} is not complete in {TIMEOUT_S:g} s")
            beside_ms.append(_step_ms(trainer, warmup + steps + len(beside_ms)))
            writer.poll()
    newest = complete_folders(writer.folder)[-1]
    num_bytes = sum(file.stat().st_size for file in newest.iterdir())
    trainer.close()
    return {
        "mode": config.mode,
        "block": block,
        "batch_size": config.train.batch_size,
        "checkpoint_mb": num_bytes / 2**20,
        "step_ms": statistics.median(step_ms),
        "first_stall_ms": stall_ms[0],
        "stall_ms": statistics.median(stall_ms[1:]),
        "write_ms": statistics.median(write_ms),
        "step_beside_write_ms": statistics.median(beside_ms),
        "threads": torch.get_num_threads(),
    }


def _step_ms(trainer: Trainer, step: int) -> float:
    start = time.perf_counter()
    trainer.train_step(step)
    synchronize()
    return _ms_since(start)


def _ms_since(start: float) -> float:
    return 1e3 * (time.perf_counter() - start)


if __name__ == "__main__":
    main()
