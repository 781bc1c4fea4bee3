"""Sets a run up on this rank, step by step in agreement with the others, and trains it."""

import time
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path

from dbdist.build import Setup, build_setup
from dbdist.checkpoint.choose import choose, set_aside
from dbdist.checkpoint.manifest import Checkpoint, find_checkpoint, newest_steps
from dbdist.checkpoint.names import SHARED, block_file, step_folders, step_of
from dbdist.checkpoint.parts import alone_in
from dbdist.config.config import Config
from dbdist.data.sources import dataset_spec, load_dataset, prepare
from dbdist.errors import CheckpointError, ConfigError
from dbdist.monitor.monitor import Monitor
from dbdist.monitor.ownership import peak_memory_mb
from dbdist.parallel.launch import Launch
from dbdist.parallel.session import hearing_signals
from dbdist.parallel.topology import Topology
from dbdist.run.folder import check_run_dir, claim
from dbdist.run.lock import sole_trainer
from dbdist.sampling.evaluation import Evaluation, write_evaluation
from dbdist.training.rank_state import own_blocks
from dbdist.training.state_files import files_to_restore
from dbdist.training.trainer import Trainer

GRACE_S = 20.0
"""Launchers kill a rank 30 s after its SIGTERM."""


def train(
    config: Config, topology: Topology, tell: Callable[[str], None] | None = None
) -> Evaluation | None:
    """Sets a run up on this rank and trains it; None if it was asked to stop, or has only some
    blocks of the model. Collective.

    tell: shows a line, from any thread; None: signals are not heard.
    """
    grace_s = GRACE_S if config.has_copies else 0.0
    with hearing_signals(topology, tell, grace_s), ExitStack() as held:
        return _train(config, topology, held)


def _train(config: Config, topology: Topology, held: ExitStack) -> Evaluation | None:
    """held: to hold this rank's blocks until the end."""
    start = time.perf_counter()
    run_dir = Path(config.run_dir)
    with topology.agree("opening the run directory"):  # first: it takes no time
        check_run_dir(config)
    with topology.agree("reading the dataset's folder"):
        spec = dataset_spec(config.data)
        setup = build_setup(config, spec)  # raises before anything is written
    choice = choose(
        run_dir,
        topology,
        setup.describe(),
        partial(needed_files, config, topology),
        fallback=config.checkpoint.fallback,
        is_training=True,
        blocks=config.trained_blocks,
    )
    checkpoint = choice and choice.checkpoint
    with topology.agree():
        if topology.local_rank == 0:
            prepare(config.data)
    with topology.agree("loading the data"):
        train_set, test_set = load_dataset(config.data, "train"), load_dataset(config.data, "test")
    with topology.agree("comparing the data"):
        data = {"the training set": train_set.digest(), "the test set": test_set.digest()}
        topology.check_agreement(data)
    with topology.agree("taking the run directory"):
        blocks = own_blocks(config, topology) if topology.replica == 0 else []
        held.enter_context(sole_trainer(run_dir, blocks, config.parallel.timeout_s / 2))
    with topology.agree():
        if topology.is_coordinator:
            check_not_ahead(config, checkpoint, choice.damaged if choice else ())
            claim(config, len(train_set), checkpoint and checkpoint.step)
            set_aside(choice.damaged if choice else (), config.trained_blocks)
    with topology.agree("building the model"):
        trainer = Trainer(setup, topology, train_set, test_set, checkpoint)
    with topology.agree("comparing the parameters"):
        topology.check_agreement(trainer.state.describe_parameters())
    rows = topology.gather(trainer.state.ownership())
    monitor = None
    with topology.agree():
        if topology.is_coordinator:
            monitor = open_monitor(setup, topology, trainer)
    if monitor is not None:
        monitor.ownership(rows)  # type: ignore[arg-type]
        if checkpoint is not None:
            monitor.message(f"continuing from step {checkpoint.step} ({checkpoint.path})")
        tell_of_parts(config, checkpoint, monitor)
    try:
        evaluation = trainer.fit(monitor)
        if trainer.stop is not None:
            if monitor is not None:
                stopped = f"stopped at step {trainer.step} ({trainer.stop.reason})"
                monitor.message(f"{stopped}; to continue: {Launch.command('dbdist.train')}")
            return None
        peaks = topology.gather(peak_memory_mb(topology.device))
        elapsed_s, peak_mb = time.perf_counter() - start, dict(enumerate(peaks))
        if monitor is not None and evaluation is None:
            steps, complete = newest_steps(run_dir, config.num_blocks), None
            try:
                complete = find_checkpoint(run_dir)
            except CheckpointError as error:  # another block's affair
                monitor.warn(str(error))
            monitor.summary_of_blocks(steps, complete and complete.step, elapsed_s, peak_mb)  # type: ignore[arg-type]
        elif monitor is not None and evaluation is not None:
            write_evaluation(run_dir, evaluation)
            main = [evaluation.main.name, f"{evaluation.main.name}_after_block"]
            figures = {k: v for k, v in evaluation.figures.items() if k in main}
            monitor.summary(figures, elapsed_s, peak_mb)  # type: ignore[arg-type]
    finally:
        if monitor is not None:
            monitor.close()
    return evaluation


