"""What a task is: how a batch becomes condition, target, loss, and how it is read out.

Knows nothing of ranks. A batch is a mapping of tensors, samples first. `DenoisingLoss` is the
training objective of every task; `draws_of_step` names all that it draws.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from dbdist import seeds
from dbdist.data.base import Dataset
from dbdist.errors import ConfigError
from dbdist.models.base import Model
from dbdist.models.denoiser import Denoiser
from dbdist.processes.base import Process

Batch = Mapping[str, Tensor]
Condition = Any
"""A tensor, or a tuple of tensors: what the network sees besides the state. Samples first."""
LoadSplit = Callable[[Literal["train", "test"]], Dataset]
Answer = Callable[..., Tensor]
"""(a batch of requests, the number of its first sample) -> the chain's answers.

Keywords change the sampler for this call, such as `seed`.
"""


class Loss(NamedTuple):
    """The scalar to minimise, and what the record keeps of each sample, under the task's names."""

    value: Float[Tensor, ""]
    per_sample: dict[str, Float[Tensor, " n"]]


class Figures(ABC):
    """Numbers that an evaluation ends in, read from sums over samples.

    `chain` figures score what comes out of the chain after each block; `levels` figures score each
    block on its own levels, without the others.
    """

    kind: ClassVar[Literal["chain", "levels"]] = "chain"
    size: int
    """Length of the float64 vector whose sums over micro-batches, replicas and ranks are read."""

    def add(self, answer: Tensor, batch: Batch) -> Float[Tensor, " size"]:
        """The vector of a micro-batch, if the chain ended after this block. Kind `chain`."""
        raise NotImplementedError

    def measure(
        self, denoiser: Denoiser, batch: Batch, block: int, generator: torch.Generator
    ) -> Float[Tensor, " size"]:
        """The vector of a batch for this block. Kind `levels`."""
        raise NotImplementedError

    @abstractmethod
    def result(self, totals: Float[Tensor, "blocks size"]) -> dict[str, Any]:
        """Key of evaluation.json -> number, or list of numbers with one a block."""

    def identity(self) -> str:
        """What all ranks must have in common for their sums to add up."""
        return f"{type(self).__name__} of {self.size} numbers"

    def checked(self, scores: Tensor) -> Float[Tensor, " size"]:
        """The scores, on the CPU. Raises ConfigError where they are not `size` numbers."""
        if scores.shape != (self.size,):
            raise ConfigError(
                f"{type(self).__name__} gives scores of shape {tuple(scores.shape)} for a "
                f"micro-batch; its size says ({self.size},): sum over the samples"
            )
        return scores.cpu()


@dataclass(frozen=True)
class MainFigure:
    """The number that a task is judged by."""

    name: str
    is_higher_better: bool = True
    form: str = "{:.4f}"


class Task(ABC):
    """What is learned. One instance belongs to a run: it knows the data and the model."""

    main: MainFigure
    state_shape: tuple[int, ...]
    """Of one sample's state."""
    state_dtype: torch.dtype | None = None
    """None: that of the shared modules."""
    carry_shape: tuple[int, ...] = ()
    """Of what travels beside a sample's state, in the type of the shared modules."""

    @classmethod
    @abstractmethod
    def of(cls, config: Any, spec: Any, model: Model, process: Process) -> "Task":
        """The task of this run. Raises ConfigError where things do not fit together.

        config: a `Config`. spec: of the data set.
        """

    @classmethod
    def build_model(cls, config: Any, spec: Any, model_class: Any) -> Model:
        """The model for this data; the plain one where the mode asks for it."""
        if config.is_plain:
            return model_class.of(config.model, spec, is_plain=True)
        return model_class.of(config.model, spec)

    def describe(self) -> dict[str, Any]:
        """Options that change what an answer means, for manifests: blocks must agree in them."""
        return {}

    # Training

    @abstractmethod
    def condition(self, batch: Batch) -> Condition:
        """What the network sees besides the state."""

    def drop(self, condition: Condition, keep_N: Bool[Tensor, " n"]) -> Condition:
        """The condition where it is kept, and "no condition" elsewhere."""
        raise NotImplementedError(f"{type(self).__name__} has no unconditional input")

    @abstractmethod
    def clean(self, batch: Batch, shared: nn.Module) -> Tensor:
        """z0, the clean states; gradients may flow into shared modules."""

    @abstractmethod
    def loss(
        self,
        output: Tensor,
        z0: Tensor,
        batch: Batch,
        level_N: Tensor | None,
        weight_N: Tensor | None,
    ) -> Loss:
        """The loss of the head's output. weight_N makes every level count the same."""

    # Inference

    @abstractmethod
    def denoised(self, output: Tensor, shared: nn.Module) -> Tensor:
        """D(z), the clean state that the head's output stands for."""

    @abstractmethod
    def answer(self, output: Tensor, shared: nn.Module) -> Tensor:
        """The answer that the head's output stands for, one row a state."""

    def read(self, block: int, answer: Tensor, carry: Tensor) -> tuple[Tensor, Tensor]:
        """(what travels on, the answer if the chain ended with this block)."""
        return carry, answer

    def no_condition(self, condition: Condition, num_samples: int) -> Condition:
        """ "No condition" for as many samples, for guidance."""
        keep_N = torch.zeros(num_samples, dtype=torch.bool, device=_device_of(condition))
        return self.drop(condition, keep_N)

    def prepare(self, load: LoadSplit) -> None:  # noqa: B027
        """Puts on disk what figures need; one process a node calls it before any evaluation.

        load: gives the data set's split, "train" or "test".
        """

    @abstractmethod
    def figures(self) -> Sequence[Figures]:
        """The figures of an evaluation; the main figure is one of their results."""

    def preview(self, answers: Tensor) -> Tensor | str | None:
        """Some answers to look at: a picture, uint8 (C, H, W), or a text; None: nothing to see."""
        return None

    def requests(self, classes: Sequence[int] | None, num: int) -> Dataset:
        """Makes so many requests for `dbdist sample`, of these classes in turn (None: of all).

        Raises ConfigError.
        """
        raise ConfigError("this task draws no samples; `dbdist evaluate` scores its test set")

    def show(self, answers: Tensor, folder: Path) -> list[Path]:
        """Writes samples for a person to look at, as files called sample…; the files."""
        return []

    def loaded(self, answer: Answer, device: torch.device, dtype: torch.dtype) -> Any:
        """What `dbdist.load` returns for an exported model of this task."""
        return Loaded(self, answer, device, dtype)


