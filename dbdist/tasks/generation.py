"""Images of a class as denoising of the image itself, or of its latents.

z0 is the image, the condition its class. The head gives the denoised image D; the loss is EDM's in
its form of unit weight, |F - (z0 - c_skip z) / c_out|^2, a mean over pixels. Sources:
DiffusionBlocks (2506.14202), equation 6 and appendix E.2; EDM (2206.00364), equations 7 and 8.
Does not communicate.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from dbdist.config.options import DataOptions
from dbdist.data.images import denormalize
from dbdist.errors import ConfigError
from dbdist.models.base import Model
from dbdist.models.denoiser import Denoiser
from dbdist.processes.base import Process, per_sample
from dbdist.processes.partition import Partition
from dbdist.tasks.base import Answer, Batch, Figures, LoadSplit, Loss, MainFigure, Task
from dbdist.tasks.features import feature_figures, prepare_features
from dbdist.tasks.generator import Generator, Requests, check_guidance, classes_of
from dbdist.tasks.options import GenerationOptions
from dbdist.tasks.pictures import IN_GRID, grid, is_of_pictures, write_pictures

LEVELS_PER_IMAGE = 4
"""Noise levels at which the held-out loss sees each image."""


class Generation(Task):
    """Denoise an image, given its class. The model denoises images of the data's shape."""

    main = MainFigure("loss", is_higher_better=False)

    def __init__(
        self,
        options: GenerationOptions,
        spec: Any,
        partition: Partition,
        data: DataOptions | None = None,
        device: str = "cpu",
    ) -> None:
        """spec: of the data set, with channels, image_size and num_classes.

        data: the set whose images the generated ones are compared with; None: no comparison.
        device: "cpu", or what networks that look at pictures may use.
        """
        self._device = device
        self.options, self.spec, self.partition = options, spec, partition
        self._data = data if is_of_pictures(spec) and options.features != "none" else None
        self.state_shape = (spec.channels, spec.image_size, spec.image_size)

    @classmethod
    def of(cls, config: Any, spec: Any, model: Model, process: Process) -> "Generation":
        if process.partition is None or process.partition.level_name != "sigma":
            raise ConfigError(
                f"task.name: generation takes Gaussian noise away, which noise.name: "
                f"{config.noise.name} does not add; use noise.name: gaussian"
            )
        if config.task.features in ("small", "inception") and not is_of_pictures(spec):
            raise ConfigError(
                f"task.features: {config.task.features} looks at pictures, which {spec.name} are "
                "not; leave it out"
            )
        task = cls(config.task, spec, process.partition, config.data, config.device)
        if getattr(model, "image_shape", None) != task.state_shape:
            raise ConfigError(
                f"task.name: generation needs a model that denoises images, which model.name: "
                f"{config.model.name} does not; use model.name: dit"
            )
        check_guidance(config.sampler.guidance_scale, config.task.condition_dropout)
        return task

    # Training

    def condition(self, batch: Batch) -> Int64[Tensor, " n"]:
        return batch["label"]

    def drop(
        self, condition: Int64[Tensor, " n"], keep_N: Bool[Tensor, " n"]
    ) -> Int64[Tensor, " n"]:
        """Index num_classes stands for no class."""
        return condition.where(keep_N, self.spec.num_classes)

    def clean(self, batch: Batch, shared: nn.Module) -> Float[Tensor, "n c s s"]:
        return batch["image"]

    def loss(
        self,
        output: Float[Tensor, "n c s s"],
        z0: Float[Tensor, "n c s s"],
        batch: Batch,
        level_N: Tensor | None,
        weight_N: Tensor | None,
    ) -> Loss:
        assert weight_N is not None
        loss_N = unit_loss(output, z0, weight_N)
        return Loss(loss_N.mean(), {"unit_loss": loss_N.detach()})

    # Inference

    def denoised(self, output: Float[Tensor, "n c s s"], shared: nn.Module) -> Tensor:
        return output

    def answer(self, output: Float[Tensor, "n c s s"], shared: nn.Module) -> Tensor:
        """The denoised image, scaled as the data set's."""
        return output

    def prepare(self, load: LoadSplit) -> None:
        if self._data is not None:
            has_gpu = self._device != "cpu" and torch.cuda.is_available()
            device = torch.device("cuda" if has_gpu else "cpu")
            prepare_features(self.options, self._data, load("train"), device)

    def figures(self) -> list[Figures]:
        return [UnitLoss(self), *self._of_pictures]

    @cached_property
    def _of_pictures(self) -> list[Figures]:
        return [] if self._data is None else feature_figures(self.options, self._data)

    def requests(self, classes: Sequence[int | str] | None, num: int) -> Requests:
        """As many requests for images, going round these classes (None: all)."""
        return Requests(self.spec, classes_of(self.spec, classes), num)

    def preview(self, answers: Float[Tensor, "n c s s"]) -> Tensor | None:
        """A grid of up to 100 pictures, uint8 (C, H, W); None of latents."""
        if not is_of_pictures(self.spec) or len(answers) == 0:
            return None
        return grid(denormalize(answers[:IN_GRID].float(), self.spec)).cpu()

    def show(self, answers: Float[Tensor, "n c s s"], folder: Path) -> list[Path]:
        """A grid of the first 100, and every picture by itself; nothing of latents."""
        if not is_of_pictures(self.spec) or len(answers) == 0:
            return []
        return write_pictures(denormalize(answers.float(), self.spec), folder)

    def loaded(self, answer: Answer, device: torch.device, dtype: torch.dtype) -> Generator:
        return Generator(self.spec, answer, device, self.partition, self.options.condition_dropout)


