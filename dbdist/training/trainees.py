"""The blocks in training: the order of their steps, and where each is in its data."""

import torch

from dbdist import seeds
from dbdist.config.config import Config
from dbdist.data.base import Dataset
from dbdist.data.loader import BatchStream
from dbdist.monitor.histogram import LevelHistogram
from dbdist.monitor.levels import Levels
from dbdist.parallel.topology import Topology
from dbdist.training.batches import LastBatch, StoppingBatches
from dbdist.training.rank_state import OwnedBlock
from dbdist.training.records import Trainee


def block_order(config: Config, num_own: int, max_steps: int) -> list[list[int]]:
    """The blocks trained in each step: all of this rank's, or in sequential mode random ones.

    num_own: how many blocks this rank has. In sequential mode a step trains num_blocks of them.
    """
    if config.mode != "sequential":
        return [list(range(num_own))] * max_steps
    generator = seeds.generator(config.seed, "block")
    return [
        torch.randint(config.num_blocks, (config.num_blocks,), generator=generator).tolist()
        for _ in range(max_steps)
    ]


def build_trainees(
    config: Config,
    topology: Topology,
    blocks: list[OwnedBlock],
    train_set: Dataset,
    levels: Levels | None,
    done: list[list[int]],
) -> list[Trainee]:
    """This rank's blocks, each where it left off. done: the blocks of each step so far."""
    last_batch = LastBatch()
    trainees: list[Trainee] = []
    for owned in blocks:
        block, steps_done = owned.index, len(done)
        if config.mode == "sequential":
            steps_done = sum(turns.count(block) for turns in done)
        stream = BatchStream(
            train_set,
            config.train.batch_size,
            config.seed,
            block,
            topology.replica,
            topology.layout.num_replicas,
            start_step=steps_done,
            num_workers=config.data.num_workers,
            pin_memory=topology.device.type == "cuda",
        )
        who = f"rank {topology.rank}, block {block}"
        batches = StoppingBatches(stream, topology.watch.stopping, who, last_batch)
        histogram = None
        if levels is not None:
            histogram = LevelHistogram.of(levels, block, topology.device)
        trainees.append(Trainee(owned, steps_done, batches, histogram))
    return trainees
