"""Masked diffusion of tokens: a share t of a sequence is masked, and filled in step by step.

States are token ids, [MASK] is -1; the network's output is log-probabilities of the tokens. Pure
functions of numbers and tensors; knows nothing of models, tasks or ranks. Levels and probabilities
are computed in float64. Sources: MD4 (arXiv 2406.04329) for the schedules and the sampler, MDLM
(arXiv 2406.07524) for what visible tokens give, DiffusionBlocks (arXiv 2506.14202) for the blocks.
"""

# What torch and jsonargparse leave untyped:
# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false, reportUnknownVariableType=false

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dbdist.errors import ConfigError
from dbdist.processes.base import Network
from dbdist.processes.options import MaskingOptions, MaskingSamplerOptions
from dbdist.processes.partition import Partition, Steps

MASK = -1
"""What stands in a state for a masked token."""
_ROUNDING = 1e-7
"""Of a level in float32; it adds no masked token."""


def masked_count(level_N: Float[Tensor, " n"], length: int) -> Int[Tensor, " n"]:
    """How many of a sequence's tokens are masked at these levels: ceil(t x length), at least 1.

    For t uniform in (0, 1] every number from 1 to length has the same probability.
    """
    count = torch.ceil((level_N.double() - _ROUNDING) * length)
    return count.clamp(1, length).long()