class Loaded:
    """An exported model in one process: `model(batch)` gives the chain's answers."""

    def __init__(
        self, task: Task, answer: Answer, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.task, self.device, self.dtype = task, device, dtype
        self._answer = answer

    @torch.no_grad()
    def __call__(self, batch: Batch, first: int = 0) -> Tensor:
        """The answers to a batch of requests, on the CPU.

        batch: as the data set gives it. first: number of its first sample; the noise that a sample
        starts from depends on the number alone.
        """
        return self._answer(to_device(batch, self.device, self.dtype), first).cpu()

    def probe(self) -> None:
        """Raises what a wrong description would raise at the first use."""


def to_device(batch: Batch, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """The batch there; floating-point tensors in this type."""
    return {
        key: value.to(device, dtype if value.is_floating_point() else None, non_blocking=True)
        for key, value in batch.items()
    }


class Draws(NamedTuple):
    """The random part of a training batch: levels, what corrupts the states, what is kept."""

    level_N: Float[Tensor, " n"] | None
    corruption: Tensor | None
    keep_N: Bool[Tensor, " n"] | None

    def rows(self, start: int, stop: int) -> "Draws":
        """The draws of samples start..stop-1 of the batch."""
        return Draws(*(None if x is None else x[start:stop] for x in self))

    def to(self, device: torch.device) -> "Draws":
        return Draws(*(None if x is None else x.to(device, non_blocking=True) for x in self))


def draws_of_step(
    task: Task,
    process: Process,
    *,
    condition_dropout: float,
    seed: int,
    block: int,
    step: int,
    num_samples: int,
) -> Draws:
    """What the whole batch of this block's step draws, on the CPU.

    A function of seed, block and step alone: replicas take rows of the same draws, so R replicas
    train on what one process would.
    """
    dtype = task.state_dtype or torch.get_default_dtype()
    level_N = None
    if process.partition is not None:
        name = process.partition.level_name
        generator = seeds.generator(seed, name, block, step)
        level_N = process.partition.sample_level(block, num_samples, generator)
        level_N = level_N.to(torch.get_default_dtype())
    generator = seeds.generator(seed, "noise", block, step)
    corruption = process.draw((num_samples, *task.state_shape), generator, dtype)
    keep_N = None
    if condition_dropout > 0:
        generator = seeds.generator(seed, "condition", block, step)
        keep_N = torch.rand(num_samples, generator=generator) >= condition_dropout
    return Draws(level_N, corruption, keep_N)


class DenoisingLoss(nn.Module):
    """The training objective of one block: a batch and its draws to a loss.

    One module, so that data-parallel engines can wrap it.
    """

    def __init__(self, denoiser: Denoiser, task: Task) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.task = task

    def forward(self, batch: Batch, draws: Draws) -> Loss:
        task, process = self.task, self.denoiser.process
        condition = task.condition(batch)
        if draws.keep_N is not None:
            condition = task.drop(condition, draws.keep_N)
        z0 = task.clean(batch, self.denoiser.shared)
        if z0.shape[1:] != task.state_shape:
            raise ConfigError(
                f"{type(task).__name__}.clean gives states of shape {tuple(z0.shape[1:])}, but "
                f"state_shape is {task.state_shape}"
            )
        z = process.corrupt(z0, draws.level_N, draws.corruption)
        output = self.denoiser(condition, z, draws.level_N)
        weight_N = None if draws.level_N is None else process.weight(draws.level_N)
        return task.loss(output, z0, batch, draws.level_N, weight_N)


def _device_of(condition: Condition) -> torch.device:
    return condition.device if isinstance(condition, Tensor) else condition[0].device
