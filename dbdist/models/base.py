"""What a model is: shared modules and layers of one architecture, first empty, then filled.

Knows nothing of noise, tasks or ranks. Modules are made on the meta device; `materialise` gives
them memory and values, one tensor at a time, and ties again what was tied.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dbdist.models.empty import to_empty
from dbdist.processes.base import Combine
from dbdist.tensors import fill_all

M = TypeVar("M", bound=nn.Module)


@runtime_checkable
class Shared(Protocol):
    """What the shared modules of an architecture can do; an nn.Module."""

    def embed(self, condition: Any, z: Tensor, level_N: Tensor | None) -> tuple[Tensor, Any]:
        """(tokens, context) of scaled states z. The context goes to every layer unchanged.

        level_N: what the process tells the network of the level; None without levels.
        """
        ...

    def output(self, tokens: Tensor, combine: Combine, context: Any) -> Tensor:
        """The head's output. combine: raw output F -> denoised state D."""
        ...


@runtime_checkable
class Model(Protocol):
    """An architecture with its sizes."""

    def build_shared(self) -> nn.Module:
        """Everything that is not in a block: a `Shared`. Called on the meta device."""
        ...

    def build_layer(self, index: int) -> nn.Module:
        """A layer: (tokens, context) -> tokens. Called on the meta device."""
        ...

    def weights(self, module: nn.Module, seed: int) -> Iterable[tuple[str, Tensor]]:
        """(name, value) of every parameter and buffer of shared modules or a block, one at a time.

        Initial or pretrained; a function of the seed and the name alone. Aliases of a tied tensor
        are left out.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """What makes two models one, with `name`; manifests, agreement and merge compare it."""
        ...


class Block(nn.Module):
    """A group of consecutive layers, named by their index in the whole model."""

    def __init__(self, layers: Mapping[int, nn.Module], *, recompute: bool = False) -> None:
        """recompute: activation checkpointing."""
        super().__init__()
        self.layers = nn.ModuleDict({str(i): layer for i, layer in layers.items()})
        self.recompute = recompute

    def forward(self, tokens: Tensor, context: Any) -> Tensor:
        for layer in self.layers.values():
            if self.recompute and self.training:
                tokens = checkpoint(layer, tokens, context, use_reentrant=False)
            else:
                tokens = layer(tokens, context)
        return tokens


def build_block(model: Model, layers: Sequence[int], *, recompute: bool = False) -> Block:
    """A block of these layers on the meta device."""
    with torch.device("meta"):
        return Block({i: model.build_layer(i) for i in layers}, recompute=recompute)


def build_shared(model: Model) -> nn.Module:
    """The shared modules on the meta device."""
    with torch.device("meta"):
        return model.build_shared()


def materialise(
    module: M, device: torch.device, weights: Iterable[tuple[str, Tensor]] | None = None
) -> M:
    """Gives a module on the meta device memory and, if there are weights, values.

    Ties hold afterwards. Raises ValueError where a parameter or buffer gets no value.
    """
    to_empty(module, device)
    if weights is not None:
        fill_all(module, weights)
    return module


def count_parameters(module: nn.Module) -> int:
    """Elements of all parameters, tied ones once."""
    return sum(p.numel() for p in module.parameters())
