"""An exported classifier in a user's hands: images in, classes and probabilities out."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dbdist.data.images import DatasetSpec
from dbdist.data.inputs import pixels_of
from dbdist.data.latents import LatentSpec
from dbdist.tasks.base import Answer


class Classifier:
    """`dbdist.load(OUT)` of a classifier; holds no process group and needs no config file.

    `class_names[i]` is what index i stands for.
    """

    def __init__(
        self,
        spec: DatasetSpec | LatentSpec,
        answer: Answer,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.spec, self.device, self.dtype = spec, device, dtype
        self._answer = answer

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of their indices."""
        return self.spec.class_names or tuple(map(str, range(self.spec.num_classes)))

    def predict_labels(self, images: Any, batch_size: int = 256) -> list[str]:
        """The name of each image's class."""
        return [self.class_names[i] for i in self.predict(images, batch_size).tolist()]

    def predict(self, images: Any, batch_size: int = 256) -> Tensor:
        """Class indices (N,), into `class_names`; see `predict_proba` for what images may be."""
        return self.predict_proba(images, batch_size).argmax(dim=-1)

    @torch.no_grad()
    def predict_proba(self, images: Any, batch_size: int = 256) -> Float[Tensor, "n k"]:
        """Class probabilities, in the order of `class_names`.

        images: (N, C, S, S) or, with one channel, (N, S, S), as tensor, array or list; a PIL image
        or a list of them; a picture file or a folder of them. Numbers: uint8, floats in [0, 1], or
        floats in the data set's own range. Raises ValueError for anything else.
        """
        pixels = pixels_of(images, self.spec)
        answers = [torch.empty(0, self.spec.num_classes, dtype=self.dtype)]
        for i, rows in enumerate(pixels.split(batch_size) if len(pixels) else ()):
            label = torch.zeros(len(rows), dtype=torch.int64, device=self.device)
            batch = {"image": rows.to(self.device, self.dtype), "label": label}
            answers.append(self._answer(batch, i * batch_size).cpu())
        return torch.cat(answers)

    def probe(self) -> None:
        """Raises what a wrong description would raise at the first image."""
        side = self.spec.image_size
        self.predict(torch.zeros(1, self.spec.channels, side, side))
