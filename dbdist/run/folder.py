"""The folder of a run: its configuration, whether another may continue it, and its result."""

import dataclasses
import hashlib
import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dbdist.checkpoint.manifest import saved_folders
from dbdist.checkpoint.names import blocks_in, step_folder, step_folders, step_of
from dbdist.checkpoint.parts import differences
from dbdist.config.config import Config
from dbdist.config.parse import config_of_folder, parse_config
from dbdist.config.yaml_files import read_yaml, write_yaml
from dbdist.errors import CheckpointError, ConfigError
from dbdist.monitor.record_files import metrics_file
from dbdist.whole_files import locked, write_whole

MAY_CHANGE = (
    "run_dir",
    "device",
    "data.root",
    "data.num_workers",
    "data.on_error",
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
    """Returns the configuration in RUN/config.yaml; None without one.

    Raises ConfigError for a damaged one.
    """
    path = run_dir / "config.yaml"
    with _naming(path):
        if not _is_whole(path):
            return None
        return parse_config("dbdist", "", [], first=["--config", str(path)])


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except (ConfigError, OSError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None


def _is_whole(path: Path) -> bool:
    """Whether there is such a file. Raises ConfigError for one that has lost its end."""
    if not path.is_file():
        return False
    if "run_dir" not in read_yaml(path):
        raise ConfigError("it is incomplete, run_dir is missing")
    return True


def check_run_dir(config: Config) -> None:
    """Raises an error if this configuration may not continue what the run directory holds.

    It is a CheckpointError if there is something to continue against `checkpoint.resume`, a
    ConfigError that names the first key that differs if the run is one of another configuration.
    Nothing is changed, and no data is needed.
    """
    run_dir, blocks = Path(config.run_dir), config.trained_blocks
    steps = [step_of(path) for path in saved_folders(run_dir / "checkpoints", blocks)]
    if config.checkpoint.resume is True and not steps:
        raise CheckpointError(
            f"checkpoint.resume is true, but {run_dir} has no complete checkpoint"
            f"{'' if blocks is None else f' of blocks {list(blocks)}'}; "
            "leave it out to start"
        )
    if config.checkpoint.resume is False and steps:
        raise CheckpointError(
            f"checkpoint.resume is false, but {run_dir} holds a checkpoint of "
            f"step {steps[-1]}; give another run_dir"
        )
    if (held := _held_config(run_dir, bool(steps))) is not None:
        _check_same(held, config)


def claim(config: Config, num_train: int, step: int | None) -> None:
    """Makes the run directory this configuration's, which `check_run_dir` has accepted.

    First it makes sure that checkpoints can be written there.

    num_train: samples in the training set. step: of the checkpoint that will be continued. Raises
    ConfigError if the learning rate or the last step do not go with it; then nothing is changed.
    """
    run_dir = Path(config.run_dir)
    _check_steps(config, num_train, step)
    try:
        _probe(run_dir / "checkpoints")
    except OSError as error:
        raise ConfigError(
            f"run_dir {run_dir} cannot be written: {run_dir / 'checkpoints'} ({error.strerror})"
        ) from None
    try:
        with locked(run_dir):  # runs of single blocks may come at the same time
            if config.trained_blocks is not None:
                if (held := _held_config(run_dir, step is not None)) is not None:
                    _check_same(held, config)
                    _check_steps(config, num_train, step)
                (run_dir / metrics_file(config.trained_blocks)).touch()
            held = dataclasses.replace(
                config,  # but for what concerns this start alone
                parallel=dataclasses.replace(config.parallel, blocks=None),
                checkpoint=dataclasses.replace(config.checkpoint, fallback=False),
            )
            write_yaml(held, run_dir / "config.yaml")
    except OSError as error:
        raise ConfigError(f"run_dir {run_dir} cannot be written ({error.strerror})") from None


def evaluation_file(config: Config, step: int, other_test_set: str | None = None) -> str:
    """The file in RUN for an evaluation with these settings.

    other_test_set: digest of the test set, if the run was trained beside another one.

    evaluation.json holds what training itself would write: the newest checkpoint with the run's
    own settings. Everything else gets a file named by the step and by the settings.
    """
    run_dir, name = Path(config.run_dir), "evaluation"
    own = read_config(run_dir)
    settings = [_settings_of_evaluation(c) for c in (config, own) if c is not None]
    if other_test_set is not None:
        settings.insert(0, {**settings[0], "test_set": other_test_set})
    saved = [step_of(path) for path in saved_folders(run_dir / "checkpoints")]
    if step not in saved[-1:]:
        name += f"-{step_folder(step)}"
    if settings[0] != settings[-1]:
        text = json.dumps(settings[0], sort_keys=True, default=str)
        name += f"-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return f"{name}.json"


def _settings_of_evaluation(config: Config) -> dict[str, Any]:
    """What an evaluation depends on, beside the checkpoint and the test set."""
    batches = {key: getattr(config.eval, key) for key in ("batch_size", "drop_last")}
    sampler, precision = dataclasses.asdict(config.sampler), config.train.precision
    return {"sampler": sampler, "precision": precision, "seed": config.seed, **batches}


def place_of(run_dir: Path) -> tuple[int, int] | None:
    """What tells this folder from another of the same name; None without the folder of a run."""
    try:
        found = run_dir.stat()
        return (found.st_dev, found.st_ino) if (run_dir / "config.yaml").is_file() else None
    except OSError:
        return None


def _probe(folder: Path) -> None:
    """Writes and removes a file where checkpoints go; raises OSError where that is not possible."""
    probe, is_new = folder / f".probe.{uuid.uuid4().hex}", not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        write_whole(probe, b"can it be written?")
    finally:
        with suppress(OSError):
            probe.unlink()
            if is_new:
                folder.rmdir()


def _check_same(held: Config, config: Config) -> None:
    """Raises ConfigError naming the first key whose other value would make it another run."""
    for key, old, new in differences(dataclasses.asdict(held), dataclasses.asdict(config)):
        if not any(f"{key}.".startswith(f"{free}.") for free in MAY_CHANGE):
            raise ConfigError(
                f"{config.run_dir} holds a run with {key} {old}, not {new}; to start another run, "
                f"give another run_dir (--run_dir {config.run_dir.rstrip('/')}-2); to continue "
                f"this one, give --{key} {old}"
            )


def _check_steps(config: Config, num_train: int, step: int | None) -> None:
    """Raises ConfigError if the learning rate or the last step do not go with what is there."""
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


def _held_config(run_dir: Path, has_checkpoint: bool) -> Config | None:
    """The configuration of what was trained here; None where nothing was."""
    held = read_config(run_dir)
    has_parts = any(map(blocks_in, step_folders(run_dir / "checkpoints")))
    joint = run_dir / metrics_file(None)
    has_metrics = any(
        path != joint or path.stat().st_size > 0 for path in run_dir.glob("metrics*.jsonl")
    )
    return held if has_checkpoint or has_parts or has_metrics else None


def last_schedule_step(config: Config, num_train: int) -> int | None:
    """Where the cosine ends; None for a constant learning rate."""
    if config.train.schedule == "constant":
        return None
    return config.train.schedule_steps or config.max_steps(num_train)


def config_file_of(run_dir: Path) -> Path:
    """RUN/config.yaml. Raises ConfigError where there is no run."""
    if read_config(run_dir) is None:
        beside = Path(Config().run_dir).parent / run_dir
        meant = f"did you mean {beside}?" if (beside / "config.yaml").is_file() else ""
        raise ConfigError(
            f"{run_dir} holds no run (config.yaml is missing); "
            f"{meant or 'give the folder of a trained one'}"
        )
    return run_dir / "config.yaml"


def config_of_run(prog: str, description: str, argv: list[str]) -> Config:
    """RUN/config.yaml with the command line's changes. Raises ConfigError where there is no run."""
    own = config_of_folder(argv)
    if not own:  # --help, the usual folder, or none
        run_dir = parse_config(prog, description, argv).run_dir
        own = ["--config", str(config_file_of(Path(run_dir)))]
        argv = [*argv, "--run_dir", run_dir]
    path = Path(own[1])
    with _naming(path):
        _is_whole(path)
    try:
        return parse_config(prog, description, argv, own).validate()
    except ConfigError:
        read_config(path.parent)  # if it is the file's mistake, this says so
        raise