@dataclass(frozen=True)
class MaskedShares(Partition):
    """Masked shares t in [t_min, 1], cut into `num_blocks` ranges; block 0 owns the highest.

    A *fraction* is a share of the time that `schedule` turns into t, or with `bits` (measured in
    equal bands of t, least masked first) a share of their sum. Training draws t uniformly inside a
    range, whatever the schedule: then masked tokens' mean cross-entropy is an unbiased estimate of
    the bound. Raises ConfigError for a cut that leaves a block without levels.
    """

    num_blocks: int
    schedule: Literal["linear", "cosine"] = "linear"
    t_min: float = 1e-4
    overlap: float = 0.05
    bits: tuple[float, ...] | None = None

    level_name = "t"
    is_log = False

    def __post_init__(self) -> None:
        if self.num_blocks < 1:
            raise ConfigError(f"model.num_blocks is {self.num_blocks}; it must be at least 1")
        if not bool((self.boundaries[1:] > self.boundaries[:-1]).all()):
            raise ConfigError(
                f"noise.bits {list(self.bits or ())} cannot be cut into {self.num_blocks} blocks; "
                "each needs levels of its own"
            )

    @property
    def lowest(self) -> float:
        return self.t_min

    @property
    def highest(self) -> float:
        return 1.0

    def level_at(self, fraction: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        fraction = fraction.double()
        if self.bits is not None:
            level = _interpolated(fraction, *self._bits_below(self.bits))
        else:
            earliest = self._time_of(self.t_min)
            level = self._share_at(earliest + (1 - earliest) * fraction)
        level = torch.where(fraction <= 0, self.t_min, level)
        return torch.where(fraction >= 1, 1.0, level)

    def fraction_of(self, level: float) -> float:
        if self.bits is not None:
            below, edges = self._bits_below(self.bits)
            return _interpolated(torch.tensor(level, dtype=torch.float64), edges, below).item()
        earliest = self._time_of(self.t_min)
        return (self._time_of(level) - earliest) / (1 - earliest)

    def widened(self, low: float, high: float) -> tuple[float, float]:
        """The range with `overlap` of a block's fraction added on both sides."""
        widening = self.overlap / self.num_blocks
        ends = self.fraction_of(low) - widening, self.fraction_of(high) + widening
        low, high = self.level_at(torch.tensor(ends, dtype=torch.float64)).tolist()
        return low, high

    def sample_level(
        self, block: int, n: int, generator: torch.Generator | None = None
    ) -> Float[Tensor, " n"]:
        low, high = self.block_range(block)
        return low + (high - low) * torch.rand(n, generator=generator, dtype=torch.float64)

    def _share_at(self, time: Tensor) -> Tensor:
        """1 - alpha(time). Source: MD4, section 4."""
        return time if self.schedule == "linear" else torch.cos(math.pi / 2 * (1 - time))

    def _time_of(self, level: float) -> float:
        """The inverse of `_share_at`."""
        return level if self.schedule == "linear" else 1 - math.acos(level) * 2 / math.pi

    def _bits_below(self, bits: tuple[float, ...]) -> tuple[Tensor, Tensor]:
        """(share of the bits below each edge, edge) of the bands in which they were measured."""
        total = torch.tensor((0.0, *bits), dtype=torch.float64).cumsum(0)
        edges = torch.linspace(self.t_min, 1, len(bits) + 1, dtype=torch.float64)
        return total / total[-1], edges


@dataclass(frozen=True)
class Masking:
    """The tokens with the smallest draws are masked; a step fills some of them in.

    The draws of a sequence are two uniforms a token: which tokens are masked or filled in, and with
    what.
    """

    partition: MaskedShares
    draws_in_steps = True

    @classmethod
    def of(cls, options: MaskingOptions, num_blocks: int) -> "Masking":
        values = asdict(options)
        del values["name"]
        return cls(MaskedShares(num_blocks, **values))

    def steps(self, sampler: Any, num_steps: int) -> Steps:
        if not isinstance(sampler, MaskingSamplerOptions):
            raise ConfigError(
                "noise.name: masking masks tokens, which this task does not denoise; leave "
                "noise.name out"
            )
        return self.partition.steps(num_steps)

    def draw(self, size: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        """Two uniforms a token, in float64: of size (*size, 2)."""
        return torch.rand((*size, 2), generator=generator, dtype=torch.float64)

    def corrupt(
        self,
        z0: Int[Tensor, "n t"],
        level_N: Float[Tensor, " n"] | None,
        draw: Float[Tensor, "n t 2"] | None,
    ) -> Int[Tensor, "n t"]:
        """Masks exactly `masked_count` tokens of each sequence."""
        assert level_N is not None
        assert draw is not None
        place = draw[..., 0].argsort(dim=1, stable=True).argsort(dim=1)
        count_N = masked_count(level_N, z0.shape[1])
        return torch.where(place < count_N[:, None], MASK, z0)

    def denoise(
        self, network: Network, z: Int[Tensor, "n t"], level_N: Tensor | None
    ) -> Float[Tensor, "n t v"]:
        """Log-probabilities: the network's at masked tokens; visible ones are what they are.

        A visible token has log-probability 0, exactly, and every other one the lowest number of the
        type, so cross-entropy and its gradient are 0 there.
        """

        def combine(raw: Tensor) -> Tensor:
            # Outside autocast's half precision.
            log_p = raw.to(torch.promote_types(raw.dtype, torch.float32)).log_softmax(dim=-1)
            own = z.clamp_min(0)[..., None]
            visible = torch.full_like(log_p, torch.finfo(log_p.dtype).min).scatter_(-1, own, 0.0)
            return torch.where((z == MASK)[..., None], log_p, visible)

        return network(z, level_N, combine)

    def weight(self, level_N: Tensor | None) -> Tensor:
        """1 / t: of a sequence's summed cross-entropy, of which a share t is masked.

        A task that divides by the number of masked tokens needs no other weight.
        """
        assert level_N is not None
        return 1 / level_N

    def start(
        self,
        size: tuple[int, ...],
        kind: Literal["mean", "noise"],
        level: float,
        generator: torch.Generator,
        dtype: torch.dtype,
    ) -> Tensor:
        """All tokens masked."""
        return torch.full(size, MASK, dtype=dtype)

    def step(
        self,
        z: Int[Tensor, "n t"],
        denoised: Float[Tensor, "n t v"],
        level: float,
        next_level: float,
        draw: Float[Tensor, "n t 2"] | None,
    ) -> Int[Tensor, "n t"]:
        """Fills in each masked token with probability (t - t_next) / t, by a draw of its own.

        denoised: log-probabilities. Source: MD4, ancestral sampling.
        """
        assert draw is not None
        is_filled = (z == MASK) & (draw[..., 0] < (level - next_level) / level)
        filled = z.clone()
        filled[is_filled] = _drawn(denoised[is_filled], draw[is_filled][:, 1])
        return filled

    def describe(self) -> dict[str, Any]:
        values = asdict(self.partition)
        bits = None if self.partition.bits is None else list(self.partition.bits)
        return {"name": "masking", **values, "bits": bits}


def _drawn(log_p: Float[Tensor, "n v"], uniform_N: Float[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Values with these log-probabilities, by the inverse of their sums.

    In float64: float32 draws from small probabilities are too likely ones (arXiv 2409.02908).
    """
    below = log_p.double().exp().cumsum(dim=-1)
    wanted = uniform_N[:, None] * below[:, -1:]
    value_N = torch.searchsorted(below, wanted, right=True).squeeze(1)
    return value_N.clamp_max(log_p.shape[1] - 1)


def _interpolated(x: Tensor, known_x: Tensor, known_y: Tensor) -> Tensor:
    """Linear between known points, whose x ascend."""
    i = torch.searchsorted(known_x, x.contiguous()).clamp(1, len(known_x) - 1)
    share = (x - known_x[i - 1]) / (known_x[i] - known_x[i - 1])
    return known_y[i - 1] + share * (known_y[i] - known_y[i - 1])
