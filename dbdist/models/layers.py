"""Parts that several architectures are made of."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

MAX_PERIOD = 10_000.0


def timestep_features(level_N: Float[Tensor, " n"], width: int) -> Float[Tensor, "n w"]:
    """Cosines, then sines, of a level times width/2 frequencies from 1 down to 1/10,000.

    The frequencies are exp(-ln(10,000) k / (width/2)). Source: DiT (2212.09748), section 3.2.
    """
    half = width // 2
    exponent = torch.arange(half, device=level_N.device, dtype=level_N.dtype) / half
    angle = level_N.unsqueeze(-1) * torch.exp(-math.log(MAX_PERIOD) * exponent)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def modulate(
    x: Float[Tensor, "n t d"], shift: Float[Tensor, "n d"], scale: Float[Tensor, "n d"]
) -> Float[Tensor, "n t d"]:
    """Each sample's tokens, scaled by 1 + scale and shifted, as in DiT (2212.09748)."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Attention(nn.Module):
    """Multi-head self-attention of all tokens, with one projection to queries, keys and values."""

    def __init__(self, width: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "n t d"]) -> Float[Tensor, "n t d"]:
        q_NHTK, k_NHTK, v_NHTK = (
            self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        )
        dropout = self.dropout if self.training else 0.0
        y_NHTK = F.scaled_dot_product_attention(q_NHTK, k_NHTK, v_NHTK, dropout_p=dropout)
        return self.out(y_NHTK.transpose(1, 2).flatten(2))


def fan_in_normal(value: Tensor, generator: torch.Generator) -> None:
    """Fills a weight: deviation 1 / sqrt(inputs), truncated at two of these."""
    std = value[0].numel() ** -0.5
    nn.init.trunc_normal_(value, 0.0, std, -2 * std, 2 * std, generator=generator)
