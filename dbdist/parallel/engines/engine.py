"""Data parallelism inside a block: its copies share each batch, by DDP, FSDP2 or DeepSpeed ZeRO.

An engine wraps one block and owns its optimizer. Whatever it splits among the copies, it takes and
gives whole tensors by parameter name, so checkpoints know nothing of it, and it never touches a
rank outside the block. Shared modules stay outside the engines: `SharedGradients` averages theirs.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from dbdist.errors import ConfigError
from dbdist.parallel.flat import FlatBuffer
from dbdist.parallel.meter import Meter
from dbdist.parallel.optimizer_state import State
from dbdist.parallel.topology import Topology

BuildOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]


@runtime_checkable
class Engine(Protocol):
    """A block among its replicas. All but `part` are collective among them."""

    module: nn.Module
    """What is called in the forward pass in place of the block."""
    is_whole: bool
    """Whether every copy has all weights of the block."""

    @property
    def optimizer(self) -> Optimizer: ...

    @property
    def num_optimized(self) -> int:
        """Elements whose optimizer state lies on this rank."""
        ...

    def accumulate(self, is_last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward of a part of a batch: gradients travel with the last part."""
        ...

    def backward(self, loss: Tensor) -> None: ...

    def zero_grad(self) -> None: ...

    def grad_norm(self) -> Tensor:
        """Euclidean norm of the block's averaged gradient, once the last part is done."""
        ...

    def step(self, scale: Tensor) -> None:
        """The optimizer's step, with the gradients times scale."""
        ...

    def skip(self) -> None:
        """In place of `step`: drops the gradients, and changes neither weights nor optimizer."""
        ...

    def part(self, parameter: nn.Parameter) -> Tensor:
        """The part of a parameter that lies on this rank, sharing its memory."""
        ...

    def whole(self, parameter: nn.Parameter, part: Tensor) -> Tensor:
        """All ranks' parts of something shaped like this parameter, joined."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """The block's parameters, whole."""
        ...

    def set_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Takes whole tensors by name, of all parameters, the same on every replica."""
        ...

    def optimizer_state(self) -> State:
        """Whole tensors."""
        ...

    def set_optimizer_state(self, state: State) -> None:
        """The inverse of `optimizer_state`."""
        ...


class SharedGradients:
    """The shared modules' gradients, averaged over the copies of this rank's block."""

    def __init__(self, topology: Topology, parameters: Mapping[str, nn.Parameter]) -> None:
        self._group, self._size = topology.replica_group, topology.layout.num_replicas
        self._parameters, self._meter = parameters, topology.meter
        if self._group is not None:
            self._buffer = FlatBuffer(parameters, topology.wire_device)

    def average(self) -> None:
        """Once a step, when this rank's gradients are complete."""
        if self._group is None:
            return
        self._buffer.pack({name: p.grad for name, p in self._parameters.items()})
        dist.all_reduce(self._buffer.data, group=self._group)
        self._buffer.data /= self._size
        for parameter in self._parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
        self._buffer.unpack({n: p.grad for n, p in self._parameters.items() if p.grad is not None})
        moved = 2 * (self._size - 1) * self._buffer.num_bytes // self._size
        self._meter.sent["replica"] += moved
        self._meter.received["replica"] += moved


def clip(
    engine: Engine, shared: Iterable[nn.Parameter], max_norm: float | None
) -> tuple[Tensor, Tensor]:
    """(norm, scale): the global gradient norm over a block and its local shared modules, whose
    gradients are scaled here; the block's are to be scaled in its step. Stays inside the block."""
    shared_gradients = [p.grad for p in shared if p.grad is not None]
    block_norm = engine.grad_norm()
    norm = torch.linalg.vector_norm(
        torch.stack([block_norm, nn.utils.get_total_norm(shared_gradients).to(block_norm)])
    )
    scale = torch.clamp((max_norm or math.inf) / (norm + 1e-6), max=1.0)
    scale = torch.where(norm.isfinite(), scale, 1.0)  # what is not finite is looked at, not applied
    torch._foreach_mul_(shared_gradients, scale)
    return norm, scale


def check_engine(engine: str, topology: Topology) -> None:
    """Raises ConfigError where an engine cannot work on these devices."""
    if engine != "ddp" and topology.device.type == "cuda" and not topology.uses_nccl:
        if topology.world_size > 1:
            raise ConfigError(
                f"parallel.replica_engine {engine} needs a GPU of its own for every rank (NCCL); "
                "start fewer ranks, or use ddp, whose ranks may share a GPU"
            )


class Traffic:
    """Bytes that the copies of a block exchange in a pass, as a ring moves them."""

    def __init__(self, topology: Topology, block: nn.Module, passes: int) -> None:
        size = topology.layout.num_replicas
        total = sum(p.numel() * p.element_size() for p in block.parameters())
        self._meter: Meter = topology.meter
        self._num_bytes = passes * (size - 1) * total // size

    def count(self) -> None:
        self._meter.sent["replica"] += self._num_bytes
        self._meter.received["replica"] += self._num_bytes


def gradients(module: nn.Module) -> list[Tensor]:
    """Of the parameters that have one."""
    return [p.grad for p in module.parameters() if p.grad is not None]
