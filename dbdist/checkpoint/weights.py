"""Weights in safetensors files: read, checked against a module, and copied into it."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dbdist.errors import CheckpointError
from dbdist.whole_files import check_file


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
    """Copies weights into the module by name. Raises CheckpointError where they do not fit."""
    check_weights({name: p.shape for name, p in module.named_parameters()}, weights, source)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(weights[name])


def check_weights(
    own: Mapping[str, torch.Size], weights: Mapping[str, Tensor], source: Path
) -> None:
    """Raises CheckpointError where names or shapes differ from a module's own, or a tensor does not
    hold floating-point numbers."""
    for problem, names in (
        ("lacks", own.keys() - weights.keys()),
        ("has a foreign", weights.keys() - own.keys()),
    ):
        if names:
            name = " ".join(min(names)[:100].split())
            raise CheckpointError(f"{source} {problem} tensor {name}: it belongs to another model")
    for name, shape in own.items():
        if not weights[name].is_floating_point():
            raise CheckpointError(
                f"{source}: {name} is {weights[name].dtype}; weights are floating-point numbers"
            )
        if shape != weights[name].shape:
            raise CheckpointError(
                f"{source}: {name} has shape {list(weights[name].shape)}, the model needs "
                f"{list(shape)}"
            )
