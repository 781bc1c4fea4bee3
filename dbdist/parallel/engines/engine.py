"""Data parallelism inside a block: its copies share each batch.

They do so by DDP, FSDP2 or DeepSpeed ZeRO. An engine wraps one block and owns its optimizer.
Whatever it splits among the copies, it takes and gives whole tensors by name, so checkpoints know
nothing of it, and it never touches a rank outside the block. Frozen parameters and buffers are
stored as all others, and have no optimizer state. Shared modules stay outside the engines:
`SharedTensors` has theirs.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dbdist.errors import ConfigError
from dbdist.parallel.engines.split import Split
from dbdist.parallel.meter import Meter
from dbdist.parallel.optimizer_state import State
from dbdist.parallel.shared_tensors import SharedTensors
from dbdist.parallel.topology import Topology
from dbdist.tensors import Named, trained_of

BuildOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]


@runtime_checkable
class Engine(Protocol):
    """A block among its replicas. All but `shard` are collective among them."""

    module: nn.Module
    """What is called in the forward pass in place of the block."""
    split: Split
    """What each copy has only a shard of."""

    @property
    def optimizer(self) -> Optimizer: ...

    @property
    def num_stepped_bytes(self) -> int:
        """Of the weights whose optimizer state lies on this rank."""
        ...

    def accumulate(self, is_last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward of some rows of a batch: gradients travel with the last."""
        ...

    def backward(self, loss: Tensor) -> None: ...

    def zero_grad(self) -> None: ...

    def grad_norm(self) -> Tensor:
        """Euclidean norm of the block's averaged gradient, once the last rows are done."""
        ...

    def step(self, scale: Tensor) -> None:
        """The optimizer's step, with the gradients times scale."""
        ...

    def skip(self) -> None:
        """In place of `step`: drops the gradients, and changes neither weights nor optimizer."""
        ...

    def shard(self, parameter: nn.Parameter) -> Tensor:
        """The shard of a parameter that lies on this rank, sharing its memory."""
        ...

    def whole(self, parameter: nn.Parameter, shard: Tensor) -> Tensor:
        """All ranks' shards of something shaped like this parameter, joined."""
        ...

    def cut(self, parameter: nn.Parameter, whole: Tensor) -> Tensor:
        """The inverse of `whole`: this rank's shard. Nothing travels."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """The block's parameters and buffers, whole."""
        ...

    def set_weights(self, weights: Named) -> None:
        """Takes whole tensors by name, the same on every replica.

        Raises ValueError unless every parameter and every buffer gets one.
        """
        ...

    def optimizer_state(self) -> State:
        """Whole tensors, of the parameters that are trained."""
        ...

    def set_optimizer_state(self, state: State) -> None:
        """The inverse of `optimizer_state`."""
        ...


def clip(engine: Engine, shared: SharedTensors, max_norm: float | None) -> tuple[Tensor, Tensor]:
    """Returns the gradient norm over a block and its shared modules, and the factor to clip.

    The shared modules' gradients are scaled here; the block's are to be scaled in its step. Stays
    inside the block.
    """
    gradients = shared.gradients
    block_norm = engine.grad_norm()
    shared_norm = total_norm(list(gradients.views.values()) or gradients.segments)
    norm = torch.linalg.vector_norm(torch.stack([block_norm, shared_norm.to(block_norm)]))
    scale = torch.clamp((max_norm or math.inf) / (norm + 1e-6), max=1.0)
    scale = torch.where(norm.isfinite(), scale, 1.0)  # what is not finite is looked at, not applied
    torch._foreach_mul_(gradients.segments, scale)
    return norm, scale


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norm over all, which may have several dtypes; of short floats in float32."""
    norms: list[Tensor] = []
    for dtype in {tensor.dtype: None for tensor in tensors}:
        same = [tensor for tensor in tensors if tensor.dtype == dtype]
        if dtype.itemsize < 4:
            norms += [torch.linalg.vector_norm(tensor, dtype=torch.float32) for tensor in same]
        else:
            norms.append(nn.utils.get_total_norm(same))
    if len(norms) == 1:
        return norms[0]
    longest = max((norm.dtype for norm in norms), key=lambda d: d.itemsize, default=torch.float32)
    squares = [norm.to(longest).square() for norm in norms]
    return torch.stack(squares).sum().sqrt() if squares else torch.zeros(())


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

    def __init__(self, topology: Topology, block: nn.Module, split: Split) -> None:
        size = topology.layout.num_replicas
        weights, trained = num_bytes(block.parameters()), num_bytes(trained_of(block).values())
        self._meter: Meter = topology.meter
        self._num_bytes = split.wire_values(weights, trained) * (size - 1) // size

    def count(self) -> None:
        self._meter.sent["replica"] += self._num_bytes
        self._meter.received["replica"] += self._num_bytes


def num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def gradients(module: nn.Module) -> list[Tensor]:
    """Lists the gradients of the parameters that have one."""
    return [p.grad for p in module.parameters() if p.grad is not None]
