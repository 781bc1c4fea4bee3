"""Where a block's noise levels fall and what its loss is there: batches in, JSON out; no files."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(eq=False)
class SigmaHistogram:
    """How often a block trained each sigma, and the cross-entropy there. Bins are even in ln sigma
    and hold their lower edge; what lies outside [low, high] counts in the outermost ones."""

    block: int
    low: float
    high: float
    num_bins: int = 32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    edges: Tensor = field(init=False, repr=False)
    counts: Tensor = field(init=False, repr=False)
    cross_entropy_sums: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        assert 0 < self.low < self.high, (self.low, self.high)
        ends = math.log(self.low), math.log(self.high)
        edges = torch.linspace(*ends, self.num_bins + 1, dtype=torch.float64).exp()
        self.edges = edges.to(self.device)
        self.reset()

    def reset(self) -> None:
        zeros = torch.zeros(2, self.num_bins, dtype=torch.float64, device=self.device)
        self.counts, self.cross_entropy_sums = zeros

    def add(self, sigma_N: Float[Tensor, " n"], cross_entropy_N: Float[Tensor, " n"]) -> None:
        """Count a batch; stays on the device, so nothing waits."""
        bin_N = torch.bucketize(sigma_N.detach().double(), self.edges[1:-1], right=True)
        cross_entropy_N = cross_entropy_N.detach().double()
        self.counts.scatter_add_(0, bin_N, torch.ones_like(cross_entropy_N))
        self.cross_entropy_sums.scatter_add_(0, bin_N, cross_entropy_N)

    def to_dict(self) -> dict[str, Any]:
        bins = {key: getattr(self, key).tolist() for key in ("counts", "cross_entropy_sums")}
        return {"block": self.block, "low": self.low, "high": self.high, **bins}

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> "SigmaHistogram":
        histogram = cls(state["block"], state["low"], state["high"], len(state["counts"]))
        for key in ("counts", "cross_entropy_sums"):
            setattr(histogram, key, torch.tensor(state[key], dtype=torch.float64))
        return histogram
