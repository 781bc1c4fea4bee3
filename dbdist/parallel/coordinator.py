"""The shared modules' optimizer: who steps it, and what travels for that.

`begin()` is called when a step's shared gradients are final (accumulated, averaged over the block's
replicas, clipped); the block's optimizer then steps; `finish()` returns when this rank's shared
copy is up to date. Three ways, `parallel.sync`: `Coordinated` (step), `Averaged` (every), `Private`
(never, and every mode in which one process holds the whole model). Sums run in block order on the
coordinator, so the result has the same bits wherever the coordinator sits.
"""

import time
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from dbdist.parallel.flat import FlatBuffer
from dbdist.parallel.topology import Topology


class Private:
    """This rank steps its own copy and shares it with nobody."""

    wait_s = 0.0
    """Seconds spent waiting for other ranks since the start."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer: Optimizer | None = optimizer

    def begin(self) -> None:
        """Nothing travels."""

    def finish(self, step: int) -> None:
        """step: steps of the block taken so far, this one included."""
        assert self.optimizer is not None
        self.optimizer.step()


class _Star:
    """Block leaders send a flat buffer to the coordinator, which broadcasts one back to every
    rank."""

    def __init__(self, topology: Topology, like: Mapping[str, Tensor]) -> None:
        self.topology = topology
        self.buffer = FlatBuffer(like, topology.wire_device)
        self.buffer.check_equal_on_all_ranks(topology, "shared modules")
        self.wait_s = 0.0
        self._rows: list[Tensor] = []
        if topology.is_coordinator:
            self._rows = [
                torch.empty_like(self.buffer.data) for _ in range(topology.layout.num_blocks)
            ]
        self._pending: list[dist.Work] = []

    def send_up(self) -> None:
        """Starts moving every leader's buffer to the coordinator."""
        layout, meter = self.topology.layout, self.topology.meter
        if self.topology.is_coordinator:
            for block, row in enumerate(self._rows):
                leader = layout.rank_of(block, 0)
                if leader == self.topology.rank:
                    row.copy_(self.buffer.data)
                else:
                    self._start(dist.irecv(row, src=leader, group=self.topology.p2p_group))
                    meter.received["shared"] += row.nbytes
        elif self.topology.is_leader:
            self._start(dist.isend(self.buffer.data, dst=0, group=self.topology.p2p_group))
            meter.sent["shared"] += self.buffer.num_bytes

    def mean(self) -> Tensor:
        """On the coordinator: the mean of the leaders' buffers, summed in block order, in the
        buffer."""
        self._wait()
        total = self.buffer.data.copy_(self._rows[0])
        for row in self._rows[1:]:
            total += row
        return total.div_(len(self._rows))

    def broadcast_down(self) -> None:
        """Ends with the coordinator's buffer on every rank."""
        self._wait()
        if self.topology.world_size > 1:
            self._start(dist.broadcast(self.buffer.data, src=0, async_op=True))
            self._wait()
        way = (
            self.topology.meter.sent
            if self.topology.is_coordinator
            else self.topology.meter.received
        )
        receivers = self.topology.world_size - 1 if self.topology.is_coordinator else 1
        way["shared"] += self.buffer.num_bytes * receivers

    def _start(self, work: dist.Work | None) -> None:
        assert work is not None
        self._pending.append(work)

    def _wait(self) -> None:
        start = time.perf_counter()
        for work in self._pending:
            work.wait()
        self._pending.clear()
        self.wait_s += time.perf_counter() - start


class Coordinated:
    """Every step: shared gradients are averaged over blocks, the coordinator takes the only
    optimizer step, and all copies become its parameters. DESIGN section 3."""

    def __init__(self, topology: Topology, shared: nn.Module, optimizer: Optimizer | None) -> None:
        """optimizer: of the shared parameters, on the coordinator alone."""
        assert (optimizer is not None) == topology.is_coordinator
        self.optimizer = optimizer
        self._topology = topology
        self._parameters = dict(shared.named_parameters())
        self._star = _Star(topology, self._parameters)

    @property
    def wait_s(self) -> float:
        return self._star.wait_s

    def begin(self) -> None:
        if self._topology.is_leader:
            self._star.buffer.pack({name: p.grad for name, p in self._parameters.items()})
        self._star.send_up()

    def finish(self, step: int) -> None:
        if self.optimizer is not None:
            self._star.mean()
            for name, parameter in self._parameters.items():
                parameter.grad = self._star.buffer.views[name].to(parameter.device, copy=True)
            self.optimizer.step()
            self._star.buffer.pack(self._parameters)
        self._star.broadcast_down()
        if not self._topology.is_coordinator:
            self._star.buffer.unpack(self._parameters)


class Averaged:
    """Local steps; every `every` steps all copies become the average of the blocks' parameters.

    With outer_lr or outer_momentum, the coordinator moves the common parameters towards the average
    by SGD with Nesterov momentum instead (DiLoCo, arXiv 2311.08105, Algorithm 1, outer step).
    """

    def __init__(
        self,
        topology: Topology,
        shared: nn.Module,
        optimizer: Optimizer | None,
        every: int,
        outer_lr: float = 1.0,
        outer_momentum: float = 0.0,
    ) -> None:
        """optimizer: of this rank's copy; None on a dedicated coordinator."""
        assert (optimizer is not None) == (topology.block is not None)
        self.optimizer = optimizer
        self.every = every
        self._topology = topology
        self._parameters = dict(shared.named_parameters())
        self._star = _Star(topology, self._parameters)
        self.anchor: dict[str, Tensor] = {}
        """On the coordinator: the common parameters after the last average."""
        self.outer: torch.optim.SGD | None = None
        if topology.is_coordinator:
            self.anchor = {n: p.detach().clone() for n, p in sorted(self._parameters.items())}
            if outer_lr != 1 or outer_momentum != 0:
                for tensor in self.anchor.values():
                    tensor.requires_grad_()
                self.outer = torch.optim.SGD(
                    self.anchor.values(),
                    lr=outer_lr,
                    momentum=outer_momentum,
                    nesterov=outer_momentum > 0,
                )

    @property
    def wait_s(self) -> float:
        return self._star.wait_s

    def begin(self) -> None:
        """Gradients do not travel."""

    def finish(self, step: int) -> None:
        if self.optimizer is not None:
            self.optimizer.step()
        if step % self.every == 0:
            self._average()

    def _average(self) -> None:
        if self._topology.is_leader:
            self._star.buffer.pack(self._parameters)
        self._star.send_up()
        if self._topology.is_coordinator:
            self._star.mean()
            if self.outer is None:
                self._star.buffer.unpack(self.anchor)
            else:
                for name, tensor in self.anchor.items():
                    tensor.grad = tensor.detach() - self._star.buffer.views[name].to(tensor.device)
                self.outer.step()
                self._star.buffer.pack(self.anchor)
        self._star.broadcast_down()
        self._star.buffer.unpack(self._parameters)


SharedSync = Private | Coordinated | Averaged
