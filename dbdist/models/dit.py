"""The diffusion transformer, split into shared modules and blocks of layers.

The image is the state itself: its noisy version is cut into patches, and the patches of the raw
output F are put together again. Level and class make one vector, by which AdaLN-Zero shifts, scales
and gates every layer; "no class" is index `num_classes`. The equations are those of DiT
(2212.09748), section 3, for C output channels: EDM's preconditioning needs no learned variance.
Knows nothing of noise or ranks.

Shapes: N samples, C channels, S image side, T patches, D width.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from dbdist import seeds
from dbdist.errors import ConfigError
from dbdist.models.layers import MAX_PERIOD, Attention, modulate, timestep_features
from dbdist.models.options import DiTOptions
from dbdist.processes.base import Combine
from dbdist.tensors import named_tensors

LAYER_NORM_EPS = 1e-6
NUM_FREQUENCIES = 256
MLP_RATIO = 4
LEVEL_STD = 0.02
"""Of the weights that embed the level, at the start."""


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """Sizes of the transformer. Raises ConfigError when patches do not tile the image."""

    image_size: int
    channels: int
    num_classes: int
    patch_size: int
    hidden_size: int
    num_heads: int
    level_scale: float = 1.0
    label_std: float = 0.02

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ConfigError(
                f"model.patch_size {self.patch_size} does not divide the image side "
                f"{self.image_size}; choose a divisor or resize with data.image_size"
            )

    @property
    def grid_size(self) -> int:
        """Patches along a side."""
        return self.image_size // self.patch_size


def modulated(
    x: Float[Tensor, "n t d"], shift: Float[Tensor, "n d"], scale: Float[Tensor, "n d"]
) -> Float[Tensor, "n t d"]:
    """LayerNorm without weights of its own, then scaled and shifted by the condition."""
    normed = F.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPS)
    return modulate(normed, shift, scale)


class AdaLN(nn.Module):
    """`num_chunks` modulation vectors from the condition, Linear(SiLU(c)); zero at first."""

    def __init__(self, width: int, num_chunks: int) -> None:
        super().__init__()
        self.num_chunks = num_chunks
        self.linear = nn.Linear(width, num_chunks * width)

    def forward(self, c: Float[Tensor, "n d"]) -> tuple[Tensor, ...]:
        return self.linear(F.silu(c)).chunk(self.num_chunks, dim=-1)


class DiTLayer(nn.Module):
    """A transformer layer with AdaLN-Zero: at first it is the identity."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.adaln = AdaLN(d, num_chunks=6)
        self.attention = Attention(d, config.num_heads)
        self.mlp_in = nn.Linear(d, MLP_RATIO * d)
        self.mlp_out = nn.Linear(MLP_RATIO * d, d)

    def forward(self, x: Float[Tensor, "n t d"], c: Float[Tensor, "n d"]) -> Float[Tensor, "n t d"]:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaln(c)
        x = x + gate1.unsqueeze(1) * self.attention(modulated(x, shift1, scale1))
        hidden = F.gelu(self.mlp_in(modulated(x, shift2, scale2)), approximate="tanh")
        return x + gate2.unsqueeze(1) * self.mlp_out(hidden)


