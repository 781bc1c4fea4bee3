"""A toy architecture: residual MLPs, with a buffer, a tied weight and a frozen parameter."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dbdist import seeds
from dbdist.config.options import ModelOptions
from dbdist.tensors import named_tensors


@dataclass(frozen=True, kw_only=True)
class PointsModelOptions(ModelOptions):
    """Sizes of the toy network."""

    name: str = "points_mlp"
    """Architecture: residual MLPs."""
    width: int = 16
    """Width of the one token."""


class PointsShared(nn.Module):
    """What embeds condition, state and level, and reads the state out."""

    frequencies: Tensor

    def __init__(self, width: int, num_inputs: int, num_outputs: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.empty(width // 2))
        self.embed_condition = nn.Linear(num_inputs, width)
        self.embed_state = nn.Linear(num_outputs, width)
        self.mix_in = nn.Linear(width, width)
        self.mix_out = nn.Linear(width, width)
        self.mix_out.weight = self.mix_in.weight
        self.normalize_in = nn.Linear(width, width)
        self.scale = nn.Parameter(torch.empty(()), requires_grad=False)
        self.head = nn.Linear(width, num_outputs)

    def embed(self, condition: Tensor, z: Tensor, level_N: Tensor) -> tuple[Tensor, Tensor]:
        angle = level_N[:, None] * self.frequencies
        level = torch.cat([angle.cos(), angle.sin()], dim=-1)
        token = self.embed_condition(condition) + self.embed_state(z)
        return self.normalize_in(self.mix_in(token).tanh()), level

    def output(self, tokens: Tensor, combine: Any, context: Tensor) -> Tensor:
        return combine(self.head(self.scale * self.mix_out(tokens).tanh()))


class PointsLayer(nn.Module):
    """A residual MLP that sees the level."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, 2 * width)
        self.outer = nn.Linear(2 * width, width)

    def forward(self, tokens: Tensor, context: Tensor) -> Tensor:
        return tokens + self.outer(self.inner(tokens + context).tanh())


@dataclass(frozen=True)
class PointsModel:
    """The toy architecture with its sizes. See `dbdist.models.base.Model`."""

    width: int
    num_inputs: int
    num_outputs: int

    @classmethod
    def of(cls, options: PointsModelOptions, spec: Any) -> "PointsModel":
        return cls(options.width, spec.num_inputs, spec.num_outputs)

    def build_shared(self) -> nn.Module:
        return PointsShared(self.width, self.num_inputs, self.num_outputs)

    def build_layer(self, index: int) -> nn.Module:
        return PointsLayer(self.width)

    def weights(self, module: nn.Module, seed: int) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in named_tensors(module).items():
            if name == "frequencies":
                yield name, 2.0 ** torch.arange(self.width // 2)
            elif name == "scale":
                yield name, torch.tensor(0.5)
            elif name.endswith("bias"):
                yield name, torch.zeros(tensor.shape)
            else:
                generator = seeds.generator(seed, "init", name)
                std = tensor.shape[-1] ** -0.5
                yield name, std * torch.randn(tensor.shape, generator=generator)

    def describe(self) -> dict[str, Any]:
        return {"name": "points_mlp", "width": self.width}
