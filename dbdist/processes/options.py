"""Options of the processes. No torch here: a configuration is read and checked without it."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from dbdist.config.options import ProcessOptions, Ranges, SamplerOptions
from dbdist.config.ranges import FRACTION, POSITIVE, Range
from dbdist.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class GaussianOptions(ProcessOptions):
    """The distribution of noise levels, ln sigma ~ N(p_mean, p_std^2), and its partition."""

    RANGES: ClassVar[Ranges] = {
        "p_mean": Range(),
        "p_std": POSITIVE,
        "sigma_min": POSITIVE,
        "sigma_max": POSITIVE,
        "sigma_data": POSITIVE,
        "overlap": FRACTION,
    }

    name: str = "gaussian"
    """Process: Gaussian noise of standard deviation sigma is added."""
    p_mean: float = -1.2
    """Mean of ln sigma. The published value is -1.2; a task may have another default."""
    p_std: float = 1.2
    """Standard deviation of ln sigma; > 0."""
    sigma_min: float = 0.002
    """Lowest noise level, in units of the data; > 0."""
    sigma_max: float = 80.0
    """Highest noise level, in units of the data."""
    sigma_data: float = 0.5
    """Standard deviation of the clean target that the preconditioning assumes; > 0."""
    overlap: float = 0.05
    """Widening of each block's range on both sides, as a fraction of its log-length (the paper's
    gamma)."""
    partition: Literal["equal_probability", "uniform"] = "equal_probability"
    """Blocks share the noise distribution in equal parts of probability, or of ln sigma."""

    def check(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise ConfigError(
                f"noise.sigma_min {self.sigma_min} and noise.sigma_max {self.sigma_max}: "
                "they must satisfy 0 < sigma_min < sigma_max"
            )


@dataclass(frozen=True, kw_only=True)
class GaussianSamplerOptions(SamplerOptions):
    """How the chain of blocks takes the noise away."""

    sigma_start: float | None = None
    """Noise level of the first evaluation, inside block 0's range; null: noise.sigma_max."""

    @property
    def start_level(self) -> float | None:
        return self.sigma_start


@dataclass(frozen=True, kw_only=True)
class DirectOptions(ProcessOptions):
    """No process: the network sees the condition alone, as end-to-end controls do."""

    name: str = "direct"
    """Process: none; nothing is corrupted."""
