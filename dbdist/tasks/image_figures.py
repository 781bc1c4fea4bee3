"""Figures of generated images as sums: likeness to test images, asked class, copies.

An answer is an image in the data set's normalised scale, its batch the test image and the class
that was asked for. Knows nothing of ranks.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dbdist.tasks.base import Batch, Figures
from dbdist.tasks.extractor import Extractor, Seen, as_shown, full_precision
from dbdist.tasks.frechet import (
    block_kernel_distance,
    frechet_distance,
    kernel_distance,
    mean_and_covariance,
    moments,
    num_moments,
    self_kernels,
)

MAX_CUBIC = 128
"""Features up to which sums of their triple products are kept: 47,905 of them for 64 features."""


class FeatureFigures(Figures):
    """Frechet distance, KID and the share of asked classes, after every block.

    `frechet_floor` is the distance of as many real training images to the test images: what a
    perfect generator reaches. Up to 128 features, KID is over all pairs. Beyond, it is the mean
    over micro-batches, with its standard error, and so depends on `eval.micro_batch_size`.

    The vector: samples; answers and test images whose class is recognised; what KID needs; moments
    of the answers and of the test images.
    """

    def __init__(
        self,
        extractor: Extractor,
        classifier: Extractor,
        reference: Float[Tensor, "m d"],
        digest: str,
    ) -> None:
        """classifier: gives logits. reference: features of training images. digest: of both."""
        self.extractor, self.classifier, self.reference = extractor, classifier, reference
        self.num_features = extractor.num_features
        self.order = 3 if self.num_features <= MAX_CUBIC else 2
        num_sums = num_moments(self.num_features, self.order)
        self.parts = [3, 2 if self.order == 3 else 5, num_sums, num_sums]
        self.size = sum(self.parts)
        self._digest = digest

    def identity(self) -> str:
        """Networks too: sums over processes with different ones mean nothing."""
        return f"{super().identity()}, networks {self._digest}"

    def add(self, answer: Float[Tensor, "n c s s"], batch: Batch) -> Float[Tensor, " size"]:
        made, real = self.extractor(answer), self.extractor(batch["image"])
        num_samples = float(len(answer))
        counts = torch.stack(
            [
                self._recognised(made, answer, batch["label"]).sum(),
                self._recognised(real, batch["image"], batch["label"]).sum(),
            ]
        )
        return torch.cat(
            [
                counts.new_tensor([num_samples], dtype=torch.float64),
                counts.double(),
                self._kernels(made.features, real.features),
                moments(made.features, self.order),
                moments(real.features, self.order),
            ]
        )

    def _recognised(
        self, seen: Seen, images: Float[Tensor, "n c s s"], label_N: Tensor
    ) -> Bool[Tensor, " n"]:
        logits = self.classifier(images).logits if seen.logits is None else seen.logits
        assert logits is not None
        return (logits.argmax(dim=1) == label_N) & logits.isfinite().all(dim=1)

    def _kernels(
        self, made: Float[Tensor, "n d"], real: Float[Tensor, "n d"]
    ) -> Float[Tensor, " k"]:
        """The kernels of samples with themselves, or powers of a micro-batch's weight and MMD."""
        if self.order == 3:
            return torch.stack([self_kernels(made), self_kernels(real)])
        weight = float(len(made))
        if weight < 2:
            return torch.zeros(5, dtype=torch.float64, device=made.device)
        v = block_kernel_distance(made, real)
        one = torch.ones_like(v)
        return weight * torch.stack([one, v, weight * one, weight * v, weight * v * v])

    def result(self, totals: Float[Tensor, "blocks size"]) -> dict[str, Any]:
        count, asked, recognised = totals[:, :3].T
        rows = [row.split(self.parts) for row in totals]
        of_test = mean_and_covariance(rows[-1][3], self.num_features)
        frechet = [
            frechet_distance(*mean_and_covariance(made, self.num_features), *of_test)
            for _, _, made, _ in rows
        ]
        kid = [self._kid(kernels, made, real) for _, kernels, made, real in rows]
        label_accuracy = (asked / count).tolist()
        found = {
            "frechet": frechet[-1],
            "frechet_after_block": frechet,
            **self._floor(of_test, int(count[-1])),
            "frechet_features": self.num_features,
            "kid": kid[-1],
            "kid_after_block": kid,
            "label_accuracy": label_accuracy[-1],
            "label_accuracy_after_block": label_accuracy,
            "extractor_accuracy": (recognised[-1] / count[-1]).item(),
        }
        if self.order == 2:
            found["kid_standard_error"] = _standard_error(rows[-1][1])
        return found

    def _floor(self, of_test: tuple[Tensor, Tensor], num_samples: int) -> dict[str, Any]:
        real = self.reference[:num_samples]
        of_real = mean_and_covariance(moments(real, 2), self.num_features)
        return {
            "frechet_floor": frechet_distance(*of_real, *of_test),
            "frechet_floor_samples": len(real),
        }

    def _kid(
        self, kernels: Float[Tensor, " k"], made: Float[Tensor, " m"], real: Float[Tensor, " m"]
    ) -> float:
        if self.order == 3:
            return kernel_distance(made, kernels[0], real, kernels[1], self.num_features)
        return (kernels[1] / kernels[0]).item()


class NearestFigures(Figures):
    """Distance of answers to the nearest training image, beside that of test images.

    Answers that are much nearer than test images are copies. Images are from -1 to 1 (latents as
    they are normalised), the distance is the root of the summed squares.
    """

    size = 3

    def __init__(self, train_images: Float[Tensor, "m c s s"], spec: Any) -> None:
        """train_images: from `as_shown`. spec: of the data set."""
        self.spec, self.train_MP = spec, train_images.flatten(1)

    def add(self, answer: Float[Tensor, "n c s s"], batch: Batch) -> Float[Tensor, " size"]:
        made, real = self._distances(answer), self._distances(batch["image"])
        return torch.stack([torch.ones_like(made).sum(), made.sum(), real.sum()])

    def _distances(self, images: Float[Tensor, "n c s s"]) -> Float[Tensor, " n"]:
        self.train_MP = self.train_MP.to(images.device)
        x_NP = as_shown(images, self.spec).flatten(1)
        with full_precision(images.device):
            squared_NM = self.train_MP.square().sum(dim=1) - 2 * x_NP @ self.train_MP.T
        nearest_NP = self.train_MP[squared_NM.argmin(dim=1)]
        return (x_NP - nearest_NP).double().square().sum(dim=1).sqrt()

    def result(self, totals: Float[Tensor, "blocks size"]) -> dict[str, Any]:
        made, of_test = (totals[:, 1:] / totals[:, :1]).T.tolist()
        return {
            "train_distance": made[-1],
            "train_distance_after_block": made,
            "train_distance_of_test": of_test[-1],
            "train_distance_images": len(self.train_MP),
        }


def _standard_error(kernels: Float[Tensor, " 5"]) -> float:
    """Of the weighted mean of MMDs, from the sums of w, w v, w^2, w^2 v and w^2 v^2."""
    w, wv, w2, w2v, w2v2 = kernels
    mean = wv / w
    return ((w2v2 - 2 * mean * w2v + mean**2 * w2).clamp_min(0).sqrt() / w).item()
