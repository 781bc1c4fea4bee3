"""The folder of a run: its configuration, whether another may continue it, and its result."""

import dataclasses
import json
import os
from pathlib import Path

from dbdist.checkpoint import complete_folders, differences, step_of
from dbdist.cli import parse_config, write_yaml
from dbdist.config import Config
from dbdist.errors import CheckpointError, ConfigError
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
    "train.nonfinite",
    "train.max_skipped",
    "train.log_every",
    "train.activation_checkpointing",
    "parallel.replicas",
    "parallel.replica_engine",
    "parallel.deepspeed_config",
    "parallel.coordinator",
    "parallel.blocks",
    "parallel.check_every",
    "parallel.timeout_s",
    "checkpoint",
    "eval",
)
"""Keys and sections that do not change what the steps already taken have computed."""


def read_config(run_dir: Path) -> Config | None:
    """The configuration in RUN/config.yaml; None without one. Raises ConfigError for a damaged
    one."""
    path = run_dir / "config.yaml"
    try:
        if not path.is_file():
            return None
        return parse_config("dbdist", "", [], first=["--config", str(path)])
    except (ConfigError, OSError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None


def check_run_dir(config: Config) -> None:
    """Raises CheckpointError if there is something to continue against `checkpoint.resume`, or a
    ConfigError that names the first key that differs if the run directory holds a run of another
    configuration; nothing is changed, and no data is needed."""
    run_dir = Path(config.run_dir)
    steps = [step_of(path) for path in complete_folders(run_dir / "checkpoints")]
    if config.checkpoint.resume is True and not steps:
        raise CheckpointError(
            f"checkpoint.resume is true, but {run_dir} has no complete checkpoint; "
            "leave it out to start"
        )
    if config.checkpoint.resume is False and steps:
        raise CheckpointError(
            f"checkpoint.resume is false, but {run_dir} holds a checkpoint of "
            f"step {steps[-1]}; give another run_dir"
        )
    held = _held_config(run_dir, bool(steps))
    if held is not None:
        for key, old, new in differences(dataclasses.asdict(held), dataclasses.asdict(config)):
            if not any(f"{key}.".startswith(f"{free}.") for free in MAY_CHANGE):
                raise ConfigError(
                    f"{run_dir} holds a run with {key} {old}, not {new}; "
                    "give another run_dir or the old value"
                )


def claim(config: Config, num_train: int, step: int | None) -> None:
    """Makes the run directory this configuration's, which `check_run_dir` has accepted.

    num_train: samples in the training set. step: of the checkpoint that will be continued. Raises
    ConfigError if the learning rate or the last step do not go with it; then nothing is changed.
    """
    run_dir = Path(config.run_dir)
    held = _held_config(run_dir, step is not None)
    if held is not None:
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


def _held_config(run_dir: Path, has_checkpoint: bool) -> Config | None:
    """The configuration of what was trained here; None where nothing was."""
    held = read_config(run_dir)
    return held if has_checkpoint or (run_dir / "metrics.jsonl").exists() else None


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
