"""Where a block's levels fall and what it lost there: batches in, JSON out; no files."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dbdist.monitor.levels import Levels


@dataclass(eq=False)
class LevelHistogram:
    """How often a block trained each level, and sums of what the task recorded of samples there.

    Bins are even along the axis that shows the levels, and hold their lower edge; what lies outside
    [low, high] counts in the outermost ones.
    """

    level: str
    block: int
    low: float
    high: float
    is_log: bool = True
    num_bins: int = 32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    counts: Tensor = field(init=False, repr=False)
    sums: dict[str, Tensor] = field(init=False, repr=False)
    """By the task's name of what is summed."""

    def __post_init__(self) -> None:
        assert self.low < self.high, (self.low, self.high)
        low, high = (math.log(v) if self.is_log else v for v in (self.low, self.high))
        edges = torch.linspace(low, high, self.num_bins + 1, dtype=torch.float64)
        edges = edges.exp() if self.is_log else edges
        self._inner_edges = edges[1:-1].to(self.device)
        self.reset()

    @classmethod
    def of(cls, levels: Levels, block: int, device: torch.device) -> "LevelHistogram":
        """An empty one for the levels that a block trains on."""
        low, high = levels.ranges[block]
        return cls(levels.name, block, low, high, levels.is_log, device=device)

    def reset(self) -> None:
        self.counts, self.sums = self._zeros(), {}

    def add(self, level_N: Float[Tensor, " n"], per_sample: Mapping[str, Tensor]) -> None:
        """Counts a batch; stays on the device, so nothing waits. per_sample: (n,) by name."""
        bin_N = torch.bucketize(level_N.detach().double(), self._inner_edges, right=True)
        self.counts.scatter_add_(0, bin_N, torch.ones_like(bin_N, dtype=torch.float64))
        for name, value_N in per_sample.items():
            sums = self.sums.setdefault(name, self._zeros())
            sums.scatter_add_(0, bin_N, value_N.detach().double())

    def to_dict(self) -> dict[str, Any]:
        """For JSON, and for `figures.histogram_figure`."""
        keys = ("level", "block", "low", "high", "is_log")
        return {key: getattr(self, key) for key in keys} | {
            "counts": self.counts.tolist(),
            "sums": {name: sums.tolist() for name, sums in self.sums.items()},
        }

    def _zeros(self) -> Tensor:
        return torch.zeros(self.num_bins, dtype=torch.float64, device=self.device)
