"""Masked diffusion of text: tell the masked tokens of a sequence from the visible ones.

There is no condition. The network gives log-probabilities, and the loss is the mean cross-entropy
of a sequence's masked tokens. For masked shares t uniform in (0, 1] its mean is the bound on nats
per token: with l of T tokens masked, l uniform in 1..T, it is the negative log-likelihood of a
model that writes the tokens in random order. A block's part of the bound is that mean over its own
t, times the length of their range; the parts add up. Sources: MD4 (arXiv 2406.04329) equation 5,
ARDM (arXiv 2110.02037) equation 3, DiffusionBlocks (arXiv 2506.14202) section 4. Does not
communicate.
"""

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dbdist.data.base import Key
from dbdist.errors import ConfigError
from dbdist.models.base import Model
from dbdist.models.denoiser import Denoiser
from dbdist.processes.base import Process
from dbdist.processes.masking import Masking, masked_count
from dbdist.processes.partition import Partition
from dbdist.tasks.base import Answer, Batch, Condition, Figures, Loss, MainFigure, Task, to_device

NUM_BANDS = 12
"""Of equal length in t, whose bits an evaluation measures, for `noise.bits`."""
NUM_SHOWN = 8
"""Texts of a preview."""
LN_2 = math.log(2)
_SHORT = {"character": "char"}
"""What figures call a unit, where that is not the unit's name."""


class MaskedText(Task):
    """The tokens of a sequence, by how many are masked. The model gives log-probabilities."""

    state_dtype = torch.int64

    def __init__(self, spec: Any, partition: Partition | None = None) -> None:
        """spec: of the text, with length, unit and decode. partition: for models to load."""
        self.spec, self.partition = spec, partition
        name = f"bits_per_{_SHORT.get(spec.unit, spec.unit)}"
        self.main = MainFigure(name, is_higher_better=False)
        self.state_shape = (spec.length,)

    @classmethod
    def build_model(cls, config: Any, spec: Any, model_class: Any) -> Model:
        if not hasattr(spec, "vocabulary_size"):
            raise ConfigError(
                f"task.name: masked_text needs text, which data.name: {spec.name} is not; choose "
                "another data set, such as kjv"
            )
        return super().build_model(config, spec, model_class)

    @classmethod
    def of(cls, config: Any, spec: Any, model: Model, process: Process) -> Task:
        if not isinstance(process, Masking):
            raise ConfigError(
                f"task.name: masked_text masks tokens, which noise.name: {config.noise.name} does "
                "not; use noise.name: masking"
            )
        return cls(spec, process.partition)

    # Training

    def condition(self, batch: Batch) -> Condition:
        return ()

    def clean(self, batch: Batch, shared: nn.Module) -> Int[Tensor, "n t"]:
        return batch["tokens"]

    def loss(
        self,
        output: Float[Tensor, "n t v"],
        z0: Int[Tensor, "n t"],
        batch: Batch,
        level_N: Float[Tensor, " n"] | None,
        weight_N: Tensor | None,
    ) -> Loss:
        """Nats per masked token; the number of masked tokens is the weight.

        The record has them in bits, whose mean over all t is the bound.
        """
        assert level_N is not None
        nats_N = masked_nats(output, z0, level_N)
        return Loss(nats_N.mean(), {self.main.name: nats_N.detach() / LN_2})

    # Inference

    def denoised(self, output: Float[Tensor, "n t v"], shared: nn.Module) -> Float[Tensor, "n t v"]:
        """Log-probabilities of each token."""
        return output

    def answer(self, output: Float[Tensor, "n t v"], shared: nn.Module) -> Int[Tensor, "n t"]:
        """Token ids; what is masked still becomes the most probable one."""
        return output.argmax(dim=-1)

    def figures(self) -> list[Figures]:
        return [BoundFigures(self.main.name)]

    def requests(self, classes: Sequence[int] | None, num: int) -> "TextRequests":
        if classes is not None:
            raise ConfigError(f"--classes {[*classes]}: text has no classes; leave them out")
        return TextRequests(self.spec, num)

    def preview(self, answers: Int[Tensor, "n t"]) -> str:
        """The first texts, with an empty line between them."""
        return "\n\n".join(self.texts(answers[:NUM_SHOWN]))

    def show(self, answers: Int[Tensor, "n t"], folder: Path) -> list[Path]:
        """folder/samples.txt: the texts, with a line between them."""
        file, line = folder / "samples.txt", f"\n{'-' * 80}\n"
        text = line.join(self.texts(answers))
        file.write_text(f"{text}\n", encoding="utf-8", errors="replace")
        return [file]

    def texts(self, answers: Int[Tensor, "n t"]) -> list[str]:
        """What the ids stand for."""
        return [self.spec.decode(ids) for ids in answers.tolist()]

    def loaded(self, answer: Answer, device: torch.device, dtype: torch.dtype) -> "TextWriter":
        return TextWriter(self, answer, device, dtype)


