"""Data parallelism inside a block: torch's DDP over the block's replicas, with its bytes on the meter."""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dbdist.parallel.topology import Topology


def replicate(module: nn.Module, topology: Topology) -> nn.Module:
    """The module, its gradients averaged over the replicas of this rank's block; itself without replicas.

    Replicas start from the same weights because these depend on the seed alone.
    """
    group = topology.replica_group
    if group is None:
        return module
    replicated = DistributedDataParallel(
        module,
        device_ids=[topology.device] if topology.device.type == "cuda" else None,
        process_group=group,
        broadcast_buffers=False,
    )
    meter, size = topology.meter, dist.get_world_size(group)

    def average(_: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        buffer = bucket.buffer()
        # A ring moves 2 (R - 1) / R of the buffer out of every rank, and as much in.
        moved = 2 * (size - 1) * buffer.nbytes // size
        meter.sent["replica"] += moved
        meter.received["replica"] += moved
        work = dist.all_reduce(buffer.div_(size), group=group, async_op=True)
        assert work is not None
        return work.get_future().then(lambda future: future.value()[0])

    replicated.register_comm_hook(None, average)
    return replicated
