"""Options of the architectures, without torch: a configuration is checked without it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from dbdist.config.options import ModelOptions, Ranges
from dbdist.config.ranges import FRACTION, POSITIVE, at_least
from dbdist.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class DiTOptions(ModelOptions):
    """A diffusion transformer over the patches of a noisy image, conditioned by level and class.

    `size` names a published size; otherwise num_layers, hidden_size and num_heads say it. All three
    are numbers as soon as the section exists.
    """

    RANGES: ClassVar[Ranges] = {
        **ModelOptions.RANGES,
        "hidden_size": at_least(4, 2**20),
        "num_heads": at_least(1),
        "patch_size": at_least(1, 2**14),
        "label_std": POSITIVE,
        "level_scale": POSITIVE,
    }
    SIZES: ClassVar[Mapping[str | None, tuple[int, int, int]]] = {
        "S": (12, 384, 6),
        "B": (12, 768, 12),
        "L": (24, 1024, 16),
        "XL": (28, 1152, 16),
        None: (6, 64, 4),
    }
    """num_layers, hidden_size and num_heads of each size. Source: DiT (2212.09748), table 1."""

    name: str = "dit"
    """Architecture: a diffusion transformer for images."""
    size: Literal["S", "B", "L", "XL"] | None = None
    """Published size, which stands for num_layers, hidden_size and num_heads; null: these three
    say it."""
    num_layers: int | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    """Layers over all blocks; null: those of the size, or 6."""
    hidden_size: int | None = None
    """Width D of a token, a multiple of 4; null: that of the size, or 64."""
    num_heads: int | None = None
    """Attention heads; divides hidden_size; null: those of the size, or 4."""
    patch_size: int = 2
    """Side of a square patch in pixels; divides the image side."""
    label_std: float = 0.02
    """Standard deviation of the label embeddings at the start: 0.02 as published; 0.5 lets a short
    training on little data tell the classes apart."""
    level_scale: float = 1.0
    """Factor on ln(sigma) / 4 before its sinusoids, whose highest frequency is 1: with 1, as in
    EDM, they are nearly linear in it; with 250 levels differ more, which digits learn better."""

    def __post_init__(self) -> None:
        for key, value in self._published().items():
            if getattr(self, key) is None:
                object.__setattr__(self, key, value)

    @property
    def width_and_heads(self) -> tuple[int, int]:
        """(hidden_size, num_heads), with their defaults."""
        assert self.hidden_size is not None
        assert self.num_heads is not None
        return self.hidden_size, self.num_heads

    def check(self) -> None:
        for key, value in self._published().items():
            if self.size is not None and getattr(self, key) != value:
                raise ConfigError(
                    f"model.size: {self.size} has {key} {value}, but model.{key} is "
                    f"{getattr(self, key)}; leave out one of them"
                )
        width, num_heads = self.width_and_heads
        if width % num_heads:
            raise ConfigError(
                f"model.num_heads {num_heads} does not divide model.hidden_size {width}"
            )
        if width % 4:
            raise ConfigError(
                f"model.hidden_size is {width}; a quarter of it holds the sines of a row's "
                "position, so it must be a multiple of 4"
            )

    def _published(self) -> dict[str, int]:
        keys = "num_layers", "hidden_size", "num_heads"
        return dict(zip(keys, self.SIZES[self.size], strict=True))


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
