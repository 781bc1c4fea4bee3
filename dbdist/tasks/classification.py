"""Image classification as denoising of the image's normalised label embedding.

The condition is the image's pixels. The head's logits stand for the denoised state softmax(logits)
@ label table; the loss is cross-entropy. Source: DiffusionBlocks (2506.14202), section 4.1 and its
published ViT code; where we offer more than that code does, `ClassificationOptions` and
`ClassificationSamplerOptions` name the switch. Does not communicate.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dbdist.errors import ConfigError
from dbdist.models.base import Model
from dbdist.processes.base import Process
from dbdist.tasks.base import Answer, Batch, Figures, Loss, MainFigure, Task
from dbdist.tasks.classifier import Classifier
from dbdist.tasks.options import ClassificationOptions, ClassificationSamplerOptions

NUM_BINS = 15
"""Of the expected calibration error."""


class Classification(Task):
    """Denoise the label embedding of an image. The model has `label_table` and gives logits."""

    main = MainFigure("accuracy")

    def __init__(
        self,
        options: ClassificationOptions,
        sampler: ClassificationSamplerOptions,
        spec: Any,
        width: int,
        num_blocks: int,
    ) -> None:
        """spec: of the data set, with num_classes. width: of a label embedding."""
        self.options, self.sampler, self.spec = options, sampler, spec
        self.readers = sampler.readout_blocks(num_blocks)
        self.state_shape = (width,)
        is_averaged = self.readers != (num_blocks - 1,)
        self.carry_shape = (spec.num_classes,) if is_averaged else ()

    @classmethod
    def of(cls, config: Any, spec: Any, model: Model, process: Process) -> Task:
        if process.partition is None and not config.is_plain:
            raise ConfigError(
                "task.name: classification denoises label embeddings, which needs a process with "
                "noise levels; use noise.name: gaussian, or mode: end_to_end"
            )
        width = getattr(model, "sizes").hidden_size  # noqa: B009
        kind = PlainClassification if config.is_plain else cls
        return kind(config.task, config.sampler, spec, width, config.num_blocks)

    def condition(self, batch: Batch) -> Float[Tensor, "n c s s"]:
        return batch["image"]

    def drop(
        self, condition: Float[Tensor, "n c s s"], keep_N: Bool[Tensor, " n"]
    ) -> Float[Tensor, "n c s s"]:
        """Zeros are the unconditional image, as published."""
        return condition * keep_N[:, None, None, None]

    def clean(self, batch: Batch, shared: nn.Module) -> Float[Tensor, "n d"]:
        """Label embeddings of unit length; gradients flow into the table."""
        return targets(table_of(shared), batch["label"])

    def loss(
        self,
        output: Float[Tensor, "n k"],
        z0: Tensor,
        batch: Batch,
        level_N: Tensor | None,
        weight_N: Tensor | None,
    ) -> Loss:
        cross_entropy_N = F.cross_entropy(output, batch["label"], reduction="none")
        value = self._weighted(cross_entropy_N, weight_N)
        return Loss(value, {"cross_entropy": cross_entropy_N.detach()})

    def _weighted(
        self, cross_entropy_N: Float[Tensor, " n"], weight_N: Float[Tensor, " n"] | None
    ) -> Float[Tensor, ""]:
        if weight_N is None or self.options.weighting == "none":
            return cross_entropy_N.mean()
        if self.options.weighting == "per_sample":
            return (cross_entropy_N * weight_N).mean()
        # The published code multiplies (N,) by (N, 1), which amounts to a product of means.
        return cross_entropy_N.mean() * weight_N.mean()

    def denoised(self, output: Float[Tensor, "n k"], shared: nn.Module) -> Float[Tensor, "n d"]:
        """softmax(logits) @ table."""
        table = table_of(shared)
        if self.sampler.label_table == "normalized":
            table = F.normalize(table, dim=-1)
        return output.softmax(dim=-1) @ table

    def answer(self, output: Float[Tensor, "n k"], shared: nn.Module) -> Float[Tensor, "n k"]:
        """Class probabilities."""
        return output.softmax(dim=-1)

    def read(
        self, block: int, answer: Float[Tensor, "n k"], carry: Tensor
    ) -> tuple[Tensor, Float[Tensor, "n k"]]:
        """The mean of the answers to average so far, or this block's before the first of them."""
        if not self.carry_shape:
            return carry, answer
        if block in self.readers:
            carry = carry + answer
        so_far = sum(reader <= block for reader in self.readers)
        return carry, carry / so_far if so_far else answer

    def figures(self) -> list[Figures]:
        return [ClassFigures()]

    def loaded(self, answer: Answer, device: torch.device, dtype: torch.dtype) -> Classifier:
        return Classifier(self.spec, answer, device, dtype)


class PlainClassification(Classification):
    """The end-to-end control: the image alone gives the logits."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.state_shape = (0,)
        self.carry_shape = ()

    def clean(self, batch: Batch, shared: nn.Module) -> Float[Tensor, "n 0"]:
        return batch["image"].new_zeros(len(batch["label"]), 0)

    def denoised(self, output: Tensor, shared: nn.Module) -> Tensor:
        return output.new_zeros(len(output), 0)


class ClassFigures(Figures):
    """Accuracy after every block; negative log-likelihood and calibration error at the end.

    The vector: correct answers, samples, summed -log p(label), and for each of 15 bins of
    confidence its samples, summed confidence and correct answers (ECE: 1706.04599, equation 3).
    """

    size = 3 + 3 * NUM_BINS

    def add(self, answer: Float[Tensor, "n k"], batch: Batch) -> Float[Tensor, " size"]:
        label_N = batch["label"]
        confidence_N, predicted_N = answer.double().max(dim=-1)
        correct_N = (predicted_N == label_N).double()
        p_N = answer.double().gather(1, label_N[:, None]).squeeze(1)
        nll_N = -p_N.clamp_min(torch.finfo(torch.float32).tiny).log()
        head = torch.stack([correct_N.sum(), torch.ones_like(correct_N).sum(), nll_N.sum()])
        bin_N = (confidence_N * NUM_BINS).long().clamp(0, NUM_BINS - 1)
        bins = torch.zeros(3, NUM_BINS, dtype=torch.float64, device=answer.device)
        for row, value_N in zip(bins, (torch.ones_like(p_N), confidence_N, correct_N), strict=True):
            row.scatter_add_(0, bin_N, value_N)
        return torch.cat([head, bins.flatten()])

    def result(self, totals: Float[Tensor, "blocks size"]) -> dict[str, Any]:
        accuracy = (totals[:, 0] / totals[:, 1]).tolist()
        last = totals[-1]
        _, confidence, correct = last[3:].reshape(3, NUM_BINS)
        return {
            "accuracy": accuracy[-1],
            "accuracy_after_block": accuracy,
            "nll": (last[2] / last[1]).item(),
            "ece": ((confidence - correct).abs().sum() / last[1]).item(),
        }


def table_of(shared: nn.Module) -> Float[Tensor, "k d"]:
    """The label embeddings."""
    table = getattr(shared, "label_table")  # noqa: B009
    assert isinstance(table, Tensor)
    return table


def targets(
    label_table_KD: Float[Tensor, "k d"], labels_N: Int[Tensor, " n"]
) -> Float[Tensor, "n d"]:
    """z0: label embeddings of unit length."""
    return F.normalize(label_table_KD[labels_N], dim=-1)
