"""Memory for modules that were built on the meta device."""

import torch
from torch import Tensor, nn


def to_empty(module: nn.Module, device: torch.device) -> None:
    """Gives all parameters and buffers uninitialised memory on the device; ties stay.

    `nn.Module.to_empty` unties, and from the meta device it imports sympy, which takes seconds.
    """
    made: dict[Tensor, Tensor] = {}
    for owner in module.modules():
        parameters = owner.named_parameters(recurse=False, remove_duplicate=False)
        buffers = owner.named_buffers(recurse=False, remove_duplicate=False)
        for name, tensor in [*parameters, *buffers]:
            if tensor not in made:
                made[tensor] = _empty_like(tensor, device)
            setattr(owner, name, made[tensor])


def _empty_like(tensor: Tensor, device: torch.device) -> Tensor:
    shape, strides = tensor.size(), tensor.stride()
    empty = torch.empty_strided(shape, strides, dtype=tensor.dtype, device=device)
    is_parameter = isinstance(tensor, nn.Parameter)
    return nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
