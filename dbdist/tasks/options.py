"""Options of the tasks. No torch here: a configuration is read and checked without it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from dbdist.config.options import SamplerOptions, TaskOptions
from dbdist.errors import ConfigError
from dbdist.processes.options import GaussianSamplerOptions, MaskingSamplerOptions


@dataclass(frozen=True, kw_only=True)
class FeatureOptions(TaskOptions):
    """In what figures of generated images see likeness; for tasks that generate images."""

    features: Literal["auto", "inception", "small", "none"] = "auto"
    """Features of frechet and kid: those of the published FID (inception: needs the extra `fid` and
    the network's weights in data.root/extractors), of a small network that is trained on the
    training images once (small), or inception for colour images of 32 pixels or more where it is
    there (auto). none: no such figures, so that an evaluation need not draw the whole test set."""


@dataclass(frozen=True, kw_only=True)
class ClassificationSamplerOptions(GaussianSamplerOptions):
    """How the chain of blocks turns an image into a class."""

    start: Literal["mean", "noise"] = "mean"
    """First z: zero, the mean of what could be drawn, or Gaussian noise of the starting level."""
    label_table: Literal["normalized", "raw"] = "normalized"
    """Label embeddings in the denoised state: unit length as in training, or raw as published."""
    readout: Literal["last", "all"] | tuple[int, ...] = "all"
    """Blocks whose last class probabilities are averaged into the answer."""

    def readout_blocks(self, num_blocks: int) -> tuple[int, ...]:
        """Blocks whose probabilities make the answer, ascending."""
        if self.readout == "last":
            return (num_blocks - 1,)
        if self.readout == "all":
            return tuple(range(num_blocks))
        return tuple(sorted(set(self.readout)))

    def check_blocks(self, num_blocks: int) -> None:
        super().check_blocks(num_blocks)
        readers = self.readout_blocks(num_blocks)
        if not readers or not set(readers) <= set(range(num_blocks)):
            raise ConfigError(
                f"sampler.readout is {self.readout}; allowed are last, all or a list of blocks "
                f"0..{num_blocks - 1}"
            )


@dataclass(frozen=True, kw_only=True)
class ClassificationOptions(TaskOptions):
    """Denoise the label embedding of an image."""

    sampler: ClassVar[type[SamplerOptions]] = ClassificationSamplerOptions
    defaults: ClassVar[Mapping[str, Any]] = {
        "model.name": "vit",
        "noise.name": "gaussian",
        "data.name": "digits",
        "noise.p_mean": 0.5,  # label embeddings have length 1; measured best on mnist5k
    }
    has_plain_control: ClassVar[bool] = True

    name: str = "classification"
    """Task: the class of an image."""
    weighting: Literal["none", "per_sample", "published"] = "none"
    """Loss: mean cross-entropy; times the EDM weight of each sample's sigma; or, as published,
    mean cross-entropy times mean weight (of each part of an accumulated or replicated batch)."""
    condition_dropout: float = 0.0
    """Probability of replacing a training image by zeros, the unconditional input of guidance; 0 to
    1."""


@dataclass(frozen=True, kw_only=True)
class MaskedTextOptions(TaskOptions):
    """Tell the masked tokens of a text from the others."""

    sampler: ClassVar[type[SamplerOptions]] = MaskingSamplerOptions
    defaults: ClassVar[Mapping[str, Any]] = {
        "model.name": "text",
        "noise.name": "masking",
        "data.name": "kjv",
    }

    name: str = "masked_text"
    """Task: text, by masked diffusion."""


@dataclass(frozen=True, kw_only=True)
class GenerationSamplerOptions(GaussianSamplerOptions):
    """How the chain of blocks makes an image of noise."""

    num_steps: int | None = 50
    """Noise levels over the whole chain, at least num_blocks; null: 2 x num_blocks."""
    method: Literal["euler", "heun"] = "euler"
    """A step follows the slope at its level, or (heun) the mean of the slopes at its level and at
    the next: almost twice the evaluations. The block that owns the level does both, also where the
    next level is another block's."""

    @property
    def order(self) -> int:
        return 2 if self.method == "heun" else 1

    def check(self) -> None:
        super().check()
        if self.num_draws > 1:
            raise ConfigError(
                f"sampler.num_draws is {self.num_draws}, but the mean of several images is no "
                "image; use 1"
            )
        if self.start == "mean":
            raise ConfigError(
                "sampler.start: mean would make every image of a class the same one; use start: "
                "noise"
            )


@dataclass(frozen=True, kw_only=True)
class GenerationOptions(FeatureOptions):
    """Denoise images (or their latents), given their class."""

    sampler: ClassVar[type[SamplerOptions]] = GenerationSamplerOptions
    defaults: ClassVar[Mapping[str, Any]] = {
        "model.name": "dit",
        "noise.name": "gaussian",
        "noise.p_mean": -1.2,
        "data.name": "digits",
        "data.scaling": "symmetric",
        "sampler.start": "noise",
    }

    name: str = "generation"
    """Task: images of a class."""
    condition_dropout: float = 0.1
    """Probability of training an image without its class, which guidance needs; 0 to 1."""
