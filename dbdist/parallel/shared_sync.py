"""The shared modules' optimizer: who steps it, and what travels for that.

A step has three calls:
1. `begin()`, when its shared gradients are final (accumulated, averaged over the block's replicas,
   clipped): they leave. The block's optimizer steps meanwhile.
2. `step()`: the shared optimizer steps, and its result leaves for the other ranks.
3. `finish()`, before anything reads the shared modules or clears their gradients: the result is
   there. The next batch is loaded meanwhile.

`Config.shared` names the way: `Coordinated`, `Sharded`, `Averaged`, or `Local` for private copies,
and wherever one block has the shared modules for itself. A coordinator's sums run in block order,
so the result has the same bits wherever it sits.
"""

import time

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from dbdist.config.config import Config
from dbdist.config.options import ParallelConfig
from dbdist.parallel.flat import FlatBuffer
from dbdist.parallel.layout import Layout
from dbdist.parallel.sharded_sync import Sharded
from dbdist.parallel.shared_tensors import SharedTensors
from dbdist.parallel.topology import Topology
from dbdist.tensors import buffers_of


class Local:
    """This rank steps its copy, and no other block needs it."""

    wait_s = 0.0
    """Seconds spent waiting for other ranks since the start."""

    def __init__(self, optimizer: Optimizer | None) -> None:
        """optimizer: None where nothing is trained."""
        self.optimizer = optimizer

    def begin(self) -> None:
        """Nothing travels."""

    def step(self, step: int, is_skipped: bool = False) -> None:
        """Takes a step of the shared modules.

        step: steps of the block taken so far, this one included. is_skipped: this block contributes
        nothing to this one.
        """
        if self.optimizer is not None and not is_skipped:
            self.optimizer.step()

    def finish(self) -> None:
        """Nothing has travelled."""


class _Star:
    """Block leaders send a flat buffer to the coordinator, which broadcasts one to every rank."""

    def __init__(self, topology: Topology, up: FlatBuffer, down: FlatBuffer) -> None:
        """up: what is averaged over blocks. down: what the coordinator gives to all."""
        self.topology, self.up, self.down = topology, up, down
        self.wait_s = 0.0
        self._rows: list[Tensor] = []
        """On the coordinator: of every block; block 0's is the buffer itself."""
        if topology.is_coordinator:
            others = [torch.empty_like(up.wire) for _ in range(1, topology.layout.num_blocks)]
            self._rows = [up.wire, *others]
        self._pending: list[dist.Work] = []
        self._is_landing = False

    def send_up(self) -> None:
        """Starts moving every leader's buffer to the coordinator."""
        layout, meter = self.topology.layout, self.topology.meter
        if self.topology.is_leader:
            self.up.lift()
        if self.topology.is_coordinator:
            for block, row in enumerate(self._rows):
                leader = layout.rank_of(block, 0)
                if leader != self.topology.rank:
                    self._start(dist.irecv(row, src=leader, group=self.topology.p2p_group))
                    meter.received["shared"] += row.nbytes
        elif self.topology.is_leader:
            self._start(dist.isend(self.up.wire, dst=0, group=self.topology.p2p_group))
            meter.sent["shared"] += self.up.num_bytes

    def mean(self, keep_equal: bool = False) -> None:
        """Leaves the mean of the leaders' buffers in the coordinator's, summed in block order.

        keep_equal: numbers that are the same in all blocks keep their bits.
        """
        self.wait()
        total, *others = [self.up.split(row) for row in self._rows]
        for i, segment in enumerate(total):
            rows = [other[i] for other in others]
            before = segment.clone() if keep_equal else segment
            for row in rows:
                segment += row
            segment /= 1 + len(rows)
            if keep_equal and rows:
                is_equal = torch.stack([row == before for row in rows]).all(0)
                segment.copy_(torch.where(is_equal, before, segment))
        self.up.land()

    def start_down(self) -> None:
        """Starts giving every rank the coordinator's buffer."""
        topology, meter = self.topology, self.topology.meter
        if topology.is_coordinator:
            self.down.lift()
        if topology.world_size > 1:
            self._start(dist.broadcast(self.down.wire, src=0, async_op=True))
            self._is_landing = not topology.is_coordinator
        way = meter.sent if topology.is_coordinator else meter.received
        receivers = topology.world_size - 1 if topology.is_coordinator else 1
        way["shared"] += self.down.num_bytes * receivers

    def wait(self) -> None:
        """Ends when everything that was started has left or arrived."""
        start = time.perf_counter()
        for work in self._pending:
            work.wait()
        self._pending.clear()
        if self._is_landing:
            self.down.land()
            self._is_landing = False
        self.wait_s += time.perf_counter() - start

    def _start(self, work: dist.Work | None) -> None:
        assert work is not None
        self._pending.append(work)