class UnitLoss(Figures):
    """The held-out loss of each block on the levels that it owns, without overlap, and its mean.

    Every block of an equal-probability partition has the same share of the noise law, so `loss` is
    the expectation under that law, whatever the number of blocks: one block of all layers is scored
    on the same levels.
    """

    kind = "levels"
    size = 2

    def __init__(self, task: Task) -> None:
        self.task = task

    def measure(
        self, denoiser: Denoiser, batch: Batch, block: int, generator: torch.Generator
    ) -> Float[Tensor, " size"]:
        """(summed loss, how many were summed) of every image at four levels.

        The levels of all images together are stratified: one in each equal part of the band.
        """
        process, z0 = denoiser.process, self.task.clean(batch, denoiser.shared)
        partition, condition = process.partition, self.task.condition(batch)
        assert partition is not None
        num = LEVELS_PER_IMAGE * len(z0)
        place = torch.randperm(num, generator=generator)
        place = (place + torch.rand(num, generator=generator, dtype=torch.float64)) / num
        levels = partition.level_at(1 - (block + 1 - place) / partition.num_blocks)
        total = torch.zeros(2, dtype=torch.float64)
        for level_N in levels.to(z0).chunk(LEVELS_PER_IMAGE):
            draw = process.draw(tuple(z0.shape), generator, z0.dtype)
            assert draw is not None
            z = process.corrupt(z0, level_N, draw.to(z0.device))
            weight_N = process.weight(level_N)
            assert weight_N is not None
            loss_N = unit_loss(denoiser(condition, z, level_N), z0, weight_N).double()
            total += torch.stack([loss_N.sum(), torch.ones_like(loss_N).sum()]).cpu()
        return total

    def result(self, totals: Float[Tensor, "blocks size"]) -> dict[str, Any]:
        loss_B = totals[:, 0] / totals[:, 1]
        return {"loss": loss_B.mean().item(), "loss_per_block": loss_B.tolist()}


def unit_loss(
    denoised: Float[Tensor, "n c s s"], z0: Float[Tensor, "n c s s"], weight_N: Float[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """|F - (z0 - c_skip z) / c_out|^2, a mean over pixels: what EDM weighs by 1 / c_out^2.

    It is computed from D, as |(D - z0) / c_out|^2: near sigma_min D and z0 are so close that their
    difference is exact, and all that float32 loses is the rounding of D, 3e-5 of F at sigma 0.002.
    """
    error = (denoised - z0) * per_sample(weight_N.sqrt(), z0)
    return error.square().flatten(1).mean(dim=1)
