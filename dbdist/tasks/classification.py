"""Image classification as denoising: z0 is the image's normalised label embedding, the condition
its pixels.

The head's logits stand for the denoised state softmax(logits) @ label table; the loss is
cross-entropy.
Source: DiffusionBlocks (2506.14202), section 4.1 and its published ViT code; where we offer more
than that code does, `TaskConfig` and `SamplerConfig` name the switch. Does not communicate.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dbdist import seeds
from dbdist.config.options import TaskConfig
from dbdist.models.denoiser import Denoiser, noised
from dbdist.models.vit import PlainViT
from dbdist.processes.gaussian import NoiseSchedule


class Draws(NamedTuple):
    """The random part of a training batch: noise levels, unit noise, and which images are kept."""

    sigma_N: Float[Tensor, " n"]
    noise_ND: Float[Tensor, "n d"]
    keep_N: Bool[Tensor, " n"] | None

    def part(self, start: int, stop: int) -> "Draws":
        """The draws of samples start..stop-1 of the batch."""
        keep_N = None if self.keep_N is None else self.keep_N[start:stop]
        return Draws(self.sigma_N[start:stop], self.noise_ND[start:stop], keep_N)

    def to(self, device: torch.device) -> "Draws":
        keep_N = None if self.keep_N is None else self.keep_N.to(device, non_blocking=True)
        sigma_N = self.sigma_N.to(device, non_blocking=True)
        return Draws(sigma_N, self.noise_ND.to(device, non_blocking=True), keep_N)


def sample_draws(
    task: TaskConfig,
    schedule: NoiseSchedule,
    *,
    seed: int,
    block: int,
    step: int,
    num_samples: int,
    hidden_size: int,
) -> Draws:
    """What the whole batch of this block's step draws, on the CPU: a function of seed, block and
    step alone.

    Replicas take their parts of the same draws, so R replicas train on what one process would.
    """
    dtype = torch.get_default_dtype()
    sigma_N = schedule.sample_sigma(block, num_samples, seeds.generator(seed, "sigma", block, step))
    noise_ND = torch.randn(
        num_samples, hidden_size, generator=seeds.generator(seed, "noise", block, step), dtype=dtype
    )
    keep_N = None
    if task.condition_dropout > 0:
        generator = seeds.generator(seed, "condition", block, step)
        keep_N = torch.rand(num_samples, generator=generator) >= task.condition_dropout
    return Draws(sigma_N.to(dtype), noise_ND, keep_N)


class Loss(NamedTuple):
    """The scalar to minimise, and each sample's cross-entropy for the record."""

    value: Float[Tensor, ""]
    cross_entropy_N: Float[Tensor, " n"]


class DenoisingLoss(nn.Module):
    """The training objective of one block: images and labels to a loss. One module, so that
    data-parallel engines can wrap it; gradients flow into the label table through target and state
    alike."""

    def __init__(
        self, denoiser: Denoiser, weighting: Literal["none", "per_sample", "published"]
    ) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.weighting = weighting

    def forward(
        self, images: Float[Tensor, "n c s s"], labels_N: Int[Tensor, " n"], draws: Draws
    ) -> Loss:
        if draws.keep_N is not None:
            images = images * draws.keep_N[:, None, None, None]
        z0_ND = targets(self.denoiser.shared.label_table, labels_N)
        z_ND = noised(z0_ND, draws.sigma_N, draws.noise_ND)
        logits_NK = self.denoiser(images, z_ND, draws.sigma_N)
        cross_entropy_N = F.cross_entropy(logits_NK, labels_N, reduction="none")
        return Loss(self._weighted(cross_entropy_N, draws.sigma_N), cross_entropy_N.detach())

    def _weighted(
        self, cross_entropy_N: Float[Tensor, " n"], sigma_N: Float[Tensor, " n"]
    ) -> Float[Tensor, ""]:
        if self.weighting == "none":
            return cross_entropy_N.mean()
        weight_N = self.denoiser.schedule.weight(sigma_N)
        if self.weighting == "per_sample":
            return (cross_entropy_N * weight_N).mean()
        # The published code multiplies (N,) by (N, 1), which amounts to a product of means.
        return cross_entropy_N.mean() * weight_N.mean()


class EndToEndLoss(nn.Module):
    """The training objective of the plain ViT: mean cross-entropy."""

    def __init__(self, model: PlainViT) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Float[Tensor, "n c s s"], labels_N: Int[Tensor, " n"]) -> Loss:
        logits_NK = self.model(images)
        logits_NK = logits_NK.to(torch.promote_types(logits_NK.dtype, torch.float32))
        cross_entropy_N = F.cross_entropy(logits_NK, labels_N, reduction="none")
        return Loss(cross_entropy_N.mean(), cross_entropy_N.detach())


@dataclass(frozen=True)
class ClassReadout:
    """How logits are read at inference: as class probabilities, and as the state they stand for.

    table_KD: the label table. normalized: rows of unit length, as in training; False: as they are
    stored.
    """

    table_KD: Float[Tensor, "k d"]
    normalized: bool = True

    def denoised(self, output: Float[Tensor, "n k"]) -> Float[Tensor, "n d"]:
        """softmax(logits) @ table."""
        table = F.normalize(self.table_KD, dim=-1) if self.normalized else self.table_KD
        return output.softmax(dim=-1) @ table

    def probabilities(self, output: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        return output.softmax(dim=-1)


def targets(
    label_table_KD: Float[Tensor, "k d"], labels_N: Int[Tensor, " n"]
) -> Float[Tensor, "n d"]:
    """z0: label embeddings of unit length."""
    return F.normalize(label_table_KD[labels_N], dim=-1)
