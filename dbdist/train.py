"""`torchrun … -m dbdist.train --config FILE`: trains, or continues where the run directory left
off."""

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import record

from dbdist import build
from dbdist.cli import guarded, parse_config, say
from dbdist.config import Config
from dbdist.data import dataset_spec, load_dataset, prepare
from dbdist.evaluation import Evaluation
from dbdist.fallback import choose, set_aside
from dbdist.monitor import Monitor, peak_memory_mb
from dbdist.parallel.agreement import check_agreement
from dbdist.parallel.topology import Launch, Topology
from dbdist.rank_state import describe_model, files_to_restore, own_blocks
from dbdist.run_dir import check_run_dir, claim, write_evaluation
from dbdist.session import facts_of, hearing_signals, joined
from dbdist.trainer import Trainer, layout_of

GRACE_S = 20.0
"""Launchers kill a rank 30 s after its SIGTERM."""


def main(argv: list[str] | None = None) -> None:
    guarded("dbdist train", lambda: run(sys.argv[1:] if argv is None else argv))


def run(argv: list[str]) -> None:
    config = parse_config("dbdist train", __doc__ or "", argv).validate()

    launch = Launch.from_environment()
    layout = layout_of(config, launch.world_size)
    if config.parallel.replica_engine == "deepspeed":
        from dbdist.parallel import zero

        zero.settings(config, layout.num_replicas)  # raises before anybody is waited for
    tell = partial(say, "dbdist train")
    with joined(config, layout, launch, facts_of(config), tell, config.trained_blocks) as topology:
        train(config, topology, tell)


def train(
    config: Config, topology: Topology, tell: Callable[[str], None] | None = None
) -> Evaluation | None:
    """Sets a run up on this rank and trains it; None if it was asked to stop. Collective.

    tell: shows a line, from any thread; None: signals are not heard.
    """
    start = time.perf_counter()
    run_dir = Path(config.run_dir)
    with topology.agree("opening the run directory"):  # first: it takes no time
        check_run_dir(config)
    with topology.agree("reading the dataset's folder"):
        spec = dataset_spec(config.data)
        model = describe_model(config, spec)
    needed = files_to_restore(config, topology, own_blocks(config, topology))
    choice = choose(
        run_dir,
        topology,
        model,
        lambda _: needed,
        fallback=config.checkpoint.fallback,
        is_training=True,
    )
    checkpoint = choice and choice.checkpoint
    with topology.agree():
        if topology.local_rank == 0:
            prepare(config.data)
    with topology.agree("loading the data"):
        train_set, test_set = load_dataset(config.data, "train"), load_dataset(config.data, "test")
    with topology.agree():
        if topology.is_coordinator:
            build.architecture(config, spec)  # raises before anything is written
            claim(config, len(train_set), checkpoint and checkpoint.step)
            set_aside(choice.damaged if choice else ())
    with topology.agree("building the model"):
        trainer = Trainer(config, topology, train_set, test_set, checkpoint)
    with topology.agree():
        if topology.world_size > 1:
            data = {"the training set": train_set.digest(), "the test set": test_set.digest()}
            check_agreement(data | trainer.state.describe_parameters(), topology.world_size)
    rows = topology.gather(trainer.state.ownership())
    monitor = None
    if topology.is_coordinator:
        monitor = Monitor(
            run_dir,
            trainer.schedule,
            config.num_blocks,
            set(range(topology.world_size)),
            trainer.start_step,
            trainer.max_steps,
        )
        monitor.ownership(rows)  # type: ignore[arg-type]
        if checkpoint is not None:
            monitor.message(f"continuing from step {checkpoint.step} ({checkpoint.path})")
    grace_s = GRACE_S if config.parallel.sync != "step" else 0.0
    try:
        with hearing_signals(topology, tell, grace_s):
            evaluation = trainer.fit(monitor)
        if evaluation is None:
            if monitor is not None:
                stopped = f"stopped at step {trainer.step} ({trainer.stop and trainer.stop.reason})"
                monitor.message(f"{stopped}; to continue: {Launch.command('dbdist.train')}")
            return None
        peaks = topology.gather(peak_memory_mb(topology.device))
        if monitor is not None:
            write_evaluation(run_dir, evaluation)
            monitor.summary(
                evaluation.accuracy,
                evaluation.accuracy_after_block,
                time.perf_counter() - start,
                dict(enumerate(peaks)),  # type: ignore[arg-type]
            )
    finally:
        if monitor is not None:
            monitor.close()
    return evaluation


if __name__ == "__main__":
    record(main)()
