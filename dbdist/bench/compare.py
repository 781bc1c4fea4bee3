"""Compares the accuracy of two or more configurations over several seeds.

    python -m dbdist.bench.compare A.yaml B.yaml --seeds 0 1 2

Each run has a process group of its own, and trains each layer on as many samples as its
configuration says (steps x batch). Prints a table and JSON lines.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dbdist.bench.job import torchrun
from dbdist.commands.command_line import OneLineParser, guarded
from dbdist.config.parse import parse_config
from dbdist.errors import UserError
from dbdist.parallel.layout import layout_of


def main(argv: list[str] | None = None) -> None:
    guarded("dbdist.bench.compare", lambda: run(sys.argv[1:] if argv is None else argv))


def run(argv: list[str]) -> None:
    parser = OneLineParser(prog="dbdist.bench.compare", description=__doc__)
    parser.add_argument("configs", nargs="+", metavar="CONFIG", help="YAML files to compare")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument(
        "--runs", default="runs/compare", help="folder of the runs (default: %(default)s)"
    )
    given, overrides = parser.parse_known_args(argv)
    table = Table(title="Accuracy over seeds", title_justify="left")
    for header in ("configuration", "seed", "steps x batch", "after block", "accuracy", "time"):
        table.add_column(header)
    means: dict[str, list[float]] = {}
    for config in given.configs:
        for seed in given.seeds:
            result = train_once(config, seed, Path(given.runs), overrides)
            print(json.dumps(result), flush=True)
            means.setdefault(result["name"], []).append(result["accuracy"])
            after = "  ".join(f"{a:.3f}" for a in result["accuracy_after_block"])
            samples = f"{result['steps']} x {result['batch_size']}"
            accuracy, seconds = f"{result['accuracy']:.3f}", f"{result['time_s']:.0f} s"
            table.add_row(result["name"], str(seed), samples, after, accuracy, seconds)
    for name, values in means.items():
        table.add_row(name, "mean", "", "", f"{statistics.fmean(values):.4f}", "")
    Console(width=None if sys.stdout.isatty() else 120).print(table, highlight=False)


def train_once(config_file: str, seed: int, runs: Path, overrides: list[str]) -> dict[str, Any]:
    """Trains once from scratch and returns the evaluation with what identifies the run.

    Raises UserError when the run fails.
    """
    name = Path(config_file).stem
    config = parse_config(
        "dbdist.bench.compare", "", ["--config", config_file, *overrides]
    ).validate()
    run_dir = runs / f"{name}-{seed}"
    world_size = layout_of(config, 1).world_size
    words = ["-m", "dbdist.train", "--config", config_file, *overrides, "--seed", str(seed)]
    words += ["--run_dir", str(run_dir), "--checkpoint.resume", "false"]
    command = torchrun(world_size, *words) if world_size > 1 else [sys.executable, *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error:" in line]
        raise UserError(f"{' '.join(command)} failed: {(errors or done.stderr.splitlines())[-1]}")
    evaluation = json.loads((run_dir / "evaluation.json").read_text())
    last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    return {
        "name": name,
        "seed": seed,
        "steps": evaluation["step"],
        "batch_size": config.train.batch_size,
        "accuracy": evaluation["accuracy"],
        "accuracy_after_block": evaluation["accuracy_after_block"],
        "time_s": last["time_s"],
    }


if __name__ == "__main__":
    main()
