"""The test samples of one replica as micro-batches, and what travels with each in the chain."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dbdist.build import Setup
from dbdist.data.base import Dataset
from dbdist.data.loader import num_test_samples, test_batches
from dbdist.parallel.topology import Topology
from dbdist.sampling.sampler import Rows
from dbdist.tasks.base import Task, to_device


class MicroBatches:
    """The test samples of one replica, loaded batch by batch, as micro-batches in order.

    Replicas that split a block's weights compute together, so all take as many micro-batches: those
    with fewer samples end with idle ones, of one sample that does not count.
    """

    def __init__(
        self, setup: Setup, topology: Topology, dataset: Dataset, dtype: torch.dtype
    ) -> None:
        e = setup.config.eval
        self._device, self._dtype, self._dataset = topology.device, dtype, dataset
        num_samples = num_test_samples(dataset, e.batch_size, e.drop_last)
        num_replicas = topology.layout.num_replicas
        self._batch_size = e.batch_size
        rows: list[list[Rows]] = [[] for _ in range(num_replicas)]
        for b, first in enumerate(range(0, num_samples, e.batch_size)):
            end = min(first + e.batch_size, num_samples)
            rows[b % num_replicas] += [
                Rows(start, min(start + e.micro_batch_size, end))
                for start in range(first, end, e.micro_batch_size)
            ]
        self.rows = rows[topology.replica]
        """Which samples each micro-batch holds; idle ones are not listed."""
        num_idle = max(map(len, rows)) - len(self.rows)
        self.sizes = [r.stop - r.start for r in self.rows] + [1] * num_idle
        """Samples of each micro-batch."""
        self._batches = test_batches(
            dataset,
            e.batch_size,
            shard=topology.replica,
            num_shards=num_replicas,
            drop_last=e.drop_last,
            num_workers=setup.config.data.num_workers,
        )
        self._batch: tuple[int, dict[str, Tensor]] | None = None

    def is_idle(self, i: int) -> bool:
        """Whether a micro-batch is there for the other replicas' sake."""
        return i >= len(self.rows)

    def rows_of(self, i: int) -> Rows:
        """Which samples a micro-batch holds."""
        return Rows(0, 1) if self.is_idle(i) else self.rows[i]

    def load(self, i: int) -> Mapping[str, Tensor]:
        """A micro-batch on this rank's device; to be called in order."""
        if self.is_idle(i):
            return to_device(self._dataset.__getitems__([0]), self._device, self._dtype)
        wanted, start = divmod(self.rows[i].start, self._batch_size)
        if self._batch is None or self._batch[0] != wanted:
            batch, loaded = next(self._batches)
            assert loaded == wanted, f"batch {loaded}, wanted {wanted}"
            self._batch = loaded, to_device(batch, self._device, self._dtype)
        stop = start + self.sizes[i]
        return {name: value[start:stop] for name, value in self._batch[1].items()}


@dataclass(frozen=True)
class Wire:
    """How a sample's states and carry lie in the row of bytes that travels."""

    state_shape: tuple[int, ...]
    """Of all draws of a sample."""
    state_dtype: torch.dtype
    carry_shape: tuple[int, ...]
    carry_dtype: torch.dtype

    @staticmethod
    def of(task: Task, num_draws: int, dtype: torch.dtype) -> "Wire":
        """dtype: of the shared modules."""
        return Wire(
            (num_draws, *task.state_shape),
            task.state_dtype or dtype,
            task.carry_shape or (0,),
            dtype,
        )

    @property
    def row_bytes(self) -> int:
        """Bytes of one sample."""
        return self._state_bytes + self.carry_dtype.itemsize * torch.Size(self.carry_shape).numel()

    def empty_carry(self, num_samples: int, device: torch.device) -> Tensor:
        """What block 0 starts from."""
        return torch.zeros(num_samples, *self.carry_shape, dtype=self.carry_dtype, device=device)

    def pack(self, z: Tensor, carry: Tensor) -> Tensor:
        """uint8 rows, one a sample. z: one row a draw."""
        num_samples = len(carry)
        states = z.reshape(num_samples, -1).contiguous().view(torch.uint8)
        if carry.numel() == 0:
            return states
        return torch.cat([states, carry.reshape(num_samples, -1).contiguous().view(torch.uint8)], 1)

    def unpack(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of `pack`."""
        states = rows[:, : self._state_bytes].contiguous().view(self.state_dtype)
        z = states.reshape(len(rows) * self.state_shape[0], *self.state_shape[1:])
        if self.row_bytes == self._state_bytes:
            return z, self.empty_carry(len(rows), rows.device)
        carry = rows[:, self._state_bytes :].contiguous().view(self.carry_dtype)
        return z, carry.reshape(len(rows), *self.carry_shape)

    @property
    def _state_bytes(self) -> int:
        return self.state_dtype.itemsize * torch.Size(self.state_shape).numel()
