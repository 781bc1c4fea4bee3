"""No process: states are empty, there are no levels, the network sees only the condition."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dbdist.errors import ConfigError
from dbdist.processes.base import Network
from dbdist.processes.options import DirectOptions
from dbdist.processes.partition import Steps


@dataclass(frozen=True)
class Direct:
    """What end-to-end controls train with: one block, one step, nothing to undo."""

    partition = None
    draws_in_steps = False

    @classmethod
    def of(cls, options: DirectOptions | None = None, num_blocks: int = 1) -> "Direct":
        if num_blocks > 1:
            raise ConfigError(
                f"noise.name: direct has no noise levels that {num_blocks} blocks could share; "
                "use noise.name: gaussian, or mode: end_to_end"
            )
        return cls()

    def steps(self, sampler: Any = None, num_steps: int = 1) -> Steps:
        return Steps((0.0,), (0,))

    def draw(self, size: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> None:
        return None

    def corrupt(self, z0: Tensor, level_N: Tensor | None, draw: Tensor | None) -> Tensor:
        return z0

    def denoise(self, network: Network, z: Tensor, level_N: Tensor | None) -> Tensor:
        output = network(z, None, lambda raw: raw)
        return output.to(torch.promote_types(output.dtype, torch.float32))

    def weight(self, level_N: Tensor | None) -> None:
        return None

    def start(
        self,
        size: tuple[int, ...],
        kind: Literal["mean", "noise"],
        level: float,
        generator: torch.Generator,
        dtype: torch.dtype,
    ) -> Tensor:
        return torch.zeros(size, dtype=dtype)

    def step(
        self, z: Tensor, denoised: Tensor, level: float, next_level: float, draw: Tensor | None
    ) -> Tensor:
        return z

    def describe(self) -> dict[str, Any]:
        return {"name": "direct"}
