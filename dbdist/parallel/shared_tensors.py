"""The shared modules' tensors on this rank, in flat buffers.

Parameters and gradients have one flat buffer each; the buffers that modules register have theirs.
"""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dbdist.parallel.flat import FlatBuffer
from dbdist.parallel.topology import Topology
from dbdist.tensors import trained_of


class SharedTensors:
    """The parameters of the shared modules that are trained, and their gradients.

    Both live in flat buffers, which are what is summed, clipped, sent and received: a parameter and
    its `.grad` are views of them from here on. Frozen parameters are left where they are.
    """

    def __init__(self, topology: Topology, shared: nn.Module, multiple_of: int = 1) -> None:
        """multiple_of: what each dtype's number of elements is filled up to."""
        self.module, self._topology = shared, topology
        self.parameters: dict[str, nn.Parameter] = trained_of(shared)
        places = topology.device, topology.wire_device
        self.values = FlatBuffer(self.parameters, *places, multiple_of)
        self.values.hold(self.parameters)
        self.gradients = FlatBuffer(self.parameters, *places, multiple_of)
        for name, parameter in self.parameters.items():
            parameter.grad = self.gradients.views[name]

    def zero_gradients(self) -> None:
        self.gradients.data.zero_()

    @torch.no_grad()
    def note_loss(self, loss: Tensor) -> None:
        """Makes a gradient of every replica's not finite if the loss is not."""
        self.gradients.segments[0][0] += 0 * loss

    def average_gradients(self) -> None:
        """Averages over the copies of this rank's block, once all gradients of a step are there."""
        group, size = self._topology.replica_group, self._topology.layout.num_replicas
        if group is None:
            return
        self.gradients.lift()
        for segment in self.gradients.split(self.gradients.wire):
            dist.all_reduce(segment, group=group)
            segment /= size
        self.gradients.land()
        moved = 2 * (size - 1) * self.gradients.num_bytes // size
        self._topology.meter.sent["replica"] += moved
        self._topology.meter.received["replica"] += moved


def take_leaders_buffers(
    topology: Topology,
    buffers: Mapping[str, Tensor],
    leader: int,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Gives buffers that modules have registered the values of rank `leader`'s.

    Collective in the group; None: all ranks.
    """
    size = topology.world_size if group is None else group.size()
    if size == 1 or not buffers:
        return
    flat = FlatBuffer(buffers, topology.wire_device)
    flat.pack(buffers)
    with topology.watch.waiting():
        dist.broadcast(flat.data, src=leader, group=group)
    flat.unpack(buffers)
    kind = "shared" if group is None else "replica"
    if topology.rank == leader:
        topology.meter.sent[kind] += (size - 1) * flat.num_bytes
    else:
        topology.meter.received[kind] += flat.num_bytes
