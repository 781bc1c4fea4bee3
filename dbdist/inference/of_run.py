"""A run's checkpoint, scored on the test set."""

import sys
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dbdist import log
from dbdist.build import Setup, build_setup
from dbdist.checkpoint.choose import Candidates
from dbdist.checkpoint.manifest import Checkpoint
from dbdist.checkpoint.same_data import check_meaning, data_entry, other_test_samples
from dbdist.config.config import Config
from dbdist.data.base import Dataset
from dbdist.data.sources import dataset_spec, load_dataset, prepare
from dbdist.errors import CheckpointError, TopologyError
from dbdist.inference.load_models import files_of_block, load_block
from dbdist.models.denoiser import Denoiser
from dbdist.parallel.layout import Layout
from dbdist.parallel.topology import Topology
from dbdist.run.folder import evaluation_file
from dbdist.sampling.evaluation import (
    Evaluation,
    ModelOfBlock,
    check_figures,
    check_test_set,
    evaluate,
)
from dbdist.whole_files import write_json


def layout_for_evaluation(config: Config, world_size: int) -> Layout:
    """One process holds everything; otherwise as many chains as fit. Raises TopologyError."""
    if config.mode == "end_to_end" or world_size == 1:
        return Layout(1, world_size)
    whole, rest = divmod(world_size, config.num_blocks)
    if rest == 0:
        return Layout(config.num_blocks, whole)
    if rest == 1 and whole > 0 and config.parallel.coordinator == "dedicated":
        return Layout(config.num_blocks, whole, "dedicated")
    raise TopologyError(
        f"{world_size} processes cannot form chains of {config.num_blocks} blocks; "
        f"start 1, {config.num_blocks} or a multiple of {config.num_blocks}"
    )


def evaluate_run(config: Config, topology: Topology) -> Evaluation:
    """Evaluates a run's checkpoint, writes the result into RUN and prints it. Collective."""
    with topology.agree("reading the dataset's folder"):
        setup = build_setup(config, dataset_spec(config.data))
    with closing(checkpoint_of_run(config, topology, setup.describe())) as checkpoint:
        return _evaluate(setup, topology, checkpoint)


def _evaluate(setup: Setup, topology: Topology, checkpoint: Checkpoint) -> Evaluation:
    config = setup.config
    with topology.agree():
        if topology.local_rank == 0:
            prepare(config.data)
    with topology.agree("loading the data"):
        test_set = load_dataset(config.data, "test")
        check_test_set(config, test_set)
        other = compare_data(checkpoint, test_set, topology)
    with topology.agree("preparing the figures"):
        if topology.local_rank == 0:
            setup.task.prepare(
                lambda split: test_set if split == "test" else load_dataset(config.data, split)
            )
    check_figures(setup.task, config.num_blocks, topology)
    blocks = blocks_here(setup, topology, checkpoint)
    evaluation = evaluate(setup, topology, test_set, blocks, checkpoint.step)
    if topology.is_coordinator:
        report(evaluation, _write(config, evaluation, other))
    return evaluation


def blocks_here(setup: Setup, topology: Topology, checkpoint: Checkpoint) -> ModelOfBlock:
    """Gives this rank's block; in one process every block, loaded when asked for. Collective."""
    own: dict[int, Denoiser] = {}
    with topology.agree("reading the checkpoint"):

        def load(block: int) -> Denoiser:
            return load_block(setup, checkpoint, block, topology.device)

        if topology.world_size > 1 and topology.block is not None:
            own[topology.block] = load(topology.block)
        elif topology.world_size == 1:  # they are loaded in turn: look at all files before
            for block in range(setup.config.num_blocks):
                load(block)
    return own.__getitem__ if own else load


def compare_data(checkpoint: Checkpoint, test_set: Dataset, topology: Topology) -> str | None:
    """Refuses classes or a scaling that the model was not trained with; raises CheckpointError.

    Warns of another test set than the run's, on rank 0. Returns the digest of such a one.
    """
    stored = checkpoint.manifest.get("data", {})
    test = {"num_samples": len(test_set), "digest": test_set.digest()}
    now = data_entry({**test_set.spec.identity(), "test": test})
    check_meaning(checkpoint.path, stored, now)
    warning = other_test_samples(checkpoint.path, stored, now)
    if warning is None:
        return None
    if topology.is_coordinator:
        log.warning(warning)
    return test_set.digest()


def _write(config: Config, evaluation: Evaluation, other_test_set: str | None) -> str:
    """Writes the result; where it is, or that it could not be written."""
    path = Path(config.run_dir) / evaluation_file(config, evaluation.step, other_test_set)
    try:
        write_json(path, evaluation.to_json())
    except OSError as error:
        log.warning(f"{path} cannot be written ({error.strerror}); the result is only shown")
        return "not written"
    return str(path)


def checkpoint_of_run(config: Config, topology: Topology, model: Mapping[str, Any]) -> Checkpoint:
    """Returns the checkpoint of `eval.step`, or the newest one. Collective.

    With `checkpoint.fallback` it is the newest intact one. What this rank needs of it is intact.
    model: what it must agree with. Raises CheckpointError.
    """
    run_dir = Path(config.run_dir)
    blocks = range(config.num_blocks)
    if topology.world_size > 1:
        blocks = () if topology.block is None else (topology.block,)
    candidates = Candidates(
        run_dir,
        topology,
        model,
        lambda checkpoint: [f for b in blocks for f in files_of_block(config, checkpoint, b)],
        fallback=config.checkpoint.fallback,
    )
    step = config.eval.step
    choice = candidates.newest() if step is None else candidates.of_step(step)
    if choice is None:
        raise CheckpointError(f"{run_dir} has no complete checkpoint; train it first")
    return choice.checkpoint


def report(evaluation: Evaluation, file: str) -> None:
    """Shows the result on the terminal. file: where it is written."""
    table = Table(
        title=f"Evaluation at step {evaluation.step}", title_justify="left", show_header=False
    )
    main = evaluation.main
    table.add_row(main.name, main.form.format(evaluation.value))
    if evaluation.after_block:
        after = (f"{b}: {main.form.format(v)}" for b, v in enumerate(evaluation.after_block))
        table.add_row(f"{main.name} after block", "  ".join(after))
    table.add_row("samples", f"{evaluation.num_samples} ({evaluation.samples_per_s:.0f}/s)")
    table.add_row("processes", str(evaluation.world_size))
    table.add_row("file", file)
    Console(width=None if sys.stdout.isatty() else 120).print(table, highlight=False)