def needed_files(config: Config, topology: Topology, checkpoint: Checkpoint) -> list[str]:
    """The files that this rank will read of a checkpoint that it continues."""
    blocks, has_common = own_blocks(config, topology), checkpoint.has(SHARED)
    files = files_to_restore(config, topology, blocks, has_common=has_common)
    if config.shared == "averaged" and not has_common and topology.is_coordinator:
        # It makes a mean of them.
        files += [block_file(b) for b in range(config.num_blocks) if b not in blocks]
    return files


def open_monitor(setup: Setup, topology: Topology, trainer: Trainer) -> Monitor:
    """Raises ConfigError where its files cannot be written."""
    config = setup.config
    try:
        return Monitor(
            Path(config.run_dir),
            trainer.levels,
            config.num_blocks,
            set(range(topology.world_size)),
            trainer.start_step,
            trainer.max_steps,
            blocks=config.trained_blocks,
            is_in_step=config.parallel.sync == "step" and config.trained_blocks is None,
            config=asdict(config),
            form=setup.task.main.form,
        )
    except OSError as error:
        raise ConfigError(
            f"run_dir {config.run_dir} cannot be written ({error.strerror})"
        ) from None


def check_not_ahead(
    config: Config, checkpoint: Checkpoint | None, damaged: Collection[Path]
) -> None:
    """Raises ConfigError where blocks have trained by themselves beyond the step from which a joint
    run of `sync: every` would start: it would replace what they did. (With `never` it would come to
    the same.) damaged: folders that do not count."""
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


def tell_of_parts(config: Config, checkpoint: Checkpoint | None, monitor: Monitor) -> None:
    """Warns of what blocks that were trained by themselves leave undone or behind."""
    if not (config.is_joint and config.has_copies):
        return
    if checkpoint is not None and config.shared == "averaged" and not checkpoint.has(SHARED):
        momentum = ", an outer momentum starts at zero" * (config.parallel.outer_momentum > 0)
        monitor.warn(
            f"{checkpoint.path} was saved block by block: the common parameters are the mean of "
            f"the blocks' own{momentum}"
        )
    start = checkpoint.step if checkpoint else 0
    steps = [step or 0 for step in newest_steps(Path(config.run_dir), config.num_blocks)]
    if max(steps) > start and min(steps) < max(steps):
        ahead = ", ".join(f"block {b} has step {s}" for b, s in enumerate(steps) if s > start)
        behind = [block for block, step in enumerate(steps) if step < max(steps)]
        monitor.warn(
            f"{ahead}, but all blocks start from step {start}, the newest they have in common; "
            f"{_blocks_option(behind)} would train what is behind alone"
        )