class Coordinated:
    """Averages shared gradients over blocks in every step; the coordinator takes the only step.

    All copies then become its parameters.
    """

    def __init__(
        self, topology: Topology, shared: SharedTensors, optimizer: Optimizer | None
    ) -> None:
        """optimizer: of the shared parameters, on the coordinator alone."""
        assert (optimizer is not None) == topology.is_coordinator
        self.optimizer = optimizer
        shared.values.check_equal_on_all_ranks(topology, "shared modules")
        self._star = _Star(topology, shared.gradients, shared.values)

    @property
    def wait_s(self) -> float:
        return self._star.wait_s

    def begin(self) -> None:
        self._star.send_up()

    def step(self, step: int, is_skipped: bool = False) -> None:
        """is_skipped: without effect, as a skipped step's gradients are zeros by now."""
        if self.optimizer is not None:
            self._star.mean()
            self.optimizer.step()
        self._star.start_down()

    def finish(self) -> None:
        self._star.wait()


class Averaged:
    """Local steps; every `sync_every` steps all copies become the average of the blocks'.

    With outer_lr or outer_momentum, the coordinator moves the common parameters towards the average
    by SGD with Nesterov momentum instead (DiLoCo, arXiv 2311.08105, Algorithm 1, outer step).
    Floating-point buffers become the blocks' average.
    """

    def __init__(
        self,
        topology: Topology,
        shared: SharedTensors,
        optimizer: Optimizer | None,
        options: ParallelConfig,
    ) -> None:
        """optimizer: of this rank's copy; None on a dedicated coordinator."""
        self.optimizer = optimizer
        self.every = options.sync_every
        self._topology, self._shared = topology, shared
        shared.values.check_equal_on_all_ranks(topology, "shared modules")
        self._star = _Star(topology, shared.values, shared.values)
        self._buffer_star: _Star | None = None
        if buffers := self._buffers():
            flat = FlatBuffer(buffers, topology.wire_device)
            flat.check_equal_on_all_ranks(topology, "shared modules")
            self._buffer_star = _Star(topology, flat, flat)
        self.anchor: dict[str, Tensor] = {}
        """On the coordinator: the common parameters and buffers after the last average."""
        self.outer: torch.optim.SGD | None = None
        if topology.is_coordinator:
            tensors = {**shared.parameters, **buffers}
            self.anchor = {n: t.detach().clone() for n, t in sorted(tensors.items())}
            if has_outer_step(options) and shared.parameters:
                self.outer = torch.optim.SGD(
                    [self.anchor[name].requires_grad_() for name in sorted(shared.parameters)],
                    lr=options.outer_lr,
                    momentum=options.outer_momentum,
                    nesterov=options.outer_momentum > 0,
                )

    @property
    def wait_s(self) -> float:
        return self._star.wait_s + (self._buffer_star.wait_s if self._buffer_star else 0.0)

    def begin(self) -> None:
        """Gradients do not travel."""

    def step(self, step: int, is_skipped: bool = False) -> None:
        if self.optimizer is not None and not is_skipped:
            self.optimizer.step()
        if step % self.every == 0:
            self._average()

    def finish(self) -> None:
        """An average has arrived when `step` returns: it is rare."""

    def take_over(self) -> None:
        """Makes the coordinator's parameters and buffers, just read, the common ones."""
        own = {**self._shared.parameters, **self._buffers()}
        with torch.no_grad():
            for name, tensor in self.anchor.items():
                tensor.copy_(own[name])

    def _buffers(self) -> dict[str, Tensor]:
        buffers = buffers_of(self._shared.module)
        return {name: buffer for name, buffer in buffers.items() if buffer.is_floating_point()}

    @torch.no_grad()
    def _average(self) -> None:
        values, buffers = self._shared.values, self._buffers()
        self._star.send_up()
        if self._topology.is_coordinator:
            self._star.mean()
            if self.outer is not None:
                for name, view in values.views.items():
                    self.anchor[name].grad = self.anchor[name] - view
                self.outer.step()
                values.pack(self.anchor)
        self._star.start_down()
        self._star.wait()
        if star := self._buffer_star:
            star.up.pack(buffers)
            star.send_up()
            if self._topology.is_coordinator:
                star.mean(keep_equal=True)
            star.start_down()
            star.wait()
            star.down.unpack(buffers)
        self.take_over()


def has_outer_step(options: ParallelConfig) -> bool:
    """Whether `Averaged` moves by SGD towards the average, in place of taking it."""
    return (options.outer_lr, options.outer_momentum) != (1, 0)


SharedSync = Local | Coordinated | Averaged | Sharded


def copies_held(config: Config, layout: Layout, rank: int) -> float:
    """Returns how many numbers a rank holds for each trained parameter of the shared modules.

    These are weights, gradients, averaged weights, and what steps them: AdamW has two moments.
    """
    has_block, has_average = layout.place_of(rank) is not None, config.train.ema_decay > 0
    if config.shared == "sharded":  # of moments, and of gradients summed over ranks, a shard
        return 2 + has_average + 3 / layout.world_size
    if config.shared == "coordinated" and layout.needs_coordinator:
        return 2.0 + has_average + 2 * (rank == 0)
    held = 2.0 + has_block * (2 + has_average)
    if config.shared == "averaged" and rank == 0:  # the average, and the outer step's own
        p = config.parallel
        held += 1 + has_outer_step(p) + (p.outer_momentum > 0)
    return held
