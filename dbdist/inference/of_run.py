"""A run's checkpoint, scored on the test set."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dbdist.build import build_setup
from dbdist.checkpoint.choose import choose
from dbdist.checkpoint.manifest import Checkpoint
from dbdist.config.config import Config
from dbdist.data.sources import dataset_spec, load_dataset, prepare
from dbdist.errors import CheckpointError, TopologyError
from dbdist.inference.load_models import files_of_block, load_block
from dbdist.models.denoiser import Denoiser
from dbdist.parallel.layout import Layout
from dbdist.parallel.topology import Topology
from dbdist.sampling.evaluation import Evaluation, check_test_set, evaluate, write_evaluation


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
    """Evaluates a run's checkpoint, writes RUN/evaluation.json and prints it. Collective."""
    run_dir = Path(config.run_dir)
    with topology.agree("reading the dataset's folder"):
        setup = build_setup(config, dataset_spec(config.data))
    checkpoint = checkpoint_of_run(config, topology, setup.describe())
    with topology.agree():
        if topology.local_rank == 0:
            prepare(config.data)
    with topology.agree("loading the data"):
        test_set = load_dataset(config.data, "test")
        check_test_set(config, test_set)
    own: dict[int, Denoiser] = {}
    with topology.agree("reading the checkpoint"):

        def load(block: int) -> Denoiser:
            return load_block(setup, checkpoint, block, topology.device)

        if topology.world_size > 1 and topology.block is not None:
            own[topology.block] = load(topology.block)
        elif topology.world_size == 1:  # they are loaded in turn: look at all files before
            for block in range(config.num_blocks):
                load(block)
    evaluation = evaluate(
        setup, topology, test_set, own.__getitem__ if own else load, checkpoint.step
    )
    if topology.is_coordinator:
        write_evaluation(run_dir, evaluation)
        report(run_dir, evaluation)
    return evaluation


def checkpoint_of_run(config: Config, topology: Topology, model: Mapping[str, Any]) -> Checkpoint:
    """`eval.step`, or the newest (with `checkpoint.fallback` the newest intact); what this rank
    needs of it is intact. model: what it must agree with. Collective. Raises CheckpointError."""
    run_dir = Path(config.run_dir)
    blocks = range(config.num_blocks)
    if topology.world_size > 1:
        blocks = () if topology.block is None else (topology.block,)
    choice = choose(
        run_dir,
        topology,
        model,
        lambda checkpoint: [f for b in blocks for f in files_of_block(config, checkpoint, b)],
        fallback=config.checkpoint.fallback,
        step=config.eval.step,
    )
    if choice is None:
        raise CheckpointError(f"{run_dir} has no complete checkpoint; train it first")
    return choice.checkpoint


def report(run_dir: Path, evaluation: Evaluation) -> None:
    """The result on the terminal."""
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
    table.add_row("file", str(run_dir / "evaluation.json"))
    Console(width=None if sys.stdout.isatty() else 120).print(table, highlight=False)
