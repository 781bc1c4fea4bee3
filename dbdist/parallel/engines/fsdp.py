"""FSDP2 inside a block: weights, gradients and optimizer state are split among the block's copies.

A module of its own, imported where it is used: torch's distributed tensors take half a second.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from dbdist.parallel.engines.engine import BuildOptimizer, Traffic, gradients
from dbdist.parallel.optimizer_state import State, load_state, state_of
from dbdist.parallel.topology import Topology


class Fsdp:
    """A block split layer by layer; a layer is whole only while it computes. See `replicas.Engine`.
    Source: FSDP2, torch.distributed.fsdp.fully_shard."""

    is_whole = False

    def __init__(self, block: nn.Module, topology: Topology, build_optimizer: BuildOptimizer):
        """block: on the meta device, so that it is never whole on any rank; empty afterwards."""
        mesh = DeviceMesh.from_group(topology.own_group(), topology.device.type)
        for layer in block.get_submodule("layers").children():
            fully_shard(layer, mesh=mesh)
        fully_shard(block, mesh=mesh)
        block.to_empty(device=topology.device)
        assert isinstance(block, FSDPModule)
        self.module: nn.Module = block
        self._fsdp = block
        self._parameters: dict[str, DTensor] = {
            name: p for name, p in block.named_parameters() if isinstance(p, DTensor)
        }
        self.optimizer = build_optimizer(block.parameters())
        self.num_optimized = sum(_local(p).numel() for p in block.parameters())
        # Two all-gathers of the weights and a reduce-scatter of the gradients.
        self._traffic = Traffic(topology, block, passes=3)

    @contextmanager
    def accumulate(self, is_last: bool) -> Iterator[None]:
        self._fsdp.set_requires_gradient_sync(is_last)
        self._traffic.count()
        yield

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def grad_norm(self) -> Tensor:
        return _whole(nn.utils.get_total_norm(gradients(self.module)))

    def step(self, scale: Tensor) -> None:
        torch._foreach_mul_([_local(g) for g in gradients(self.module)], scale)
        self.optimizer.step()

    def skip(self) -> None:
        self.optimizer.zero_grad()

    def part(self, parameter: nn.Parameter) -> Tensor:
        return _local(parameter.detach())

    def whole(self, parameter: nn.Parameter, part: Tensor) -> Tensor:
        assert isinstance(parameter, DTensor)
        return DTensor.from_local(
            part,
            parameter.device_mesh,
            parameter.placements,
            shape=parameter.shape,
            stride=parameter.stride(),
        ).full_tensor()

    def weights(self) -> dict[str, Tensor]:
        return {name: _whole(p.detach()) for name, p in self._parameters.items()}

    @torch.no_grad()
    def set_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        for name, value in weights:
            parameter = self._parameters[name]
            _local(parameter).copy_(_local(_split_like(parameter, value)))

    def optimizer_state(self) -> State:
        split = state_of(self.optimizer, self._parameters)
        return {name: {k: _whole(t) for k, t in own.items()} for name, own in split.items()}

    def set_optimizer_state(self, state: State) -> None:
        split = {
            name: {
                kind: _split_like(p, tensor) if tensor.shape == p.shape else tensor
                for kind, tensor in state[name].items()
            }
            for name, p in self._parameters.items()
            if name in state
        }
        load_state(self.optimizer, self._parameters, split)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _split_like(parameter: DTensor, value: Tensor) -> DTensor:
    """This rank's part of a whole tensor; nothing travels."""
    value = value.to(parameter.device, parameter.dtype)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
