"""Vision transformers for tests: initial weights, or random ones that are nowhere zero."""

from typing import Any

import torch
from torch import nn

from dbdist.models.base import Block, build_block, build_shared, materialise
from dbdist.models.vit import ViT, ViTConfig

CPU = torch.device("cpu")


def shared_of(sizes: ViTConfig, seed: int | None = 0, *, is_plain: bool = False) -> Any:
    """Shared modules on the CPU; without a seed they are empty."""
    model = ViT(sizes, is_plain)
    module = build_shared(model)
    return materialise(module, CPU, None if seed is None else model.weights(module, seed))


def block_of(
    sizes: ViTConfig,
    layers: range,
    seed: int | None = 0,
    *,
    is_plain: bool = False,
    recompute: bool = False,
) -> Block:
    """A block of these layers on the CPU; without a seed it is empty."""
    model = ViT(sizes, is_plain)
    module = build_block(model, layers, recompute=recompute)
    return materialise(module, CPU, None if seed is None else model.weights(module, seed))


@torch.no_grad()
def randomize(module: nn.Module, seed: int = 0) -> Any:
    """Draws every parameter; nothing stays zero by initialisation."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.normal_(0, 0.3, generator=generator)
    return module
