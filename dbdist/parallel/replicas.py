"""Data parallelism inside a block: torch's DDP over the block's replicas, with its bytes on the
meter."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dbdist.parallel.topology import Topology


class Replicas:
    """A training objective whose gradients are averaged over the replicas of this rank's block;
    without replicas, the objective as it is. Replicas start alike because weights depend on the
    seed alone."""

    def __init__(self, objective: nn.Module, topology: Topology) -> None:
        self._meter = topology.meter
        self._engine: DistributedDataParallel | None = None
        self._bytes_moved = 0
        if topology.replica_group is not None:
            self._engine = DistributedDataParallel(
                objective,
                device_ids=[topology.device] if topology.device.type == "cuda" else None,
                process_group=topology.replica_group,
                init_sync=False,
            )
            size = topology.layout.num_replicas
            # A ring moves 2 (R - 1) / R of the gradients out of every rank, and as much in.
            gradients = sum(p.numel() * p.element_size() for p in objective.parameters())
            self._bytes_moved = 2 * (size - 1) * gradients // size
        self.objective: nn.Module = self._engine or objective

    def reduce_if(self, is_last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward of a part of a batch: gradients travel with the last part."""
        if self._engine is None:
            return nullcontext()
        if not is_last:
            return self._engine.no_sync()
        self._meter.sent["replica"] += self._bytes_moved
        self._meter.received["replica"] += self._bytes_moved
        return nullcontext()
