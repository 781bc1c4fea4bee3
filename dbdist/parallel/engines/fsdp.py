"""FSDP2 inside a block: weights, gradients and optimizer state are split among its copies.

A module of its own, imported where it is used: torch's distributed tensors take half a second.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from dbdist.errors import ConfigError
from dbdist.parallel.engines import split
from dbdist.parallel.engines.engine import BuildOptimizer, Traffic, gradients, num_bytes, total_norm
from dbdist.parallel.optimizer_state import State, load_state, state_of
from dbdist.parallel.topology import Topology
from dbdist.tensors import Named, complete, named_tensors, tie, ties_of, trained_of


class Fsdp:
    """A block split layer by layer; a layer is whole only while it computes.

    See `engine.Engine`. Source: FSDP2, torch.distributed.fsdp.fully_shard. What it takes as one
    must be of one dtype: modules of another than most of their layer are split by themselves.
    """

    split = split.FSDP

    def __init__(self, block: nn.Module, topology: Topology, build_optimizer: BuildOptimizer):
        """block: on the meta device, so that it is never whole on any rank; empty afterwards."""
        mesh = DeviceMesh.from_group(topology.own_group(), topology.device.type)
        self._traffic = Traffic(topology, block, self.split)
        ties = ties_of(block)
        for module in _units(block, ties):
            fully_shard(module, mesh=mesh)
        block.to_empty(device=topology.device)
        tie(block, ties)
        assert isinstance(block, FSDPModule)
        self.module: nn.Module = block
        self._fsdp = block
        self._parameters: dict[str, DTensor] = {
            name: p for name, p in block.named_parameters() if isinstance(p, DTensor)
        }
        self._trained = trained_of(block)
        self.optimizer = build_optimizer(self._trained.values())
        self.num_stepped_bytes = num_bytes(_local(p) for p in self._trained.values())

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
        return _whole(total_norm(gradients(self.module)))

    def step(self, scale: Tensor) -> None:
        torch._foreach_mul_([_local(g) for g in gradients(self.module)], scale)
        self.optimizer.step()

    def skip(self) -> None:
        self.optimizer.zero_grad()

    def shard(self, parameter: nn.Parameter) -> Tensor:
        return _local(parameter.detach())

    def whole(self, parameter: nn.Parameter, shard: Tensor) -> Tensor:
        assert isinstance(parameter, DTensor)
        return DTensor.from_local(
            shard,
            parameter.device_mesh,
            parameter.placements,
            shape=parameter.shape,
            stride=parameter.stride(),
        ).full_tensor()

    def cut(self, parameter: nn.Parameter, whole: Tensor) -> Tensor:
        assert isinstance(parameter, DTensor)
        return _local(_split_like(parameter, whole))

    def weights(self) -> dict[str, Tensor]:
        return {name: _whole(tensor) for name, tensor in named_tensors(self._fsdp).items()}

    @torch.no_grad()
    def set_weights(self, weights: Named) -> None:
        own = named_tensors(self._fsdp)
        for name, value in complete(weights, own):
            if name in self._parameters:
                value = _split_like(self._parameters[name], value)
            _local(own[name]).copy_(_local(value))

    def optimizer_state(self) -> State:
        split = state_of(self.optimizer, self._trained)
        return {name: {k: _whole(t) for k, t in own.items()} for name, own in split.items()}

    def set_optimizer_state(self, state: State) -> None:
        shards = {
            name: {
                kind: _split_like(p, tensor) if tensor.shape == p.shape else tensor
                for kind, tensor in state[name].items()
            }
            for name, p in self._parameters.items()
            if name in state
        }
        load_state(self.optimizer, self._trained, shards)


def _units(block: nn.Module, ties: Mapping[str, str]) -> Iterator[nn.Module]:
    """The modules that FSDP2 takes as one, inner before outer; what they hold is split together.

    These are modules of another dtype than most of their layer, the layers, and the block with what
    is left: a layer that has a tensor in common with another stays in it.
    """
    tied = {*ties, *ties.values()}
    usual = Counter(p.dtype for p in block.parameters()).most_common(1)[0][0]
    for path, module in reversed(list(block.named_modules())):
        own = {f"{path}.{name}": p.dtype for name, p in module.named_parameters(recurse=False)}
        odd = next((name for name, dtype in own.items() if dtype != usual), None)
        if odd is None:
            continue
        if len({p.dtype for p in module.parameters()}) > 1 or tied & own.keys():
            raise ConfigError(
                f"parallel.replica_engine fsdp cannot split {odd}, which is {own[odd]} among "
                f"parameters of {usual}; give it a module of its own, or use ddp"
            )
        yield module
    in_layers = {name.split(".")[1] for name in tied if name.startswith("layers.")}
    for name, layer in block.get_submodule("layers").named_children():
        if name not in in_layers:
            yield layer
    yield block


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _split_like(parameter: DTensor, value: Tensor) -> DTensor:
    """This rank's shard of a whole tensor; nothing travels."""
    value = value.to(parameter.device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
