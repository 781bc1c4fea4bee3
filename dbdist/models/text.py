"""A bidirectional transformer on the symbols of a text, of which some are masked.

States are ids 0 .. V-1, and -1 for [MASK], which has the embedding's row V. The raw output is
logits over the V symbols. Layers are those of MDLM (2406.07524): pre-norm without biases in norms
and attention, rotary positions in halves, and if asked AdaLN-zero by the level; by default they are
told no level. There is no condition. Positions enter through attention only, so that any length
will do.

Shapes: N samples, T symbols, D width, H heads, K head width, V vocabulary, E condition width.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, Num
from torch import Tensor, nn

from dbdist import seeds
from dbdist.models.layers import fan_in_normal, modulate, timestep_features
from dbdist.models.options import TextModelOptions
from dbdist.processes.base import Combine

LAYER_NORM_EPS = 1e-5
ROTARY_BASE = 10_000.0
NUM_FEATURES = 256
"""Sinusoids of the level."""
LEVEL_SCALE = 1000.0
"""Levels are shares of 1, for which the sinusoids are too slow; as MD4 (2406.04329)."""
EMBEDDING_STD = 1.0
"""Of the size of what layers add; 0.02 learns slower (0.15 to 0.25 bits behind after 500 steps)."""


@dataclass(frozen=True, kw_only=True)
class TextSizes:
    """Sizes of the transformer."""

    vocabulary_size: int
    hidden_size: int
    num_heads: int
    mlp: Literal["gelu", "swiglu"]
    mlp_size: int
    condition_size: int | None = None
    """Width of the level's embedding; None: layers are told no level."""
    dropout: float = 0.0


class Context(NamedTuple):
    """What every layer gets."""

    cos_TK: Float[Tensor, "t k"]
    """Of the rotary angles, each for both halves; likewise `sin_TK`."""
    sin_TK: Float[Tensor, "t k"]
    condition_NE: Float[Tensor, "n e"] | None
    """The embedding of the level."""


def rotary_tables(
    length: int, width: int, device: torch.device, dtype: torch.dtype
) -> tuple[Float[Tensor, "t k"], Float[Tensor, "t k"]]:
    """Cosines and sines of position x 10,000^(-2k/width), k < width/2, twice in a row."""
    exponent = torch.arange(0, width, 2, device=device, dtype=dtype) / width
    position = torch.arange(length, device=device, dtype=dtype)
    angle = position.unsqueeze(-1) * (ROTARY_BASE**-exponent).repeat(2)
    return angle.cos(), angle.sin()


def rotate(
    x: Float[Tensor, "n h t k"], cos_TK: Float[Tensor, "t k"], sin_TK: Float[Tensor, "t k"]
) -> Float[Tensor, "n h t k"]:
    """Turns the pairs (x_k, x_{k + K/2}) by the angles of their position, in the tables' type."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (x * cos_TK + turned * sin_TK).to(x.dtype)


class Attention(nn.Module):
    """Every token sees every token; their distance enters by rotary positions."""

    def __init__(self, sizes: TextSizes) -> None:
        super().__init__()
        self.num_heads = sizes.num_heads
        self.qkv = nn.Linear(sizes.hidden_size, 3 * sizes.hidden_size, bias=False)
        self.out = nn.Linear(sizes.hidden_size, sizes.hidden_size, bias=False)

    def forward(self, x: Float[Tensor, "n t d"], context: Context) -> Float[Tensor, "n t d"]:
        q_NHTK, k_NHTK, v_NHTK = (
            self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        )
        q_NHTK, k_NHTK = (
            rotate(heads, context.cos_TK, context.sin_TK) for heads in (q_NHTK, k_NHTK)
        )
        y_NHTK = F.scaled_dot_product_attention(q_NHTK, k_NHTK, v_NHTK)
        return self.out(y_NHTK.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """GELU (tanh) with biases, or SwiGLU without."""

    def __init__(self, sizes: TextSizes) -> None:
        super().__init__()
        d, is_gated = sizes.hidden_size, sizes.mlp == "swiglu"
        self.gate = nn.Linear(d, sizes.mlp_size, bias=False) if is_gated else None
        self.inner = nn.Linear(d, sizes.mlp_size, bias=not is_gated)
        self.outer = nn.Linear(sizes.mlp_size, d, bias=not is_gated)

    def forward(self, x: Float[Tensor, "n t d"]) -> Float[Tensor, "n t d"]:
        if self.gate is None:
            return self.outer(F.gelu(self.inner(x), approximate="tanh"))
        return self.outer(F.silu(self.gate(x)) * self.inner(x))


class AdaLN(nn.Module):
    """`num_chunks` vectors from the level's embedding; zero at first."""

    def __init__(self, sizes: TextSizes, num_chunks: int) -> None:
        super().__init__()
        assert sizes.condition_size is not None
        self.num_chunks = num_chunks
        self.linear = nn.Linear(sizes.condition_size, num_chunks * sizes.hidden_size)

    def forward(self, condition_NE: Float[Tensor, "n e"]) -> tuple[Tensor, ...]:
        return self.linear(condition_NE).chunk(self.num_chunks, dim=-1)


