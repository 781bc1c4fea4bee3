"""Compares configurations, or one configuration with its controls, over several seeds.

    python -m dbdist.bench.compare A.yaml B.yaml --seeds 0 1 2
    python -m dbdist.bench.compare digits-dit --arms blocks whole shallow --equal-time

Each run has a process group of its own, and trains each layer on as many samples as its
configuration says (steps x batch). Prints a table, and a JSON line for each run.

Arms of a configuration with L layers in B blocks:

    blocks     as it is
    whole      end-to-end, all L layers
    shallow    end-to-end, L / B layers: what one block could do without the others
    single     one block of all L layers, as a denoiser of all levels

With --equal-time every arm beside `blocks` is run once more, with as many steps as fit into the
time that `blocks` took.
"""

import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dbdist.bench.job import torchrun
from dbdist.build import build_setup
from dbdist.commands.command_line import OneLineParser, guarded
from dbdist.config.config import Config
from dbdist.config.parse import parse_config
from dbdist.data.sources import dataset_spec, prepare
from dbdist.errors import ConfigError, UserError
from dbdist.parallel.layout import layout_of

ARMS = ("blocks", "whole", "shallow", "single")
SAME_TIME = 0.03
"""Times that differ by less count as equal."""


@dataclass(frozen=True)
class Arm:
    """A configuration to run, with what is changed in it."""

    config_file: str
    name: str
    options: tuple[str, ...] = ()

    def words(self, overrides: Sequence[str]) -> list[str]:
        return ["--config", self.config_file, *overrides, *self.options]


def main(argv: list[str] | None = None) -> None:
    guarded("dbdist.bench.compare", lambda: run(sys.argv[1:] if argv is None else argv))


def run(argv: list[str]) -> None:
    parser = OneLineParser(prog="dbdist.bench.compare", description=__doc__)
    parser.add_argument("configs", nargs="+", metavar="CONFIG", help="files or presets to compare")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["blocks"])
    parser.add_argument("--equal-time", action="store_true", help="also at equal wall-clock time")
    parser.add_argument("--figures", nargs="+", default=[], help="to show beside the main figure")
    parser.add_argument(
        "--runs", default="runs/compare", help="folder of the runs (default: %(default)s)"
    )
    given, overrides = parser.parse_known_args(argv)
    if given.equal_time and (given.arms[0] != "blocks" or len(given.arms) < 2):
        raise ConfigError("--equal-time needs --arms blocks … first, whose time the others get")
    arms = [arm for file in given.configs for arm in arms_of(file, given.arms, overrides)]
    results: list[dict[str, Any]] = []
    for seed in given.seeds:
        for arm in arms:
            for result in results_of(arm, seed, given, overrides, results):
                print(json.dumps(result), flush=True)
                results.append(result)
    show(results, given.figures)


def arms_of(file: str, names: Sequence[str], overrides: Sequence[str]) -> Iterator[Arm]:
    """The arms of a configuration. Raises ConfigError where blocks are not equally deep."""
    config = parse_config("dbdist.bench.compare", "", ["--config", file, *overrides])
    stem, plain = Path(file).stem, ("--mode", "end_to_end")
    for name in names:
        label = stem if list(names) == ["blocks"] else f"{stem} {name}"
        if name == "blocks":
            yield Arm(file, label)
        elif name == "whole":
            yield Arm(file, label, plain)
        elif name == "single":
            one = ("--model.num_blocks", "1", "--model.layers_per_block", "null")
            yield Arm(file, label, one)
        else:
            depths = {len(layers) for layers in config.layers_of_block}
            if len(depths) > 1:
                raise ConfigError(
                    f"{file} has blocks of {sorted(depths)} layers; arm shallow needs equal ones"
                )
            cut = ("--model.num_blocks", "1", "--model.layers_per_block", "null")
            yield Arm(file, label, (*plain, *cut, "--model.num_layers", str(depths.pop())))


