"""Every copy of a block holds it whole: one copy without others, or several by DDP."""

import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dbdist.parallel.engines import split
from dbdist.parallel.engines.engine import BuildOptimizer, Traffic, gradients, num_bytes, total_norm
from dbdist.parallel.optimizer_state import State, load_state, state_of
from dbdist.parallel.topology import Topology
from dbdist.tensors import Named, fill_all, named_tensors, trained_of


class Ddp:
    """Every copy has the whole block. Copies start equal because weights depend on the seed."""

    split = split.DDP

    def __init__(self, block: nn.Module, topology: Topology, build_optimizer: BuildOptimizer):
        self.module: nn.Module = block
        self._block = block
        self._ddp: DistributedDataParallel | None = None
        if topology.replica_group is not None:
            with warnings.catch_warnings():  # torch 2.15: of a name that older ones do not have
                warnings.simplefilter("ignore", FutureWarning)
                self._ddp = DistributedDataParallel(
                    block,
                    device_ids=[topology.device] if topology.device.type == "cuda" else None,
                    process_group=topology.replica_group,
                    init_sync=False,
                    broadcast_buffers=False,  # every engine leaves it to `RankState.share_buffers`
                )
            self.module = self._ddp
        self._trained = trained_of(block)
        self.optimizer = build_optimizer(self._trained.values())
        self.num_stepped_bytes = num_bytes(self._trained.values())
        self._traffic = Traffic(topology, block, self.split)

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
        return total_norm(gradients(self._block))

    def step(self, scale: Tensor) -> None:
        torch._foreach_mul_(gradients(self._block), scale)
        self.optimizer.step()

    def skip(self) -> None:
        self.optimizer.zero_grad()

    def shard(self, parameter: nn.Parameter) -> Tensor:
        return parameter.detach()

    def whole(self, parameter: nn.Parameter, shard: Tensor) -> Tensor:
        return shard

    def cut(self, parameter: nn.Parameter, whole: Tensor) -> Tensor:
        return whole

    def weights(self) -> dict[str, Tensor]:
        return named_tensors(self._block)

    def set_weights(self, weights: Named) -> None:
        fill_all(self._block, weights)

    def optimizer_state(self) -> State:
        return state_of(self.optimizer, self._trained)

    def set_optimizer_state(self, state: State) -> None:
        load_state(self.optimizer, self._trained, state)