class Layer(nn.Module):
    """A pre-norm transformer layer; with levels, AdaLN shifts, scales and gates both branches."""

    def __init__(self, sizes: TextSizes) -> None:
        super().__init__()
        self.norm1 = _norm(sizes)
        self.attention = Attention(sizes)
        self.norm2 = _norm(sizes)
        self.mlp = MLP(sizes)
        self.dropout = nn.Dropout(sizes.dropout)
        self.adaln = None if sizes.condition_size is None else AdaLN(sizes, num_chunks=6)

    def forward(self, x: Float[Tensor, "n t d"], context: Context) -> Float[Tensor, "n t d"]:
        if self.adaln is None:
            x = x + self.dropout(self.attention(self.norm1(x), context))
            return x + self.dropout(self.mlp(self.norm2(x)))
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaln(context.condition_NE)
        y = self.attention(modulate(self.norm1(x), shift1, scale1), context)
        x = x + gate1.unsqueeze(1) * self.dropout(y)
        y = self.mlp(modulate(self.norm2(x), shift2, scale2))
        return x + gate2.unsqueeze(1) * self.dropout(y)


class TextShared(nn.Module):
    """Everything outside the blocks: embedding, the level's MLP, last norm and head."""

    def __init__(self, sizes: TextSizes) -> None:
        super().__init__()
        d, v, e = sizes.hidden_size, sizes.vocabulary_size, sizes.condition_size
        self.mask_id = v
        self.head_width = d // sizes.num_heads
        self.symbols = nn.Embedding(v + 1, d)
        self.level_in = None if e is None else nn.Linear(NUM_FEATURES, e)
        self.level_out = None if e is None else nn.Linear(e, e)
        self.norm = _norm(sizes)
        self.adaln = None if e is None else AdaLN(sizes, num_chunks=2)
        self.head = nn.Linear(d, v)

    def embed(
        self, condition: Any, z: Int64[Tensor, "n t"], level_N: Tensor | None
    ) -> tuple[Float[Tensor, "n t d"], Context]:
        """Tokens, and the context of all layers. The condition is left aside.

        z: ids, -1 where masked. level_N: the share of masked symbols; may be None without AdaLN.
        """
        tokens = self.symbols(torch.where(z < 0, self.mask_id, z))
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        tables = rotary_tables(z.shape[1], self.head_width, z.device, dtype)
        return tokens, Context(*tables, self.embed_level(level_N))

    def embed_level(self, level_N: Num[Tensor, " n"] | None) -> Float[Tensor, "n e"] | None:
        """SiLU of an MLP on sinusoids of 1,000 times the level; None where layers are told none."""
        if self.level_in is None or self.level_out is None:
            return None
        assert level_N is not None, "AdaLN needs a level"
        features = timestep_features(LEVEL_SCALE * level_N, NUM_FEATURES)
        features = features.to(self.level_in.weight.dtype)
        return F.silu(self.level_out(F.silu(self.level_in(features))))

    def output(
        self, tokens: Float[Tensor, "n t d"], combine: Combine, context: Context
    ) -> Float[Tensor, "n t v"]:
        """What the process makes of logits over the symbols; [MASK] is none of them."""
        x = self.norm(tokens)
        if self.adaln is not None:
            x = modulate(x, *self.adaln(context.condition_NE))
        return combine(self.head(x))


def _norm(sizes: TextSizes) -> nn.LayerNorm:
    return nn.LayerNorm(sizes.hidden_size, eps=LAYER_NORM_EPS, bias=False)


@dataclass(frozen=True)
class TextModel:
    """The architecture. See `models.base.Model`."""

    sizes: TextSizes

    @classmethod
    def of(cls, options: TextModelOptions, spec: Any) -> "TextModel":
        """The model with these options for a text like this. spec: has vocabulary_size."""
        return cls(
            TextSizes(
                vocabulary_size=spec.vocabulary_size,
                hidden_size=options.hidden_size,
                num_heads=options.num_heads,
                mlp=options.mlp,
                mlp_size=options.mlp_width,
                condition_size=options.condition_size if options.level == "adaln" else None,
                dropout=options.dropout,
            )
        )

    def build_shared(self) -> TextShared:
        return TextShared(self.sizes)

    def build_layer(self, index: int) -> Layer:
        return Layer(self.sizes)

    def weights(self, module: nn.Module, seed: int) -> Iterator[tuple[str, Tensor]]:
        """(name, value in host memory) of each parameter, fixed by the seed and the name.

        Norms are the identity; biases, AdaLN and the head are zero; embeddings are N(0, 1);
        other weights have deviation 1 / sqrt(inputs), truncated at two of these.
        """
        modules = dict(module.named_modules())
        for name, parameter in module.named_parameters():
            owner_name, _, leaf = name.rpartition(".")
            owner = modules[owner_name]
            value = torch.zeros(parameter.shape, dtype=parameter.dtype)
            generator = seeds.generator(seed, "init", name)
            if isinstance(owner, nn.LayerNorm):
                value.fill_(1.0)
            elif isinstance(owner, nn.Embedding):
                value.normal_(0.0, EMBEDDING_STD, generator=generator)
            elif leaf == "weight" and "adaln" not in owner_name and owner_name != "head":
                fan_in_normal(value, generator)
            yield name, value

    def describe(self) -> dict[str, Any]:
        sizes = asdict(self.sizes)
        del sizes["dropout"]
        return {"name": "text", **sizes}
