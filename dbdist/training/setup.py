"""Sets a run up on this rank, step by step in agreement with the others, and trains it."""

import time
from collections.abc import Callable, Collection
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from dbdist import log
from dbdist.build import Setup, build_setup
from dbdist.checkpoint.choose import Candidates, Choice, set_aside
from dbdist.checkpoint.manifest import Checkpoint, find_checkpoint, newest_steps
from dbdist.checkpoint.names import SHARED, block_file, step_folders, step_of
from dbdist.checkpoint.parts import alone_in
from dbdist.checkpoint.same_data import (
    check_meaning,
    check_training_samples,
    data_entry,
    other_test_samples,
    stored_data,
)
from dbdist.config.config import Config
from dbdist.data.base import Dataset
from dbdist.data.found import describe_found, identity_of
from dbdist.data.sources import dataset_spec, load_dataset, prepare
from dbdist.errors import CheckpointError, ConfigError
from dbdist.monitor.levels import Levels, levels_of
from dbdist.monitor.monitor import Monitor
from dbdist.monitor.ownership import peak_memory_mb
from dbdist.parallel.engines.engine import check_engine
from dbdist.parallel.launch import Launch
from dbdist.parallel.session import hearing_signals
from dbdist.parallel.topology import Topology
from dbdist.run.folder import check_run_dir, claim
from dbdist.run.lock import sole_trainer
from dbdist.sampling.evaluation import Evaluation, check_figures, write_evaluation
from dbdist.training.rank_state import own_blocks
from dbdist.training.state_files import files_to_restore
from dbdist.training.trainer import Trainer

GRACE_S = 20.0
"""Launchers kill a rank 30 s after its SIGTERM."""


@dataclass(frozen=True)
class Run:
    """A run that is being set up: its folder, where it continues, and its data."""

    setup: Setup
    topology: Topology
    choice: Choice | None
    """The checkpoint to continue; None to start."""
    train_set: Dataset
    test_set: Dataset

    @property
    def config(self) -> Config:
        return self.setup.config

    @property
    def levels(self) -> Levels | None:
        """The noise levels of the blocks, where there are any."""
        return levels_of(self.setup.process.partition)

    @property
    def checkpoint(self) -> Checkpoint | None:
        return self.choice and self.choice.checkpoint

    @property
    def start_step(self) -> int:
        return self.checkpoint.step if self.checkpoint else 0

    @property
    def damaged(self) -> Collection[Path]:
        """Folders of newer checkpoints, which do not count."""
        return self.choice.damaged if self.choice else ()


def train(
    config: Config, topology: Topology, tell: Callable[[str], None] | None = None
) -> Evaluation | None:
    """Sets a run up on this rank and trains it. Collective.

    Returns None if it was asked to stop, or has only some blocks of the model. tell: shows a line,
    from any thread; None: signals are not heard.
    """
    start = time.perf_counter()
    grace_s = GRACE_S if config.has_copies else 0.0
    with hearing_signals(topology, tell, grace_s), ExitStack() as held:
        with topology.agree("opening the run directory"):  # first: it takes no time
            check_run_dir(config)
        with topology.agree("reading the dataset's folder"):
            setup = build_setup(config, dataset_spec(config.data))
        choice = find_start(setup, topology)
        run = Run(setup, topology, choice, *load_data(setup, topology))
        compare_data(run)
        take_folder(run, held)
        monitor = open_monitor(run, held)
        trainer = build_trainer(run, monitor)
        return fit_and_report(run, trainer, monitor, start)


def find_start(setup: Setup, topology: Topology) -> Choice | None:
    """Looks where to continue; nothing is changed. Collective."""
    config = setup.config
    return Candidates(
        Path(config.run_dir),
        topology,
        setup.describe(),
        partial(needed_files, config, topology),
        fallback=config.checkpoint.fallback,
        is_training=True,
        blocks=config.trained_blocks,
    ).newest()