def results_of(
    arm: Arm, seed: int, given: Any, overrides: list[str], before: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """The run of an arm, and with --equal-time the one that takes as long as `blocks`.

    before: results so far.
    """
    runs = Path(given.runs)
    result = train_once(arm, seed, runs, overrides)
    yield result
    if not given.equal_time or arm.name.endswith(" blocks"):
        return
    stem = arm.name.rpartition(" ")[0]
    (budget,) = (r for r in before if r["name"] == f"{stem} blocks" and r["seed"] == seed)
    ratio = budget["train_s"] / result["train_s"]
    if abs(ratio - 1) < SAME_TIME:
        return
    steps = max(1, round(result["steps"] * ratio))
    more = ("--train.max_steps", str(steps))
    scheduled = parse_config("", "", arm.words(overrides)).train.schedule_steps
    if scheduled is not None:
        more += ("--train.schedule_steps", str(max(1, round(scheduled * ratio))))
    longer = Arm(arm.config_file, f"{arm.name}, equal time", (*arm.options, *more))
    yield train_once(longer, seed, runs, overrides)


def train_once(arm: Arm, seed: int, runs: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Trains once from scratch and returns the evaluation with what identifies the run.

    Raises UserError when the run fails.
    """
    words = arm.words(overrides)
    config = parse_config("dbdist.bench.compare", "", words).validate()
    run_dir = runs / f"{arm.name.replace(',', '').replace(' ', '-')}-{seed}"
    world_size = layout_of(config, 1).world_size
    words = ["-m", "dbdist.train", *words, "--seed", str(seed)]
    words += ["--run_dir", str(run_dir), "--checkpoint.resume", "false"]
    command = torchrun(world_size, *words) if world_size > 1 else [sys.executable, *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error:" in line]
        raise UserError(f"{' '.join(command)} failed: {(errors or done.stderr.splitlines())[-1]}")
    evaluation = json.loads((run_dir / "evaluation.json").read_text())
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    main = main_figure(config)
    return {
        "name": arm.name,
        "seed": seed,
        "steps": evaluation["step"],
        "batch_size": config.train.batch_size,
        "main": main,
        "after_block": evaluation.get(f"{main}_after_block") or [],
        "figures": evaluation,
        "time_s": lines[-1]["time_s"],
        "train_s": training_seconds(lines),
    }


def training_seconds(lines: Sequence[dict[str, Any]]) -> float:
    """Seconds of the steps alone, of the block that took longest; no evaluation, no start."""
    seconds: dict[str, float] = {}
    before = 0
    for line in lines:
        for key, value in line.items():
            if key.startswith("perf/step_ms/"):
                seconds[key] = seconds.get(key, 0.0) + value / 1e3 * (line["step"] - before)
        before = line["step"]
    return max(seconds.values())


def main_figure(config: Config) -> str:
    """The name of the figure that the configured task is judged by."""
    prepare(config.data)
    return build_setup(config, dataset_spec(config.data)).task.main.name


def show(results: Sequence[dict[str, Any]], figures: Sequence[str]) -> None:
    """A row for each run, and for each arm its mean with the standard deviation over seeds."""
    main = results[0]["main"]
    columns = [main, *(name for name in figures if name != main)]
    table = Table(title=f"{main} over seeds", title_justify="left")
    for header in ("configuration", "seed", "steps x batch", "after block", *columns, "time"):
        table.add_column(header)
    for r in results:
        after = "  ".join(f"{value:.3f}" for value in r["after_block"])
        steps = f"{r['steps']} x {r['batch_size']}"
        shown = [_shown(r["figures"].get(name)) for name in columns]
        table.add_row(r["name"], str(r["seed"]), steps, after, *shown, f"{r['time_s']:.0f} s")
    for name in dict.fromkeys(r["name"] for r in results):
        own = [r for r in results if r["name"] == name]
        spread = [_mean([r["figures"].get(column) for r in own]) for column in columns]
        seconds = statistics.fmean(r["time_s"] for r in own)
        table.add_row(name, "mean", "", "", *spread, f"{seconds:.0f} s")
    Console(width=None if sys.stdout.isatty() else 140).print(table, highlight=False)


def _shown(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else "-"


def _mean(values: Sequence[Any]) -> str:
    if not values or not all(isinstance(value, int | float) for value in values):
        return "-"
    if len(values) == 1:
        return _shown(values[0])
    return f"{statistics.fmean(values):.4f} ± {statistics.stdev(values):.4f}"


if __name__ == "__main__":
    main()
