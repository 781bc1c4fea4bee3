"""Weights in safetensors files: read, checked against a module, and copied into it."""

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dbdist.errors import CheckpointError
from dbdist.tensors import named_tensors
from dbdist.whole_files import check_file

M = TypeVar("M", bound=nn.Module)


def load_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises CheckpointError for a missing or damaged one."""
    try:
        check_file(path)
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is damaged ({' '.join(str(error).split())[:300]}); restore it from a copy or "
            "use another checkpoint"
        ) from None


def fill(module: nn.Module, weights: Mapping[str, Tensor], source: Path) -> None:
    """Copies weights into the module's parameters and buffers by name.

    Raises CheckpointError where they do not fit.
    """
    own = named_tensors(module)
    check_weights(own, weights, source)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(weights[name])


def in_precision_of(weights: Mapping[str, Tensor], module: M) -> M:
    """Returns the module in the precision of these weights, if both have one.

    That is float64 for weights of a run that computed in it. A module of several dtypes keeps them.
    """
    own, given = (
        {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
        for tensors in (named_tensors(module), weights)
    )
    return module.to(given.pop()) if len(own) == len(given) == 1 else module


def check_weights(own: Mapping[str, Tensor], weights: Mapping[str, Tensor], source: Path) -> None:
    """Raises CheckpointError where names, shapes or kinds of numbers are not the module's.

    Kinds are floating-point or not.
    """
    for problem, names in (
        ("lacks", own.keys() - weights.keys()),
        ("has a foreign", weights.keys() - own.keys()),
    ):
        if names:
            name = " ".join(min(names)[:100].split())
            raise CheckpointError(f"{source} {problem} tensor {name}: it belongs to another model")
    for name, tensor in own.items():
        value = weights[name]
        if tensor.is_floating_point() and not value.is_floating_point():
            raise CheckpointError(
                f"{source}: {name} is {value.dtype}; weights are floating-point numbers"
            )
        if not tensor.is_floating_point() and value.dtype != tensor.dtype:
            raise CheckpointError(
                f"{source}: {name} is {value.dtype}, the model needs {tensor.dtype}"
            )
        if tensor.shape != value.shape:
            raise CheckpointError(
                f"{source}: {name} has shape {list(value.shape)}, the model needs "
                f"{list(tensor.shape)}"
            )
