"""The vision transformer, split into shared modules and blocks of layers.

It knows nothing of noise or ranks. There are two versions of the same size: the noise-conditioned
one of DiffusionBlocks (`ViTShared`, layers with AdaLN) and the plain one for end-to-end training
(`PlainViTShared`, layers without). Parameter names carry the global layer index, so that shared
modules and blocks of one model never clash. The layout is that of the published code
(post-activation AdaLN, label embedding in place of the class token, LayerNorm eps 1e-12).

Shapes: N samples, C channels, S image side, T = patches + 1 tokens, D width, E condition width, K
classes.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dbdist import seeds
from dbdist.errors import ConfigError
from dbdist.models.layers import Attention, fan_in_normal, timestep_features
from dbdist.models.options import ViTOptions
from dbdist.processes.base import Combine

LAYER_NORM_EPS = 1e-12
NUM_FREQUENCIES = 256
INIT_STD = 0.02


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """Sizes of the transformer. Raises ConfigError when patches do not tile the image."""

    image_size: int
    channels: int
    num_classes: int
    patch_size: int
    hidden_size: int
    num_heads: int
    mlp_size: int
    dropout: float = 0.0
    attention_dropout: float = 0.0
    init: Literal["fan_in", "published"] = "published"

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ConfigError(
                f"model.patch_size {self.patch_size} does not divide the image side "
                f"{self.image_size}; choose a divisor or resize with data.image_size"
            )

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def condition_size(self) -> int:
        return self.hidden_size // 6


class AdaLN(nn.Module):
    """`num_chunks` modulation vectors from the noise-level condition: SiLU(Linear(c)).

    They are zero at first.
    """

    def __init__(self, config: ViTConfig, num_chunks: int) -> None:
        super().__init__()
        self.num_chunks = num_chunks
        self.linear = nn.Linear(config.condition_size, num_chunks * config.hidden_size)

    def forward(self, condition_NE: Float[Tensor, "n e"]) -> tuple[Tensor, ...]:
        return F.silu(self.linear(condition_NE)).chunk(self.num_chunks, dim=-1)


class Layer(nn.Module):
    """A pre-norm transformer layer.

    With a condition, AdaLN shifts, scales and gates both branches.
    """

    def __init__(self, config: ViTConfig, conditioned: bool) -> None:
        super().__init__()
        d = config.hidden_size
        self.norm1 = nn.LayerNorm(d, eps=LAYER_NORM_EPS)
        self.attention = Attention(d, config.num_heads, config.attention_dropout)
        self.norm2 = nn.LayerNorm(d, eps=LAYER_NORM_EPS)
        self.mlp_in = nn.Linear(d, config.mlp_size)
        self.mlp_out = nn.Linear(config.mlp_size, d)
        self.dropout = nn.Dropout(config.dropout)
        self.adaln = AdaLN(config, num_chunks=6) if conditioned else None

    def forward(
        self, x: Float[Tensor, "n t d"], condition_NE: Float[Tensor, "n e"] | None
    ) -> Float[Tensor, "n t d"]:
        if self.adaln is None:
            x = x + self.dropout(self.attention(self.norm1(x)))
            return x + self.dropout(self._mlp(self.norm2(x)))
        chunks = self.adaln(condition_NE)
        shift1, scale1, gate1, shift2, scale2, gate2 = (chunk.unsqueeze(1) for chunk in chunks)
        x = x + gate1 * self.dropout(self.attention(self.norm1(x) * (1 + scale1) + shift1))
        return x + gate2 * self.dropout(self._mlp(self.norm2(x) * (1 + scale2) + shift2))

    def _mlp(self, x: Tensor) -> Tensor:
        return self.mlp_out(F.gelu(self.mlp_in(x)))


class ViTShared(nn.Module):
    """Everything outside the blocks of the noise-conditioned ViT."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        d, e, p = config.hidden_size, config.condition_size, config.patch_size
        self.patch_embed = nn.Conv2d(config.channels, d, kernel_size=p, stride=p)
        self.positions = nn.Parameter(torch.empty(config.num_patches + 1, d))
        self.label_table = nn.Parameter(torch.empty(config.num_classes, d))
        self.noise_mlp_in = nn.Linear(NUM_FREQUENCIES, e)
        self.noise_mlp_out = nn.Linear(e, e)
        self.norm = nn.LayerNorm(d, eps=LAYER_NORM_EPS)
        self.adaln = AdaLN(config, num_chunks=2)
        self.head = nn.Linear(d, config.num_classes)
        self.dropout = nn.Dropout(config.dropout)

    def embed(
        self, condition: Float[Tensor, "n c s s"], z: Float[Tensor, "n d"], level_N: Tensor | None
    ) -> tuple[Float[Tensor, "n t d"], Float[Tensor, "n e"]]:
        """Tokens (the noisy label embedding in place of a class token, then patches), condition."""
        assert level_N is not None
        context = self.embed_noise(level_N)
        patches = self.patch_embed(condition).flatten(2).transpose(1, 2)
        tokens = torch.cat([z.unsqueeze(1).to(patches.dtype), patches], dim=1)
        return self.dropout(tokens + self.positions), context

    def embed_noise(self, c_noise: Float[Tensor, " n"]) -> Float[Tensor, "n e"]:
        """The condition of every AdaLN: SiLU of an MLP on 256 sinusoids, cosines first."""
        sinusoid = timestep_features(c_noise, NUM_FREQUENCIES)
        return F.silu(self.noise_mlp_out(F.silu(self.noise_mlp_in(sinusoid))))

    def output(
        self, tokens: Float[Tensor, "n t d"], combine: Combine, context: Float[Tensor, "n e"]
    ) -> Float[Tensor, "n k"]:
        """Class logits: F is the normed first token; D goes through AdaLN and the head."""
        state = combine(self.norm(tokens[:, 0]))
        shift, scale = self.adaln(context)
        return self.head(state * (1 + scale) + shift)


