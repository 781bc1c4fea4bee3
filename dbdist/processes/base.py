"""What a process is: how a clean state is corrupted, and how the sampler undoes it.

Pure functions of tensors; knows nothing of models, tasks or ranks.
"""

from collections.abc import Callable
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from dbdist.processes.partition import Partition, Steps

Combine = Callable[[Tensor], Tensor]
"""Raw network output F -> denoised state D, by the process's preconditioning."""
Network = Callable[[Tensor, Tensor | None, Combine], Tensor]
"""(scaled state, what the network is told of the level, combine) -> the head's output."""


@runtime_checkable
class Process(Protocol):
    """How a clean state is corrupted, by a level, and how a sampler undoes that step by step.

    States have any trailing shape and type, samples first. `level_N` is None for a process without
    levels.
    """

    @property
    def partition(self) -> Partition | None:
        """The levels and how blocks share them; None without levels."""
        ...

    @property
    def draws_in_steps(self) -> bool:
        """Whether `step` needs random numbers."""
        ...

    @classmethod
    def of(cls, options: Any, num_blocks: int) -> "Process":
        """The process with these options. Raises ConfigError."""
        ...

    def steps(self, sampler: Any, num_steps: int) -> Steps:
        """The sampler's levels and the block that takes each. Raises ConfigError."""
        ...

    def draw(
        self, size: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype
    ) -> Tensor | None:
        """The random numbers that corrupt a batch, on the CPU; None if there are none."""
        ...

    def corrupt(self, z0: Tensor, level_N: Tensor | None, draw: Tensor | None) -> Tensor:
        """The state at these levels."""
        ...

    def denoise(self, network: Network, z: Tensor, level_N: Tensor | None) -> Tensor:
        """The head's output for states at these levels."""
        ...

    def weight(self, level_N: Tensor | None) -> Tensor | None:
        """Weight of each sample that makes every level count the same; None without levels."""
        ...

    def start(
        self,
        size: tuple[int, ...],
        kind: Literal["mean", "noise"],
        level: float,
        generator: torch.Generator,
        dtype: torch.dtype,
    ) -> Tensor:
        """First states of the sampler at its highest level: their mean, or drawn."""
        ...

    def step(
        self, z: Tensor, denoised: Tensor, level: float, next_level: float, draw: Tensor | None
    ) -> Tensor:
        """The state at the next level, given the denoised state at this one."""
        ...

    def describe(self) -> dict[str, Any]:
        """What makes two processes one, for manifests."""
        ...


@runtime_checkable
class SecondOrder(Protocol):
    """A process whose steps can be corrected by a second evaluation."""

    def corrected(
        self,
        z: Tensor,
        denoised: Tensor,
        next_z: Tensor,
        next_denoised: Tensor,
        level: float,
        next_level: float,
    ) -> Tensor:
        """The state at the next level, by the mean of the slopes at both ends of a step.

        next_z: what `step` made of z. next_denoised: the clean state there, at the next level.
        """
        ...


def per_sample(values_N: Float[Tensor, " n"], like: Tensor) -> Tensor:
    """One value a sample, shaped to multiply a state of any trailing shape."""
    return values_N.reshape(-1, *[1] * (like.ndim - 1))
