"""The levels of a process, how blocks share them, and the grid that a sampler takes.

Computed in float64. Source: DiffusionBlocks (arXiv 2506.14202) section 3.
"""

# What torch and jsonargparse leave untyped:
# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false, reportUnknownVariableType=false

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from dbdist.errors import ConfigError


@dataclass(frozen=True)
class Steps:
    """The levels of a sampler, most corrupted first, and the block that takes each."""

    levels: tuple[float, ...]
    owners: tuple[int, ...]

    def of(self, block: int) -> list[int]:
        """Indices of the steps that this block takes."""
        return [i for i, owner in enumerate(self.owners) if owner == block]


class Partition(ABC):
    """Levels cut into `num_blocks` ranges; block 0 owns the most corrupted ones.

    A *fraction* in [0, 1] is a position between the lowest level (0) and the highest (1) in the
    coordinate that the partition cuts evenly.
    """

    num_blocks: int
    level_name: str
    """What a level is called in messages and records."""
    is_log: bool
    """Whether levels are shown on a logarithmic axis."""

    @property
    @abstractmethod
    def lowest(self) -> float:
        """The least corrupted level."""

    @property
    @abstractmethod
    def highest(self) -> float:
        """The most corrupted level."""

    @abstractmethod
    def level_at(self, fraction: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """The level at each fraction; exact at both ends."""

    @abstractmethod
    def fraction_of(self, level: float) -> float:
        """The inverse of `level_at`."""

    @abstractmethod
    def widened(self, low: float, high: float) -> tuple[float, float]:
        """A block's range with its overlap, inside [lowest, highest]."""

    @abstractmethod
    def sample_level(
        self, block: int, n: int, generator: torch.Generator | None = None
    ) -> Float[Tensor, " n"]:
        """n levels for training this block, inside its widened range; float64."""

    @property
    def boundaries(self) -> Float[Tensor, " edges"]:
        """Ascending edges; block b lies between entries B-1-b and B-b. Paper, section 3.2."""
        edges = torch.arange(self.num_blocks + 1, dtype=torch.float64) / self.num_blocks
        return self.level_at(edges)

    def own_range(self, block: int) -> tuple[float, float]:
        """(low, high) of the levels that a block owns."""
        if not 0 <= block < self.num_blocks:
            raise ValueError(f"block {block} is not one of 0..{self.num_blocks - 1}")
        edges = self.boundaries.tolist()
        return edges[self.num_blocks - 1 - block], edges[self.num_blocks - block]

    def block_range(self, block: int) -> tuple[float, float]:
        """(low, high) of the levels that a block trains on. Paper, section 3.3 (gamma)."""
        return self.widened(*self.own_range(block))

    def steps(
        self,
        num_steps: int,
        start: float | None = None,
        grid: Literal["partition", "rho"] = "partition",
        rho: float = 7.0,
    ) -> Steps:
        """The sampler's levels from `start` (the highest if None) to the lowest, and their owners.

        partition: equal steps of the fraction. rho: equal steps of level^(1/rho), EDM (2206.00364)
        equation 5. A level on a boundary belongs to the less corrupted block. Raises ConfigError
        where a block would have no step.
        """
        fractions = self._fractions(num_steps, start)
        if grid == "rho" and num_steps > 1:
            ends = (start or self.highest) ** (1 / rho), self.lowest ** (1 / rho)
            levels = torch.linspace(*ends, num_steps, dtype=torch.float64) ** rho
            fractions = torch.tensor([self.fraction_of(x) for x in levels.tolist()]).double()
        else:
            levels = self.level_at(fractions)
        # Rounding must not decide a boundary's side, so 1e-9 of a block counts as on it.
        from_top = torch.floor((1 - fractions) * self.num_blocks + 1e-9).long()
        owners: list[int] = from_top.clamp(0, self.num_blocks - 1).tolist()
        if missing := sorted(set(range(self.num_blocks)) - set(owners)):
            raise ConfigError(
                f"sampler.num_steps {num_steps} from {self.level_name} "
                f"{start or self.highest:g} never runs block {missing[0]}; use at least "
                f"{self.num_blocks} steps and a {self.level_name}_start above "
                f"{self.boundaries[-2].item():.4g}, the lower edge of block 0"
            )
        return Steps(tuple(levels.tolist()), tuple(owners))

    def levels(self, num_steps: int, start: float | None = None) -> tuple[float, ...]:
        """The levels of the partition's grid, whoever takes them."""
        return tuple(self.level_at(self._fractions(num_steps, start)).tolist())

    def _fractions(self, num_steps: int, start: float | None) -> Tensor:
        if num_steps < 1:
            raise ConfigError(f"sampler.num_steps is {num_steps}; it must be at least 1")
        top = 1.0
        if start is not None:
            if not self.lowest < start <= self.highest:
                name = self.level_name
                raise ConfigError(
                    f"sampler.{name}_start is {start:g}; it must lie above noise.{name}_min "
                    f"{self.lowest:g} and not above noise.{name}_max {self.highest:g}"
                )
            top = self.fraction_of(start)
        if num_steps == 1:
            return torch.tensor([top], dtype=torch.float64)
        remaining = torch.arange(num_steps - 1, -1, -1, dtype=torch.float64)
        return top * remaining / (num_steps - 1)