def load_data(setup: Setup, topology: Topology) -> tuple[Dataset, Dataset]:
    """The training set and the test set, the same on all ranks. Collective."""
    config = setup.config
    with topology.agree():
        if topology.local_rank == 0:
            prepare(config.data)
    with topology.agree("loading the data"):
        train_set, test_set = load_dataset(config.data, "train"), load_dataset(config.data, "test")
    with topology.agree("comparing the data"):
        data = {"the training set": train_set.digest(), "the test set": test_set.digest()}
        topology.check_agreement(data)
    with topology.agree("preparing the figures"):
        if topology.local_rank == 0 and config.is_joint:
            setup.task.prepare({"train": train_set, "test": test_set}.__getitem__)
    if config.is_joint:
        check_figures(setup.task, config.num_blocks, topology)
    return train_set, test_set


def compare_data(run: Run) -> None:
    """Refuses to go on with other data than what was trained so far. Collective."""
    with run.topology.agree():
        run_dir = Path(run.config.run_dir)
        data = run.checkpoint.manifest.get("data", {}) if run.checkpoint else stored_data(run_dir)
        if data is None:
            return
        now = data_entry(identity_of(run.train_set, run.test_set))
        check_meaning(run_dir, data, now)
        check_training_samples(run_dir, data, now)
        warning = other_test_samples(run_dir, data, now)
        if warning is not None and run.topology.is_coordinator:
            log.warning(warning)


def take_folder(run: Run, held: ExitStack) -> None:
    """Makes the run directory this run's. held: keeps this rank's blocks its own. Collective."""
    config, topology, run_dir = run.config, run.topology, Path(run.config.run_dir)
    num_train = len(run.train_set)
    with topology.agree():  # what can be refused is refused before anything is written
        check_engine(config.parallel.replica_engine, topology)
    with topology.agree("taking the run directory"):
        blocks = own_blocks(config, topology) if topology.replica == 0 else []
        held.enter_context(sole_trainer(run_dir, blocks, config.parallel.timeout_s / 2))
    with topology.agree():
        if topology.is_coordinator:
            check_not_ahead(config, run.checkpoint, run.damaged)
            claim(config, num_train, run.checkpoint and run.checkpoint.step)
            set_aside(run.damaged, config.trained_blocks)
    last, warmup = config.max_steps(num_train), config.train.warmup_steps
    if topology.is_coordinator and warmup >= last:
        log.warning(
            f"train.warmup_steps is {warmup}, the last step is {last}: the learning rate never "
            "comes to train.lr"
        )


def build_trainer(run: Run, monitor: Monitor | None) -> Trainer:
    """What this rank trains, with the checkpoint's weights; shows who owns what. Collective."""
    config, topology, checkpoint = run.config, run.topology, run.checkpoint
    with topology.agree("building the model"):
        trainer = Trainer(
            run.setup, topology, run.train_set, run.test_set, checkpoint, monitor=monitor
        )
    with topology.agree("comparing the parameters"):
        topology.check_agreement(trainer.state.describe_parameters())
    rows = topology.gather(trainer.state.ownership())
    if monitor is not None:
        monitor.message(describe_found(run.train_set, run.test_set))
        monitor.ownership(rows)
        if checkpoint is not None:
            monitor.message(f"continuing from step {checkpoint.step} ({checkpoint.path})")
        warn_of_blocks(config, checkpoint)
    return trainer


def fit_and_report(
    run: Run, trainer: Trainer, monitor: Monitor | None, start: float
) -> Evaluation | None:
    """Trains and shows how it ended; None without all blocks or after a stop. Collective."""
    run_dir, topology = Path(run.config.run_dir), run.topology
    evaluation = trainer.fit()
    if trainer.stop is not None:
        if monitor is not None:
            stopped = f"stopped at step {trainer.step} ({trainer.stop.reason})"
            monitor.message(f"{stopped}; to continue: {Launch.command('dbdist.train')}")
        return None
    peaks = topology.gather(peak_memory_mb(topology.device))
    if monitor is None:
        return evaluation
    elapsed_s, peak_mb = time.perf_counter() - start, dict(enumerate(peaks))
    if evaluation is None:
        steps, complete = newest_steps(run_dir, run.config.num_blocks), None
        try:
            complete = find_checkpoint(run_dir)
        except CheckpointError as error:  # another block's affair
            log.warning(str(error))
        monitor.summary_of_blocks(steps, complete and complete.step, elapsed_s, peak_mb)
    else:
        write_evaluation(run_dir, evaluation)
        main = [evaluation.main.name, f"{evaluation.main.name}_after_block"]
        figures = {k: v for k, v in evaluation.figures.items() if k in main}
        monitor.summary(figures, elapsed_s, peak_mb)
    return evaluation


