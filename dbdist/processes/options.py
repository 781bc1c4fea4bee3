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


@dataclass(frozen=True, kw_only=True)
class MaskingOptions(ProcessOptions):
    """How tokens are masked, and how blocks share the masked share t of a sequence."""

    RANGES: ClassVar[Ranges] = {
        "t_min": Range(low=0, is_low_open=True, high=1, is_high_open=True),
        "overlap": FRACTION,
        "bits": POSITIVE,
    }

    name: str = "masking"
    """Process: a share t of the tokens is replaced by [MASK]."""
    schedule: Literal["linear", "cosine"] = "linear"
    """Masked share at a time from 0 to 1, which blocks cut in equal parts and the sampler takes in
    equal steps: the time itself, or cos(pi / 2 (1 - time)). It does not change the loss."""
    t_min: float = 1e-4
    """Lowest masked share that is trained on, and where the sampler fills in what is left; between
    0 and 1. MD4's value."""
    overlap: float = 0.05
    """Widening of each block's range on both sides, as a fraction of its length in what the blocks
    share (the paper's gamma)."""
    bits: tuple[float, ...] | None = None
    """Measured bits in equal bands of t from t_min to 1, least masked first, such as bits_by_level
    in a run's evaluation.json: blocks get equal sums of them, not equal times. null: equal
    times."""

    def check(self) -> None:
        if self.bits is not None and not self.bits:
            raise ConfigError("noise.bits is an empty list; give the bits of each band, or null")
        if self.bits is not None and self.schedule != "linear":
            raise ConfigError(
                f"noise.bits and noise.schedule: {self.schedule} both say where blocks are cut; "
                "leave one out"
            )


@dataclass(frozen=True, kw_only=True)
class MaskingSamplerOptions(SamplerOptions):
    """How the chain of blocks fills in masked tokens. It starts with all of them masked."""

    num_steps: int | None = 128
    """Denoiser evaluations over the whole chain, at least num_blocks; null: 2 x num_blocks. Tokens
    filled in by the same step do not see each other, so few steps give worse text."""
    grid: Literal["partition"] = "partition"
    """Masked shares of the steps: equal steps of what the blocks share."""
    start: Literal["mean", "noise"] = "noise"
    """First state: all tokens masked, whichever is chosen."""

    def check(self) -> None:
        super().check()
        if self.num_draws > 1:
            raise ConfigError(
                f"sampler.num_draws is {self.num_draws}, but tokens have no average; use 1"
            )
