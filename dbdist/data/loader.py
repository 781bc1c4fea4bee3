# ruff: noqa: PT028 (test_batches is no test)
"""The order of samples: training batches of a block replica, test batches of a shard.

Takes a `Dataset`, gives its batches. Position p of a block's training stream names its
sample and its augmentation, so batches do not depend on replicas, workers or where a run resumed.
"""

from collections.abc import Iterator
from itertools import count

import torch
from jaxtyping import Int64
from torch import Tensor

from dbdist import seeds
from dbdist.data.base import Batch, Dataset, Key
from dbdist.data.workers import load_batches


class BatchStream(Iterator[Batch]):
    """This replica's part of the batches of steps start_step .. num_steps - 1, in one pass.

    A block's stream is an endless row of permutations of the training set, the e-th drawn from
    (seed, "shuffle", block, e). Step s takes positions s * batch_size .. (s + 1) * batch_size - 1,
    across the seam of two permutations if need be; replica r takes their r-th contiguous part.
    num_steps counts from step 0 wherever the stream starts; None: endless.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        seed: int,
        block: int,
        replica: int = 0,
        num_replicas: int = 1,
        start_step: int = 0,
        num_steps: int | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        if batch_size % num_replicas:
            raise ValueError(
                f"batch_size {batch_size} is not a multiple of num_replicas {num_replicas}"
            )
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self.block = block
        self.replica = replica
        self.num_replicas = num_replicas
        self._permutation: tuple[int, Int64[Tensor, " n"]] = (0, self._draw(0))
        steps = count(start_step) if num_steps is None else range(start_step, num_steps)
        self._batches = load_batches(
            dataset, map(self.keys_of_step, steps), num_workers, pin_memory
        )

    def __next__(self) -> Batch:
        return next(self._batches)

    def close(self) -> None:
        """Ends the stream and its workers."""
        self._batches.close()

    def positions_of_step(self, step: int) -> range:
        """Where in the block's stream this replica's samples lie."""
        size = self.batch_size // self.num_replicas
        first = step * self.batch_size + self.replica * size
        return range(first, first + size)

    def indices_of_step(self, step: int) -> list[int]:
        """This replica's samples of a step."""
        positions, indices = self.positions_of_step(step), []
        while positions:
            epoch, offset = divmod(positions[0], len(self.dataset))
            if epoch != self._permutation[0]:
                self._permutation = (epoch, self._draw(epoch))
            part = self._permutation[1][offset : offset + len(positions)].tolist()
            indices += part
            positions = positions[len(part) :]
        return indices

    def keys_of_step(self, step: int) -> list[Key]:
        """The same with their augmentation seeds, if there is any augmentation."""
        indices = self.indices_of_step(step)
        if not self.dataset.augments:
            return [*indices]
        places = zip(indices, self.positions_of_step(step), strict=True)
        return [(i, seeds.at(self.seed, "augment", self.block, position)) for i, position in places]

    def _draw(self, epoch: int) -> Int64[Tensor, " n"]:
        source = seeds.generator(self.seed, "shuffle", self.block, epoch)
        return torch.randperm(len(self.dataset), generator=source)


def num_test_samples(dataset: Dataset, batch_size: int, drop_last: bool = False) -> int:
    """Samples that the test batches of all shards hold together."""
    return len(dataset) - (len(dataset) % batch_size if drop_last else 0)


def test_batches(
    dataset: Dataset,
    batch_size: int,
    shard: int = 0,
    num_shards: int = 1,
    drop_last: bool = False,
    num_workers: int = 0,
) -> Iterator[tuple[Batch, int]]:
    """(batch, batch_index) of batches shard, shard + num_shards, … in order."""
    starts = range(0, num_test_samples(dataset, batch_size, drop_last), batch_size)
    mine = range(shard, len(starts), num_shards)
    keys = ([*range(len(dataset))[starts[i] : starts[i] + batch_size]] for i in mine)
    batches = load_batches(dataset, keys, num_workers)
    for i, batch in zip(mine, batches, strict=True):
        yield batch, i


test_batches.__test__ = False  # type: ignore  # nor shall pytest take it for one
