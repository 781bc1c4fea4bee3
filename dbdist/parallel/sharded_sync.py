"""The shared modules' optimizer, split over all ranks.

See `shared_sync` for the three calls.
"""

import time
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from dbdist.parallel.flat import FlatBuffer
from dbdist.parallel.optimizer_state import State, load_state
from dbdist.parallel.shared_tensors import SharedTensors
from dbdist.parallel.topology import Topology


class Sharded:
    """As `Coordinated`, with the optimizer split over all ranks.

    Gradients are reduce-scattered, each rank steps its shard of the parameters laid end to end, and
    the shards are gathered. The same numbers, to rounding: AdamW works element by element. Source:
    ZeRO (1910.02054), stage 1.
    """

    def __init__(
        self,
        topology: Topology,
        shared: SharedTensors,
        build_optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
    ) -> None:
        """shared: filled up to a multiple of the number of ranks."""
        self.wait_s = 0.0
        self._topology, self._shared = topology, shared
        shared.values.check_equal_on_all_ranks(topology, "shared modules")
        self._shards = {
            str(segment.dtype): nn.Parameter(self._own(segment))
            for segment in shared.values.segments
        }
        """This rank's shard of each dtype's parameters; shares their memory."""
        self._received = [
            torch.empty_like(self._own(segment))
            for segment in shared.gradients.split(shared.gradients.wire)
        ]
        self.optimizer: Optimizer = build_optimizer(self._shards.values())
        self._pending: list[dist.Work] = []
        self._is_landing = False

    def begin(self) -> None:
        gradients = self._shared.gradients
        gradients.lift()
        for received, whole in zip(self._received, gradients.split(gradients.wire), strict=True):
            if self._topology.world_size == 1:
                received.copy_(whole)
            else:
                self._start(dist.reduce_scatter_tensor(received, whole, async_op=True))
        self._count()

    def step(self, step: int, is_skipped: bool = False) -> None:
        """is_skipped: without effect, as a skipped step's gradients are zeros by now."""
        self._wait()
        for shard, received in zip(self._shards.values(), self._received, strict=True):
            received /= self._topology.world_size
            shard.grad = received.to(shard.device)
        self.optimizer.step()
        values = self._shared.values
        self._gather([shard.detach() for shard in self._shards.values()], values)
        self._is_landing = True
        self._count()

    def finish(self) -> None:
        self._wait()
        if self._is_landing:
            self._shared.values.land()
            self._is_landing = False

    def optimizer_state(self) -> State:
        """Of the whole parameters, by name. Collective."""
        parameters = self._shared.parameters
        shards = list(self._shards.values())
        own = [self.optimizer.state.get(shard, {}) for shard in shards]
        state: dict[str, dict[str, Tensor]] = {name: {} for name in parameters if own[0]}
        for kind in own[0]:
            whole: dict[str, Tensor] = {}
            if kind != "step":
                flat = FlatBuffer(
                    parameters, self._topology.wire_device, None, self._topology.world_size
                )
                self._gather([of_shard[kind] for of_shard in own], flat)
                self._wait()
                whole = flat.views
            for name in state:
                state[name][kind] = whole[name] if whole else own[0][kind]
        return state

    def set_optimizer_state(self, state: State) -> None:
        """The inverse of `optimizer_state`; nothing travels."""
        own: dict[str, dict[str, Tensor]] = {dtype: {} for dtype in self._shards}
        kinds: Iterable[str] = next(iter(state.values()), {})
        for kind in kinds:
            tensors = {name: of_parameter[kind] for name, of_parameter in state.items()}
            flat = FlatBuffer(
                self._shared.parameters, torch.device("cpu"), None, self._topology.world_size
            )
            if kind != "step":
                flat.pack(tensors)
            for of_shard, segment in zip(own.values(), flat.segments, strict=True):
                first = next(iter(tensors.values()))
                of_shard[kind] = first if kind == "step" else self._own(segment)
        if kinds:
            load_state(self.optimizer, self._shards, own)

    def _own(self, whole: Tensor) -> Tensor:
        """This rank's shard of a vector."""
        return whole.chunk(self._topology.world_size)[self._topology.rank]

    def _gather(self, shards: Iterable[Tensor], flat: FlatBuffer) -> None:
        """Starts joining all ranks' shards, of each dtype, on the wire side of a flat buffer."""
        for shard, whole in zip(shards, flat.split(flat.wire), strict=True):
            if self._topology.world_size == 1:
                whole.copy_(shard)
                continue
            shard = shard.to(whole.device, copy=True)  # it may be the same memory
            self._start(dist.all_gather_into_tensor(whole, shard, async_op=True))

    def _count(self) -> None:
        moved = self._shared.values.num_bytes * (self._topology.world_size - 1)
        moved //= self._topology.world_size
        self._topology.meter.sent["shared"] += moved
        self._topology.meter.received["shared"] += moved

    def _start(self, work: dist.Work | None) -> None:
        assert work is not None
        self._pending.append(work)

    def _wait(self) -> None:
        start = time.perf_counter()
        for work in self._pending:
            work.wait()
        self._pending.clear()
        self.wait_s += time.perf_counter() - start
