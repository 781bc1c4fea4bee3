"""The shared modules' optimizer: who steps it, and what travels for that.

`begin()` is called when a step's shared gradients are final (accumulated, averaged over the block's
replicas, clipped); the block's optimizer then steps; `finish()` returns when this rank's shared
copy is up to date. `Config.shared` names the way: `Coordinated`, `Sharded`, `Averaged`, or `Local`
for private copies, and wherever one block has the shared modules for itself. A coordinator's sums
run in block order, so the result has the same bits wherever it sits.
"""

import time
from collections.abc import Callable, Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from dbdist.config.options import ParallelConfig
from dbdist.parallel.flat import FlatBuffer
from dbdist.parallel.optimizer_state import State, load_state
from dbdist.parallel.topology import Topology


class Local:
    """This rank steps its copy, and no other block needs it."""

    wait_s = 0.0
    """Seconds spent waiting for other ranks since the start."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer: Optimizer | None = optimizer

    def begin(self) -> None:
        """Nothing travels."""

    def finish(self, step: int, is_skipped: bool = False) -> None:
        """step: steps of the block taken so far, this one included. is_skipped: this block takes no
        part in this one."""
        assert self.optimizer is not None
        if not is_skipped:
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

    def finish(self, step: int, is_skipped: bool = False) -> None:
        """is_skipped: without effect, as a skipped step's gradients are zeros by now."""
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
        options: ParallelConfig,
    ) -> None:
        """optimizer: of this rank's copy; None on a dedicated coordinator."""
        assert (optimizer is not None) == (topology.block is not None)
        self.optimizer = optimizer
        self.every = options.sync_every
        self._topology = topology
        self._parameters = dict(shared.named_parameters())
        self._star = _Star(topology, self._parameters)
        self.anchor: dict[str, Tensor] = {}
        """On the coordinator: the common parameters after the last average."""
        self.outer: torch.optim.SGD | None = None
        if topology.is_coordinator:
            self.anchor = {n: p.detach().clone() for n, p in sorted(self._parameters.items())}
            if has_outer_step(options):
                for tensor in self.anchor.values():
                    tensor.requires_grad_()
                self.outer = torch.optim.SGD(
                    self.anchor.values(),
                    lr=options.outer_lr,
                    momentum=options.outer_momentum,
                    nesterov=options.outer_momentum > 0,
                )

    @property
    def wait_s(self) -> float:
        return self._star.wait_s

    def begin(self) -> None:
        """Gradients do not travel."""

    def finish(self, step: int, is_skipped: bool = False) -> None:
        if self.optimizer is not None and not is_skipped:
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


def has_outer_step(options: ParallelConfig) -> bool:
    """Whether `Averaged` moves by SGD towards the average, in place of taking it."""
    return (options.outer_lr, options.outer_momentum) != (1, 0)


class Sharded:
    """As `Coordinated`, with the optimizer split over all ranks: gradients are reduce-scattered,
    each rank steps its part of the parameters laid end to end, and the parts are gathered. The same
    numbers, to rounding: AdamW works element by element. Source: ZeRO (1910.02054), stage 1."""

    def __init__(
        self,
        topology: Topology,
        shared: nn.Module,
        build_optimizer: Callable[[list[nn.Parameter]], Optimizer],
    ) -> None:
        self.wait_s = 0.0
        self._topology = topology
        self._parameters = dict(shared.named_parameters())
        parts = topology.world_size
        self._buffer = FlatBuffer(self._parameters, topology.wire_device, multiple_of=parts)
        self._buffer.check_equal_on_all_ranks(topology, "shared modules")
        self._received = torch.empty_like(self._own(self._buffer))
        self._part = nn.Parameter(self._received.to(topology.device, copy=True))
        self.optimizer: Optimizer = build_optimizer([self._part])
        self.take_over()
        self._pending: dist.Work | None = None

    @torch.no_grad()
    def take_over(self) -> None:
        """Makes the parameters, which have come from elsewhere, the ones that are stepped."""
        self._buffer.pack(self._parameters)
        self._part.copy_(self._own(self._buffer))

    def begin(self) -> None:
        self._buffer.pack({name: p.grad for name, p in self._parameters.items()})
        if self._topology.world_size == 1:
            self._received.copy_(self._buffer.data)
        else:
            self._pending = dist.reduce_scatter_tensor(
                self._received, self._buffer.data, async_op=True
            )
            self._count()

    def finish(self, step: int, is_skipped: bool = False) -> None:
        self._wait()
        self._received /= self._topology.world_size
        self._part.grad = self._received.to(self._topology.device, copy=True)
        self.optimizer.step()
        part = self._part.detach().to(self._buffer.data.device)
        self._gather(part, self._buffer)
        self._count()
        self._buffer.unpack(self._parameters)

    def optimizer_state(self) -> State:
        """Of the whole parameters, by name. Collective."""
        own = self.optimizer.state.get(self._part, {})
        state: dict[str, dict[str, Tensor]] = {name: {} for name in self._parameters if own}
        for kind, tensor in own.items():
            whole: dict[str, Tensor] = {}
            if tensor.shape == self._part.shape:
                buffer = FlatBuffer(
                    self._parameters, self._buffer.data.device, self._topology.world_size
                )
                self._gather(tensor.to(buffer.data.device), buffer)
                whole = buffer.views
            for name in state:
                state[name][kind] = whole[name] if whole else tensor
        return state

    def set_optimizer_state(self, state: State) -> None:
        """The inverse of `optimizer_state`; nothing travels."""
        own: dict[str, Tensor] = {}
        kinds: Iterable[str] = next(iter(state.values()), {})
        for kind in kinds:
            tensors = {name: of_parameter[kind] for name, of_parameter in state.items()}
            own[kind] = next(iter(tensors.values()))
            if kind != "step":
                buffer = FlatBuffer(
                    self._parameters, torch.device("cpu"), self._topology.world_size
                )
                buffer.pack(tensors)
                own[kind] = self._own(buffer)
        if own:
            load_state(self.optimizer, {"part": self._part}, {"part": own})

    def _own(self, buffer: FlatBuffer) -> Tensor:
        """This rank's part of a buffer."""
        return buffer.data.chunk(self._topology.world_size)[self._topology.rank]

    def _gather(self, part: Tensor, buffer: FlatBuffer) -> None:
        if self._topology.world_size == 1:
            buffer.data.copy_(part)
            return
        self._pending = dist.all_gather_into_tensor(buffer.data, part, async_op=True)
        self._wait()

    def _count(self) -> None:
        moved = self._buffer.num_bytes - self._received.nbytes
        self._topology.meter.sent["shared"] += moved
        self._topology.meter.received["shared"] += moved

    def _wait(self) -> None:
        start = time.perf_counter()
        if self._pending is not None:
            self._pending.wait()
            self._pending = None
        self.wait_s += time.perf_counter() - start


SharedSync = Local | Coordinated | Averaged | Sharded
