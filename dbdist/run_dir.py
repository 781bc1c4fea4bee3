"""The folder of a run: its configuration, whether another may continue it, and its result."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from dbdist.cli import parse_config, write_yaml
from dbdist.config import Config
from dbdist.errors import ConfigError
from dbdist.evaluation import Evaluation

MAY_CHANGE = (
    "run_dir",
    "device",
    "data.root",
    "data.num_workers",
    "sampler",
    "train.max_steps",
    "train.epochs",
    "train.schedule_steps",  # but see last_schedule_step
    "train.log_every",
    "train.activation_checkpointing",
    "parallel.replicas",
    "parallel.coordinator",
    "parallel.timeout_s",
    "checkpoint",
    "eval",
)
"""Keys and sections that do not change what the steps already taken have computed."""


def read_config(run_dir: Path) -> Config | None:
    """The configuration in RUN/config.yaml; None without one. Raises ConfigError for a damaged
    one."""
    path = run_dir / "config.yaml"
    if not path.is_file():
        return None
    try:
        return parse_config("dbdist", "", [], first=["--config", str(path)])
    except ConfigError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None


def claim(config: Config, num_train: int, step: int | None) -> None:
    """Makes the run directory this configuration's.

    num_train: samples in the training set. step: of the checkpoint that will be continued. Raises
    ConfigError, naming the first key that differs, if the directory holds a run of another
    configuration; then nothing is changed.
    """
    run_dir = Path(config.run_dir)
    held = read_config(run_dir)
    if held is not None and (step is not None or (run_dir / "metrics.jsonl").exists()):
        for key, old, new in _differences(dataclasses.asdict(held), dataclasses.asdict(config)):
            raise ConfigError(
                f"{run_dir} holds a run with {key} {old}, not {new}; "
                "give another run_dir or the old value"
            )
        old, new = last_schedule_step(held, num_train), last_schedule_step(config, num_train)
        if old != new:
            raise ConfigError(
                f"{run_dir} holds a run whose learning rate ends at step {old}, not {new}; "
                f"set train.schedule_steps to {old}, or give another run_dir"
            )
    if step is not None and step > config.max_steps(num_train):
        raise ConfigError(
            f"{run_dir} is at step {step} already, beyond the {config.max_steps(num_train)} steps "
            "to train; give another run_dir or more steps"
        )
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_yaml(config, run_dir / "config.yaml")
    except OSError as error:
        raise ConfigError(f"run_dir {run_dir} cannot be written ({error.strerror})") from None


def last_schedule_step(config: Config, num_train: int) -> int | None:
    """Where the cosine ends; None for a constant learning rate."""
    if config.train.schedule == "constant":
        return None
    return config.train.schedule_steps or config.max_steps(num_train)


def write_evaluation(run_dir: Path, evaluation: Evaluation) -> None:
    """RUN/evaluation.json, whole or not at all."""
    partial = run_dir / "evaluation.json.partial"
    try:
        partial.write_text(
            json.dumps(dataclasses.asdict(evaluation), indent=2, allow_nan=False) + "\n"
        )
        os.replace(partial, run_dir / "evaluation.json")
    except OSError as error:
        raise ConfigError(f"run_dir {run_dir} cannot be written ({error.strerror})") from None


def _differences(old: Any, new: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    if key in MAY_CHANGE:
        return []
    if isinstance(old, dict):
        prefix = f"{key}." if key else ""
        return [d for k in old for d in _differences(old[k], new[k], f"{prefix}{k}")]
    return [(key, old, new)] if old != new else []
