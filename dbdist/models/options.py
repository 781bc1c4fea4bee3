"""Options of the architectures, without torch: a configuration is checked without it."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from dbdist.config.options import ModelOptions, Ranges
from dbdist.config.ranges import FRACTION, at_least
from dbdist.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TextModelOptions(ModelOptions):
    """A bidirectional transformer with rotary positions on the symbols of a text."""

    RANGES: ClassVar[Ranges] = {
        **ModelOptions.RANGES,
        "hidden_size": at_least(1, 2**20),
        "num_heads": at_least(1),
        "mlp_size": at_least(1, 2**22),
        "condition_size": at_least(1, 2**20),
        "dropout": FRACTION,
    }

    name: str = "text"
    """Architecture: a bidirectional transformer on symbols."""
    hidden_size: int = 128
    """Width D of a token."""
    num_heads: int = 4
    """Attention heads; divides hidden_size, into heads of even width."""
    mlp: Literal["gelu", "swiglu"] = "gelu"
    """A layer's MLP: GELU with biases, or SwiGLU without, which has a third matrix."""
    mlp_size: int | None = None
    """Width of the MLP; null: 4 x hidden_size, or with swiglu 8/3 of it, up to a multiple of 32."""
    level: Literal["none", "adaln"] = "none"
    """What layers are told of the level: nothing, as the best denoiser of masked symbols does not
    depend on it (2409.02908); or shifts, scales and gates that are zero at first (AdaLN-zero)."""
    condition_size: int = 128
    """With level: adaln, the width of the level's embedding."""
    dropout: float = 0.0
    """Probability of dropping after the attention output and the MLP; 0 to 1."""

    @property
    def mlp_width(self) -> int:
        """Width of a layer's MLP, with its default."""
        if self.mlp_size is not None:
            return self.mlp_size
        if self.mlp == "gelu":
            return 4 * self.hidden_size
        return -(-8 * self.hidden_size // 3 // 32) * 32

    def check(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ConfigError(
                f"model.num_heads {self.num_heads} does not divide model.hidden_size "
                f"{self.hidden_size}"
            )
        if self.hidden_size // self.num_heads % 2:
            raise ConfigError(
                f"model.hidden_size {self.hidden_size} and model.num_heads {self.num_heads} make "
                "heads of odd width; rotary positions turn pairs"
            )


@dataclass(frozen=True, kw_only=True)
class ViTOptions(ModelOptions):
    """A vision transformer whose layers are conditioned on the noise level by AdaLN."""

    RANGES: ClassVar[Ranges] = {
        **ModelOptions.RANGES,
        "hidden_size": at_least(1, 2**20),
        "num_heads": at_least(1),
        "mlp_size": at_least(1, 2**22),
        "patch_size": at_least(1, 2**14),
        "dropout": FRACTION,
        "attention_dropout": FRACTION,
    }

    name: str = "vit"
    """Architecture: a vision transformer."""
    hidden_size: int = 64
    """Width D of a token; also the width of the label embedding that is denoised."""
    num_heads: int = 4
    """Attention heads; divides hidden_size."""
    mlp_size: int | None = None
    """Width of a layer's MLP; null: 4 x hidden_size."""
    patch_size: int = 4
    """Side of a square patch in pixels; divides the image side."""
    dropout: float = 0.0
    """Probability of dropping after the embeddings, the attention output and the MLP; 0 to 1."""
    attention_dropout: float = 0.0
    """Probability of dropping an attention weight; 0 to 1."""
    init: Literal["fan_in", "published"] = "fan_in"
    """Initial weights: truncated normal of deviation 1 / sqrt(inputs), or 0.02 as published."""

    @property
    def mlp_width(self) -> int:
        """Width of a layer's MLP, with its default."""
        return 4 * self.hidden_size if self.mlp_size is None else self.mlp_size

    def check(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ConfigError(
                f"model.num_heads {self.num_heads} does not divide model.hidden_size "
                f"{self.hidden_size}"
            )

    def check_conditioned(self) -> None:
        if self.hidden_size < 6:
            raise ConfigError(
                f"model.hidden_size is {self.hidden_size}; the noise-level embedding is a sixth of "
                "it, so it must be at least 6"
            )
