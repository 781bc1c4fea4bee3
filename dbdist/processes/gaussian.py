"""Noise levels: distribution, partition among blocks, EDM preconditioning, sampler's grid.

Pure functions of numbers and tensors; knows nothing of models, tasks or ranks. Levels and
coefficients are computed in float64. Sources: DiffusionBlocks (arXiv 2506.14202) section 3; EDM
(arXiv 2206.00364) Table 1.
"""

# What torch and jsonargparse leave untyped:
# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dbdist.errors import ConfigError
from dbdist.processes.base import Network, per_sample
from dbdist.processes.options import GaussianOptions, GaussianSamplerOptions
from dbdist.processes.partition import Partition, Steps


class Preconditioning(NamedTuple):
    """EDM's four coefficients, each of sigma's shape."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor


@dataclass(frozen=True)
class NoiseSchedule(Partition):
    """ln sigma ~ N(p_mean, p_std^2), truncated and cut into `num_blocks` ranges.

    The bounds are [sigma_min, sigma_max]. Block 0 owns the highest noise. A *fraction* in [0, 1] is
    a position between sigma_min (0) and sigma_max (1) in the coordinate that the partition cuts
    evenly: probability mass for `equal_probability`, ln sigma for `uniform`. sigma and sigma_data
    are in units of the data. Raises ConfigError for bounds that leave nothing to sample.
    """

    num_blocks: int
    p_mean: float = -1.2
    p_std: float = 1.2
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5
    overlap: float = 0.05
    partition: Literal["equal_probability", "uniform"] = "equal_probability"

    level_name = "sigma"
    is_log = True

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
    def lowest(self) -> float:
        return self.sigma_min

    @property
    def highest(self) -> float:
        return self.sigma_max

    def widened(self, low: float, high: float) -> tuple[float, float]:
        """The range widened by `overlap` times its log-length on both sides."""
        widening = (high / low) ** self.overlap
        return max(low / widening, self.sigma_min), min(high * widening, self.sigma_max)

    def sample_level(
        self, block: int, n: int, generator: torch.Generator | None = None
    ) -> Float[Tensor, " n"]:
        """n noise levels, uniform in CDF inside the block's widened range; float64."""
        low, high = self.block_range(block)
        uniform = torch.rand(n, generator=generator, dtype=torch.float64)
        return self._between(low, high, uniform).clamp(low, high)

    def preconditioning(self, sigma: Float[Tensor, "*n"]) -> Preconditioning:
        """The coefficients of D(z) = c_skip z + c_out F(c_in z, c_noise). EDM, Table 1."""
        s, sd = sigma.double(), self.sigma_data
        norm = torch.hypot(s, torch.full_like(s, sd))
        c_skip = (sd / norm) ** 2
        c_out = s * sd / norm
        c_in = 1 / norm
        c_noise = s.log() / 4
        return Preconditioning(*(c.to(sigma.dtype) for c in (c_skip, c_out, c_in, c_noise)))

    def weight(self, sigma: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """lambda(sigma) = (sigma^2 + sd^2) / (sigma sd)^2 = 1 / c_out^2. EDM, Table 1."""
        s, sd = sigma.double(), self.sigma_data
        return ((s**2 + sd**2) / (s * sd) ** 2).to(sigma.dtype)

    def fraction_of(self, level: float) -> float:
        if self.partition == "uniform":
            log_low, log_high = math.log(self.sigma_min), math.log(self.sigma_max)
            return (math.log(level) - log_low) / (log_high - log_low)
        low, x, high = (
            self._standard(self.sigma_min),
            self._standard(level),
            self._standard(self.sigma_max),
        )
        return _mass(low, x) / _mass(low, high)

    def level_at(self, fraction: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        fraction = fraction.double()
        if self.partition == "uniform":
            sigma = self.sigma_min * (self.sigma_max / self.sigma_min) ** fraction
        else:
            sigma = self._between(self.sigma_min, self.sigma_max, fraction)
        sigma = torch.where(fraction <= 0, self.sigma_min, sigma)
        return torch.where(fraction >= 1, self.sigma_max, sigma)

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


@dataclass(frozen=True)
class Gaussian:
    """z = z0 + sigma * noise; EDM's denoiser; Euler steps on the probability-flow ODE."""

    partition: NoiseSchedule
    draws_in_steps = False

    @classmethod
    def of(cls, options: GaussianOptions, num_blocks: int) -> "Gaussian":
        values = asdict(options)
        del values["name"]
        return cls(NoiseSchedule(num_blocks, **values))

    def steps(self, sampler: Any, num_steps: int) -> Steps:
        if not isinstance(sampler, GaussianSamplerOptions):
            raise ConfigError(
                "noise.name: gaussian adds noise to numbers, which this task does not denoise; "
                "leave noise.name out"
            )
        return self.partition.steps(num_steps, sampler.sigma_start, sampler.grid, sampler.rho)

    def draw(self, size: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        """Unit noise."""
        return torch.randn(size, generator=generator, dtype=dtype)

    def corrupt(self, z0: Tensor, level_N: Tensor | None, draw: Tensor | None) -> Tensor:
        assert level_N is not None
        assert draw is not None
        return z0 + per_sample(level_N.to(z0.dtype), z0) * draw

    def denoise(self, network: Network, z: Tensor, level_N: Tensor | None) -> Tensor:
        """EDM (2206.00364) equation 7; a head after D may turn it into something else."""
        assert level_N is not None
        c = self.partition.preconditioning(level_N.to(z.dtype))
        c_skip, c_out, c_in = (per_sample(x, z) for x in (c.c_skip, c.c_out, c.c_in))
        # Outside autocast's half precision: states stay in their own.
        output = network(c_in * z, c.c_noise, lambda raw: c_skip * z + c_out * raw.to(z.dtype))
        return output.to(z.dtype)

    def weight(self, level_N: Tensor | None) -> Tensor:
        assert level_N is not None
        return self.partition.weight(level_N)

    def start(
        self,
        size: tuple[int, ...],
        kind: Literal["mean", "noise"],
        level: float,
        generator: torch.Generator,
        dtype: torch.dtype,
    ) -> Tensor:
        """Zero, or N(0, 1 + sigma^2) as published: z0 is negligible beside sigma."""
        if kind == "mean":
            return torch.zeros(size, dtype=dtype)
        return math.sqrt(1 + level**2) * torch.randn(size, generator=generator, dtype=dtype)

    def step(
        self, z: Tensor, denoised: Tensor, level: float, next_level: float, draw: Tensor | None
    ) -> Tensor:
        """An Euler step on the probability-flow ODE. EDM (2206.00364), Algorithm 1."""
        return denoised + (next_level / level) * (z - denoised)

    def corrected(
        self,
        z: Tensor,
        denoised: Tensor,
        next_z: Tensor,
        next_denoised: Tensor,
        level: float,
        next_level: float,
    ) -> Tensor:
        """Heun's step, of second order. EDM (2206.00364), Algorithm 1, lines 7 and 8."""
        slopes = (z - denoised) / level + (next_z - next_denoised) / next_level
        return z + (next_level - level) / 2 * slopes

    def describe(self) -> dict[str, Any]:
        return {"name": "gaussian", **asdict(self.partition)}


def _tail(x: float) -> float:
    """P(x < X) for standard normal X.

    erfc keeps tails that 1 + erf (torch.special.ndtr) rounds away.
    """
    return 0.5 * math.erfc(x / math.sqrt(2))


def _mass(a: float, b: float) -> float:
    """P(a < X < b) for standard normal X, without cancellation in either tail."""
    return _tail(a) - _tail(b) if a > 0 else _tail(-b) - _tail(-a)