class DiTShared(nn.Module):
    """Everything outside the layers: patches in, level, class, patches out."""

    positions: Tensor

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        d, p = config.hidden_size, config.patch_size
        self.patch_embed = nn.Conv2d(config.channels, d, kernel_size=p, stride=p)
        self.register_buffer("positions", torch.empty(config.grid_size**2, d))
        self.level_mlp_in = nn.Linear(NUM_FREQUENCIES, d)
        self.level_mlp_out = nn.Linear(d, d)
        self.label_table = nn.Embedding(config.num_classes + 1, d)  # the last: no class
        self.adaln = AdaLN(d, num_chunks=2)
        self.head = nn.Linear(d, p * p * config.channels)

    def embed(
        self,
        condition: Int[Tensor, " n"],
        z: Float[Tensor, "n c s s"],
        level_N: Float[Tensor, " n"] | None,
    ) -> tuple[Float[Tensor, "n t d"], Float[Tensor, "n d"]]:
        """Tokens, one a patch, and c, the sum of the embeddings of level and class."""
        assert level_N is not None
        tokens = self.patch_embed(z).flatten(2).transpose(1, 2) + self.positions
        return tokens, self.embed_level(level_N) + self.label_table(condition)

    def embed_level(self, level_N: Float[Tensor, " n"]) -> Float[Tensor, "n d"]:
        """An MLP on 256 sinusoids of level_scale times the level, cosines first."""
        scaled_N = self.config.level_scale * level_N
        sinusoids = timestep_features(scaled_N, NUM_FREQUENCIES)
        return self.level_mlp_out(F.silu(self.level_mlp_in(sinusoids)))

    def output(
        self, tokens: Float[Tensor, "n t d"], combine: Combine, context: Float[Tensor, "n d"]
    ) -> Float[Tensor, "n c s s"]:
        """The denoised image, from the raw output F of every patch."""
        shift, scale = self.adaln(context)
        patches = self.head(modulated(tokens, shift, scale))
        return combine(self._image(patches))

    def _image(self, patches: Float[Tensor, "n t m"]) -> Float[Tensor, "n c s s"]:
        """Patches put together; one is a row of (row, column, channel)."""
        g, p, c = self.config.grid_size, self.config.patch_size, self.config.channels
        by_place = patches.reshape(-1, g, g, p, p, c)
        return by_place.permute(0, 5, 1, 3, 2, 4).reshape(-1, c, g * p, g * p)


@dataclass(frozen=True)
class DiT:
    """The architecture with its sizes. See `models.base.Model`."""

    config: DiTConfig

    @classmethod
    def of(cls, options: DiTOptions, spec: Any) -> "DiT":
        """The model with these options for images or latents like these. Raises ConfigError.

        spec: has image_size, channels and num_classes.
        """
        width, num_heads = options.width_and_heads
        config = DiTConfig(
            image_size=spec.image_size,
            channels=spec.channels,
            num_classes=spec.num_classes,
            patch_size=options.patch_size,
            hidden_size=width,
            num_heads=num_heads,
            level_scale=options.level_scale,
            label_std=options.label_std,
        )
        return cls(config)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Of the image that it denoises: channels, rows, columns."""
        return self.config.channels, self.config.image_size, self.config.image_size

    def build_shared(self) -> DiTShared:
        return DiTShared(self.config)

    def build_layer(self, index: int) -> DiTLayer:
        return DiTLayer(self.config)

    def weights(self, module: nn.Module, seed: int) -> Iterator[tuple[str, Tensor]]:
        """Initial values: Xavier-uniform weights and zero biases; AdaLN and the head are zero.

        The embeddings of level and class are normal. Source: DiT's published code, in our words.
        """
        for name, tensor in named_tensors(module).items():
            yield name, self._value(name, tensor, seeds.generator(seed, "init", name))

    def _value(self, name: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
        value = torch.zeros(tensor.shape, dtype=tensor.dtype)
        if name == "positions":
            return positions_2d(self.config.grid_size, self.config.hidden_size).to(tensor.dtype)
        if name == "label_table.weight":
            return value.normal_(0, self.config.label_std, generator=generator)
        if name.startswith("level_mlp") and name.endswith("weight"):
            return value.normal_(0, LEVEL_STD, generator=generator)
        if name.endswith("bias") or "adaln" in name or name.startswith("head"):
            return value
        bound = math.sqrt(6 / (len(value) + value[0].numel()))
        return value.uniform_(-bound, bound, generator=generator)

    def describe(self) -> dict[str, Any]:
        config = asdict(self.config)
        del config["label_std"]
        return {"name": "dit", **config}


def positions_2d(grid_size: int, width: int) -> Float[Tensor, "t d"]:
    """Fixed position of every patch, row by row of the image; float64.

    Half of the width holds sines, then cosines of the column, the other half those of the row.
    width: a multiple of 4.
    """
    quarter = width // 4
    frequency = MAX_PERIOD ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    angle = torch.arange(grid_size, dtype=torch.float64).unsqueeze(1) * frequency
    of_place = torch.cat([angle.sin(), angle.cos()], dim=1)
    column = of_place.expand(grid_size, -1, -1)
    row = of_place.unsqueeze(1).expand(-1, grid_size, -1)
    return torch.cat([column, row], dim=2).flatten(0, 1)