def masked_nats(
    log_p: Float[Tensor, "n t v"], z0: Int[Tensor, "n t"], level_N: Float[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """Mean cross-entropy of each sequence's masked tokens; that of visible ones is 0."""
    nats_NT = -log_p.gather(-1, z0[..., None]).squeeze(-1)
    return nats_NT.sum(dim=1) / masked_count(level_N, z0.shape[1])


class BoundFigures(Figures):
    """The bound on bits per token, with its standard error, by block and by masked share.

    Each block is measured on its own levels, the last one also on those from 0 to t_min, on which
    none is trained: that is the reconstruction term. The network is told at least t_min there. So
    the parts of the blocks cover (0, 1] once, and their sum is a bound. The levels of a batch are
    as far from each other as they can be (MD4's antithetic ones), so the true standard error is
    lower than the one given, for these sequences; how they were chosen is not in it.

    The vector: sequences, the sum of their parts of the bound in nats, of these squared, and of
    these by bands of t.
    """

    kind = "levels"
    size = 3 + NUM_BANDS

    def __init__(self, name: str) -> None:
        """name: of the bound."""
        self.name = name

    def measure(
        self, denoiser: Denoiser, batch: Batch, block: int, generator: torch.Generator
    ) -> Float[Tensor, " size"]:
        process, z0 = denoiser.process, batch["tokens"]
        assert isinstance(process, Masking)
        partition, num = process.partition, len(z0)
        low, high = partition.own_range(block)
        if block == partition.num_blocks - 1:
            low = 0.0
        first = torch.rand(1, generator=generator, dtype=torch.float64)
        place_N = (first + torch.arange(num, dtype=torch.float64) / num) % 1
        level_N = (high - (high - low) * place_N).to(z0.device)  # in (low, high]
        draw = process.draw(tuple(z0.shape), generator, z0.dtype).to(z0.device)
        z = process.corrupt(z0, level_N, draw)
        told_N = level_N.clamp_min(partition.t_min).to(torch.get_default_dtype())
        part_N = (high - low) * masked_nats(denoiser((), z, told_N), z0, level_N).double()
        band_N = (level_N - partition.t_min) / (1 - partition.t_min) * NUM_BANDS
        band_N = band_N.long().clamp(0, NUM_BANDS - 1)
        bands = torch.zeros(NUM_BANDS, dtype=torch.float64, device=z0.device)
        bands.scatter_add_(0, band_N, part_N)
        ones_N = torch.ones_like(part_N)
        sums = torch.stack([ones_N.sum(), part_N.sum(), part_N.square().sum()])
        return torch.cat([sums, bands])

    def result(self, totals: Float[Tensor, "blocks size"]) -> dict[str, Any]:
        num, total, squares = totals[:, :3].unbind(dim=1)
        mean = total / num
        variance = (squares - num * mean.square()).clamp_min(0) / (num - 1).clamp_min(1)
        bands = totals[:, 3:] / num[:, None]
        return {
            self.name: mean.sum().item() / LN_2,
            f"{self.name}_stderr": (variance / num).sum().sqrt().item() / LN_2,
            "bits_per_block": (mean / LN_2).tolist(),
            "bits_by_level": (bands.sum(dim=0) / LN_2).tolist(),
        }


class TextRequests:
    """Requests for texts: a `dbdist.data.base.Dataset` that has only a length."""

    augments = False

    def __init__(self, spec: Any, num: int) -> None:
        self.spec = spec
        self._num = num

    def __len__(self) -> int:
        return self._num

    def __getitems__(self, keys: Sequence[Key]) -> dict[str, Tensor]:
        return {"number": torch.tensor([key if isinstance(key, int) else key[0] for key in keys])}

    def digest(self) -> str:
        return hashlib.sha256(f"{self._num} texts of {self.spec.length}".encode()).hexdigest()


class TextWriter:
    """`dbdist.load(OUT)` of a text model; holds no process group and needs no config file."""

    def __init__(
        self, task: MaskedText, answer: Answer, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.task, self.device, self.dtype = task, device, dtype
        self._answer = answer

    @torch.no_grad()
    def sample(self, num: int, seed: int = 0, batch_size: int = 64) -> list[str]:
        """As many texts; text i of a seed is the same, whatever num and batch_size are."""
        requests, texts = TextRequests(self.task.spec, num), []
        for start in range(0, num, batch_size):
            keys = range(start, min(start + batch_size, num))
            batch = to_device(requests.__getitems__(keys), self.device, self.dtype)
            texts += self.task.texts(self._answer(batch, start, seed=seed))
        return texts

    def probe(self) -> None:
        """Raises what a wrong description would raise at the first text; one step a block."""
        batch = TextRequests(self.task.spec, 1).__getitems__([0])
        partition = self.task.partition
        assert partition is not None
        steps = partition.steps(partition.num_blocks)
        self._answer(to_device(batch, self.device, self.dtype), 0, steps=steps)