class PlainViTShared(nn.Module):
    """Everything of the plain ViT but its layers: class token, patches, positions, norm, head."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        d, p = config.hidden_size, config.patch_size
        self.patch_embed = nn.Conv2d(config.channels, d, kernel_size=p, stride=p)
        self.class_token = nn.Parameter(torch.empty(d))
        self.positions = nn.Parameter(torch.empty(config.num_patches + 1, d))
        self.norm = nn.LayerNorm(d, eps=LAYER_NORM_EPS)
        self.head = nn.Linear(d, config.num_classes)
        self.dropout = nn.Dropout(config.dropout)

    def embed(
        self, condition: Float[Tensor, "n c s s"], z: Tensor, level_N: None
    ) -> tuple[Float[Tensor, "n t d"], None]:
        """Tokens: a class token, then the patches; states and levels there are none."""
        patches = self.patch_embed(condition).flatten(2).transpose(1, 2)
        class_token = self.class_token.to(patches.dtype).expand(len(condition), 1, -1)
        return self.dropout(torch.cat([class_token, patches], dim=1) + self.positions), None

    def output(
        self, tokens: Float[Tensor, "n t d"], combine: Combine, context: None
    ) -> Float[Tensor, "n k"]:
        return combine(self.head(self.norm(tokens[:, 0])))


@dataclass(frozen=True)
class ViT:
    """The architecture of either version. See `models.base.Model`."""

    sizes: ViTConfig
    is_plain: bool = False
    """Without noise levels, for end-to-end training."""

    @classmethod
    def of(cls, options: ViTOptions, spec: Any, *, is_plain: bool = False) -> "ViT":
        """The model with these options for images like these. Raises ConfigError.

        spec: has image_size, channels and num_classes.
        """
        sizes = ViTConfig(
            image_size=spec.image_size,
            channels=spec.channels,
            num_classes=spec.num_classes,
            patch_size=options.patch_size,
            hidden_size=options.hidden_size,
            num_heads=options.num_heads,
            mlp_size=options.mlp_width,
            dropout=options.dropout,
            attention_dropout=options.attention_dropout,
            init=options.init,
        )
        return cls(sizes, is_plain)

    def build_shared(self) -> "ViTShared | PlainViTShared":
        return PlainViTShared(self.sizes) if self.is_plain else ViTShared(self.sizes)

    def build_layer(self, index: int) -> Layer:
        return Layer(self.sizes, conditioned=not self.is_plain)

    def weights(self, module: nn.Module, seed: int) -> Iterator[tuple[str, Tensor]]:
        return initial_weights(module, self.sizes.init, seed)

    def describe(self) -> dict[str, Any]:
        sizes = asdict(self.sizes)
        for key in ("dropout", "attention_dropout", "init"):
            del sizes[key]
        return {"name": "vit", **sizes}


def initial_weights(
    module: nn.Module, init: Literal["fan_in", "published"], seed: int
) -> Iterator[tuple[str, Tensor]]:
    """(name, value in host memory) of each parameter, one at a time.

    Each is drawn from a random stream that the seed and the name fix. Norms are the identity;
    biases, AdaLN and the conditioned head are zero; tables and tokens are N(0, 0.02). Weights are
    N(0, 0.02) as published (whose truncation, at +-2, never bites), or of standard deviation
    1 / sqrt(inputs), truncated at two of these.
    """
    modules = dict(module.named_modules())
    zero = {
        id(linear)
        for owner in modules.values()
        for linear in (
            [owner.linear]
            if isinstance(owner, AdaLN)
            else [owner.head]
            if isinstance(owner, ViTShared)
            else []
        )
    }
    for name, parameter in module.named_parameters():
        owner_name, _, leaf = name.rpartition(".")
        owner = modules[owner_name]
        value = torch.zeros(parameter.shape, dtype=parameter.dtype)
        generator = seeds.generator(seed, "init", name)
        is_weight = leaf == "weight" and isinstance(owner, nn.Linear | nn.Conv2d)
        if isinstance(owner, nn.LayerNorm):
            value.fill_(1.0 if leaf == "weight" else 0.0)
        elif leaf == "bias" or id(owner) in zero:
            pass
        elif is_weight and init == "fan_in":
            fan_in_normal(value, generator)
        else:
            value.normal_(0.0, INIT_STD, generator=generator)
        yield name, value
