"""Noise levels: their distribution, its partition among blocks, EDM preconditioning and the
sampler's grid.

Pure functions of numbers and tensors; knows nothing of models or processes. Everything is computed
in float64. Sources: DiffusionBlocks (arXiv 2506.14202) section 3; EDM (arXiv 2206.00364) Table 1.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dbdist.errors import ConfigError

Partition = Literal["equal_probability", "uniform"]


class Preconditioning(NamedTuple):
    """EDM's four coefficients, each of sigma's shape."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor


@dataclass(frozen=True)
class NoiseSchedule:
    """ln sigma ~ N(p_mean, p_std^2) truncated to [sigma_min, sigma_max], cut into `num_blocks`
    ranges.

    Block 0 owns the highest noise. A *level* in [0, 1] is a position between sigma_min (0) and
    sigma_max (1) in the coordinate that the partition cuts evenly: probability mass for
    `equal_probability`, ln sigma for `uniform`. sigma and sigma_data are in units of the data.
    Raises ConfigError for bounds that leave nothing to sample.
    """

    num_blocks: int
    p_mean: float = -1.2
    p_std: float = 1.2
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5
    overlap: float = 0.05
    partition: Partition = "equal_probability"

    def __post_init__(self) -> None:
        if self.num_blocks < 1:
            raise ConfigError(f"model.num_blocks is {self.num_blocks}; it must be at least 1")
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise ConfigError(
                f"noise.sigma_min {self.sigma_min} and noise.sigma_max {self.sigma_max}: "
                "they must satisfy 0 < sigma_min < sigma_max"
            )
        for key in ("p_std", "sigma_data"):
            if not 0 < getattr(self, key) < math.inf:
                raise ConfigError(f"noise.{key} is {getattr(self, key)}; it must be greater than 0")
        if not 0 <= self.overlap <= 1:
            raise ConfigError(f"noise.overlap is {self.overlap}; it must lie between 0 and 1")
        if self.partition not in ("equal_probability", "uniform"):
            raise ConfigError(
                f"noise.partition is {self.partition!r}; "
                "it must be 'equal_probability' or 'uniform'"
            )
        if not bool((self.boundaries[1:] > self.boundaries[:-1]).all()):
            raise ConfigError(
                f"noise.p_mean {self.p_mean} and noise.p_std {self.p_std} leave no probability "
                f"for some of the {self.num_blocks} blocks between sigma {self.sigma_min} and "
                f"{self.sigma_max}; move p_mean into that range or widen p_std"
            )

    @property
    def boundaries(self) -> Float[Tensor, " edges"]:
        """Ascending edges; block b lies between entries B-1-b and B-b. Paper, section 3.2."""
        return self.sigma_at(
            torch.arange(self.num_blocks + 1, dtype=torch.float64) / self.num_blocks
        )

    def block_range(self, block: int) -> tuple[float, float]:
        """(low, high) of the sigmas a block trains on: its own range, widened by `overlap` times
        its log-length on both sides and clamped to [sigma_min, sigma_max]. Paper, section 3.3
        (gamma)."""
        if not 0 <= block < self.num_blocks:
            raise ValueError(f"block {block} is not one of 0..{self.num_blocks - 1}")
        edges = self.boundaries.tolist()
        low, high = edges[self.num_blocks - 1 - block], edges[self.num_blocks - block]
        widening = (high / low) ** self.overlap
        return max(low / widening, self.sigma_min), min(high * widening, self.sigma_max)

    def sample_sigma(
        self, block: int, n: int, generator: torch.Generator | None = None
    ) -> Float[Tensor, " n"]:
        """n noise levels for training this block, uniform in CDF inside its widened range;
        float64."""
        low, high = self.block_range(block)
        uniform = torch.rand(n, generator=generator, dtype=torch.float64)
        return self._between(low, high, uniform).clamp(low, high)

    def grid(self, num_steps: int, sigma_start: float | None = None) -> Float[Tensor, " steps"]:
        """The sampler's levels, descending at equal level steps from `sigma_start` (sigma_max when
        not given) to sigma_min. A single step evaluates at the start. EDM, Algorithm 1; DESIGN
        section 2."""
        return self.sigma_at(self._grid_levels(num_steps, sigma_start))

    def block_of_step(self, num_steps: int, sigma_start: float | None = None) -> list[int]:
        """The block that owns each grid point; one that lies exactly on a boundary belongs to the
        lower-noise block. Raises ConfigError when a block would be left out."""
        levels = self._grid_levels(num_steps, sigma_start)
        # A boundary is a level i/B. Rounding must not decide its side, so 1e-9 of a block counts as
        # on it.
        from_top = torch.floor((1 - levels) * self.num_blocks + 1e-9).long()
        blocks: list[int] = from_top.clamp(0, self.num_blocks - 1).tolist()
        if missing := sorted(set(range(self.num_blocks)) - set(blocks)):
            raise ConfigError(
                f"sampler.num_steps {num_steps} from sigma {sigma_start or self.sigma_max:g} "
                "never runs "
                f"block {missing[0]}; use at least {self.num_blocks} steps and a sigma_start above "
                f"{self.boundaries[-2].item():.4g}, the lower edge of block 0"
            )
        return blocks

    def preconditioning(self, sigma: Float[Tensor, "*n"]) -> Preconditioning:
        """c_skip, c_out, c_in, c_noise of D(z) = c_skip z + c_out F(c_in z, c_noise). EDM, Table
        1."""
        s, sd = sigma.double(), self.sigma_data
        norm = torch.hypot(s, torch.full_like(s, sd))
        coefficients = ((sd / norm) ** 2, s * sd / norm, 1 / norm, s.log() / 4)
        return Preconditioning(*(c.to(sigma.dtype) for c in coefficients))

    def weight(self, sigma: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """(sigma^2 + sd^2) / (sigma sd)^2, so that weight * c_out^2 = 1. EDM, Table 1,
        lambda(sigma)."""
        s, sd = sigma.double(), self.sigma_data
        return ((s**2 + sd**2) / (s * sd) ** 2).to(sigma.dtype)

    def level_of(self, sigma: float) -> float:
        """Where sigma lies between sigma_min (0) and sigma_max (1); the inverse of `sigma_at`."""
        if self.partition == "uniform":
            log_low, log_high = math.log(self.sigma_min), math.log(self.sigma_max)
            return (math.log(sigma) - log_low) / (log_high - log_low)
        low, x, high = (
            self._standard(self.sigma_min),
            self._standard(sigma),
            self._standard(self.sigma_max),
        )
        return _mass(low, x) / _mass(low, high)

    def sigma_at(self, level: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """The sigma at each level in [0, 1]; exact at both ends."""
        level = level.double()
        if self.partition == "uniform":
            sigma = self.sigma_min * (self.sigma_max / self.sigma_min) ** level
        else:
            sigma = self._between(self.sigma_min, self.sigma_max, level)
        sigma = torch.where(level <= 0, self.sigma_min, sigma)
        return torch.where(level >= 1, self.sigma_max, sigma)

    def _grid_levels(self, num_steps: int, sigma_start: float | None) -> Tensor:
        if num_steps < 1:
            raise ConfigError(f"sampler.num_steps is {num_steps}; it must be at least 1")
        top = 1.0
        if sigma_start is not None:
            if not self.sigma_min < sigma_start <= self.sigma_max:
                raise ConfigError(
                    f"sampler.sigma_start is {sigma_start:g}; it must lie above noise.sigma_min "
                    f"{self.sigma_min:g} and not above noise.sigma_max {self.sigma_max:g}"
                )
            top = self.level_of(sigma_start)
        remaining = torch.arange(num_steps - 1, -1, -1, dtype=torch.float64)
        return top * remaining / (num_steps - 1) if num_steps > 1 else torch.tensor([top]).double()

    def _between(self, low: float, high: float, fraction: Tensor) -> Tensor:
        """The sigma below which lies this fraction of the probability between low and high."""
        a, b = self._standard(low), self._standard(high)
        # Both tails are interpolated and the smaller one inverted: 1 - 1e-17 has no float64, 1e-17
        # has.
        lower = _tail(-a) + (_tail(-b) - _tail(-a)) * fraction
        upper = _tail(a) + (_tail(b) - _tail(a)) * fraction
        x = torch.where(lower < 0.5, torch.special.ndtri(lower), -torch.special.ndtri(upper))
        return torch.exp(self.p_mean + self.p_std * x)

    def _standard(self, sigma: float) -> float:
        return (math.log(sigma) - self.p_mean) / self.p_std


def _tail(x: float) -> float:
    """P(x < X) for standard normal X; erfc keeps tails that 1 + erf (torch.special.ndtr) rounds
    away."""
    return 0.5 * math.erfc(x / math.sqrt(2))


def _mass(a: float, b: float) -> float:
    """P(a < X < b) for standard normal X, without cancellation in either tail."""
    return _tail(a) - _tail(b) if a > 0 else _tail(-b) - _tail(-a)