def needed_files(config: Config, topology: Topology, checkpoint: Checkpoint) -> list[str]:
    """The files that this rank will read of a checkpoint that it continues."""
    blocks, has_common = own_blocks(config, topology), checkpoint.has(SHARED)
    files = files_to_restore(config, topology, blocks, has_common=has_common)
    if config.shared == "averaged" and not has_common and topology.is_coordinator:
        # It makes a mean of them.
        files += [block_file(b) for b in range(config.num_blocks) if b not in blocks]
    return files


def open_monitor(run: Run, held: ExitStack) -> Monitor | None:
    """On rank 0 what shows and records the run, until `held` ends. Collective."""
    config, monitor = run.config, None
    with run.topology.agree():
        if run.topology.is_coordinator:
            try:
                monitor = Monitor(
                    Path(config.run_dir),
                    run.levels,
                    config.num_blocks,
                    set(range(run.topology.world_size)),
                    run.start_step,
                    config.max_steps(len(run.train_set)),
                    blocks=config.trained_blocks,
                    is_in_step=config.parallel.sync == "step" and config.is_joint,
                    config=asdict(config),
                    form=run.setup.task.main.form,
                )
            except OSError as error:
                raise ConfigError(
                    f"run_dir {config.run_dir} cannot be written ({error.strerror})"
                ) from None
    held.enter_context(monitor or nullcontext())
    return monitor


def check_not_ahead(
    config: Config, checkpoint: Checkpoint | None, damaged: Collection[Path]
) -> None:
    """Raises ConfigError where a joint run would replace what blocks did by themselves.

    With `sync: every` that is where blocks have trained by themselves beyond the step from which
    the joint run would start. (With `never` it would come to the same.) damaged: folders that do
    not count.
    """
    start = checkpoint.step if checkpoint else 0
    if config.shared != "averaged":
        return
    ahead: dict[int, int] = {}
    for path in sorted(step_folders(Path(config.run_dir) / "checkpoints"), key=step_of):
        if step_of(path) > start and path not in damaged:
            ahead |= dict.fromkeys(alone_in(path), step_of(path))
    if ahead:
        last = max(ahead.values())
        behind = [b for b in range(config.num_blocks) if ahead.get(b, start) < last]
        told = ", ".join(f"block {block} to step {step}" for block, step in sorted(ahead.items()))
        raise ConfigError(
            f"{config.run_dir} has blocks that were trained by themselves, {told}, beyond step "
            f"{start}, the newest that all have; bring the others there first "
            f"({_blocks_option(behind)} --train.max_steps {last}), or give another run_dir"
        )


def _blocks_option(blocks: list[int]) -> str:
    """As it is typed."""
    text = str(blocks[0]) if len(blocks) == 1 else f"[{','.join(map(str, blocks))}]"
    return f"--parallel.blocks {text}"


def warn_of_blocks(config: Config, checkpoint: Checkpoint | None) -> None:
    """Warns of what blocks that were trained by themselves leave undone or behind."""
    if not (config.is_joint and config.has_copies):
        return
    if checkpoint is not None and config.shared == "averaged" and not checkpoint.has(SHARED):
        momentum = ", an outer momentum starts at zero" * (config.parallel.outer_momentum > 0)
        log.warning(
            f"{checkpoint.path} was saved block by block: the common parameters are the mean of "
            f"the blocks' own{momentum}"
        )
    start = checkpoint.step if checkpoint else 0
    steps = [step or 0 for step in newest_steps(Path(config.run_dir), config.num_blocks)]
    if max(steps) > start and min(steps) < max(steps):
        ahead = ", ".join(f"block {b} has step {s}" for b, s in enumerate(steps) if s > start)
        behind = [block for block, step in enumerate(steps) if step < max(steps)]
        log.warning(
            f"{ahead}, but all blocks start from step {start}, the newest they have in common; "
            f"{_blocks_option(behind)} would train what is behind alone"
        )
