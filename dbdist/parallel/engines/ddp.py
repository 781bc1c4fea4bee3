"""Every copy of a block holds it whole: one copy alone, or several by DDP."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dbdist.parallel.engines.engine import BuildOptimizer, Traffic, gradients
from dbdist.parallel.optimizer_state import State, load_state, state_of
from dbdist.parallel.topology import Topology


class Whole:
    """Every copy has the whole block: one copy alone, or several by DDP. Copies start alike because
    weights depend on the seed alone."""

    is_whole = True

    def __init__(self, block: nn.Module, topology: Topology, build_optimizer: BuildOptimizer):
        self.module: nn.Module = block
        self._block = block
        self._ddp: DistributedDataParallel | None = None
        if topology.replica_group is not None:
            self._ddp = DistributedDataParallel(
                block,
                device_ids=[topology.device] if topology.device.type == "cuda" else None,
                process_group=topology.replica_group,
                init_sync=False,
            )
            self.module = self._ddp
        self.optimizer = build_optimizer(block.parameters())
        self.num_optimized = sum(p.numel() for p in block.parameters())
        self._traffic = Traffic(topology, block, passes=2)  # reduce-scatter and all-gather

    def accumulate(self, is_last: bool) -> AbstractContextManager[Any]:
        if self._ddp is not None and not is_last:
            return self._ddp.no_sync()
        self._traffic.count()
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def grad_norm(self) -> Tensor:
        return nn.utils.get_total_norm(gradients(self._block))

    def step(self, scale: Tensor) -> None:
        torch._foreach_mul_(gradients(self._block), scale)
        self.optimizer.step()

    def skip(self) -> None:
        self.optimizer.zero_grad()

    def part(self, parameter: nn.Parameter) -> Tensor:
        return parameter.detach()

    def whole(self, parameter: nn.Parameter, part: Tensor) -> Tensor:
        return part

    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self._block.named_parameters()}

    @torch.no_grad()
    def set_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        for name, value in weights:
            self._block.get_parameter(name).copy_(value)

    def optimizer_state(self) -> State:
        return state_of(self.optimizer, dict(self._block.named_parameters()))

    def set_optimizer_state(self, state: State) -> None:
        load_state(self.optimizer, dict(self._block.named_parameters()), state)
