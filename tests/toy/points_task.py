"""A toy task: a point of the plane for each angle, with its data. Nothing of it is in dbdist."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dbdist import seeds
from dbdist.config import registry
from dbdist.config.options import DataOptions, Ranges, SamplerOptions, TaskOptions
from dbdist.config.ranges import at_least
from dbdist.data.base import Batch, Key
from dbdist.errors import ConfigError
from dbdist.models.denoiser import Denoiser
from dbdist.processes.options import GaussianSamplerOptions
from dbdist.tasks.base import Figures, Loss, MainFigure, Task

# Data: angles in, points of a noisy spiral out.


@dataclass(frozen=True, kw_only=True)
class PointsOptions(DataOptions):
    """Points of a spiral."""

    RANGES: ClassVar[Ranges] = {**DataOptions.RANGES, "num_points": at_least(1)}

    name: str = "points"
    """Data set: points of a spiral."""
    num_points: int = 96
    """Points of the training set; the test set has a third of them."""


@dataclass(frozen=True)
class PointsSpec:
    """What the model must know of the points."""

    name: str = "points"
    num_inputs: int = 2
    num_outputs: int = 2

    def identity(self) -> dict[str, Any]:
        return asdict(self)


class Points:
    """One split. See `dbdist.data.base.Dataset`."""

    augments = False

    def __init__(self, num_points: int, split: str) -> None:
        self.spec = PointsSpec()
        generator = seeds.generator(0, "points", split)
        turn_N = torch.rand(num_points, generator=generator)
        angle_N = 6.28 * turn_N
        self.inputs = torch.stack([angle_N.cos(), angle_N.sin()], dim=1)
        self.targets = self.inputs * turn_N[:, None]

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitems__(self, keys: list[Key]) -> Batch:
        index = torch.tensor([key if isinstance(key, int) else key[0] for key in keys])
        return {"input": self.inputs[index], "target": self.targets[index]}

    def digest(self) -> str:
        return hashlib.sha256(self.targets.numpy().tobytes()).hexdigest()


def dataset_spec(options: PointsOptions) -> PointsSpec:
    return PointsSpec()


def load_dataset(options: PointsOptions, split: str) -> Points:
    return Points(options.num_points if split == "train" else options.num_points // 3, split)


def prepare(options: PointsOptions) -> None:
    """There are no files."""


def spec_from(values: dict[str, Any]) -> PointsSpec:
    return PointsSpec(**values)


# The task: denoise the point.


@dataclass(frozen=True, kw_only=True)
class PointsTaskOptions(TaskOptions):
    """Regression of points."""

    sampler: ClassVar[type[SamplerOptions]] = GaussianSamplerOptions
    defaults: ClassVar[Mapping[str, Any]] = {
        "model.name": "points_mlp",
        "noise.name": "gaussian",
        "data.name": "points",
        "noise.p_mean": -0.5,
        "sampler.start": "mean",
    }

    name: str = "points"
    """Task: the point that belongs to an angle."""


class PointsTask(Task):
    """Denoise the point; the condition is its angle."""

    main = MainFigure("mse", is_higher_better=False, form="{:.6f}")
    state_shape = (2,)

    @classmethod
    def of(cls, config: Any, spec: Any, model: Any, process: Any) -> "PointsTask":
        if getattr(spec, "num_outputs", None) != 2:
            raise ConfigError(f"task points needs points of the plane, {spec.name} has others")
        return cls()

    def condition(self, batch: Any) -> Tensor:
        return batch["input"]

    def drop(self, condition: Tensor, keep_N: Tensor) -> Tensor:
        return condition * keep_N[:, None]

    def clean(self, batch: Any, shared: nn.Module) -> Tensor:
        return batch["target"]

    def loss(self, output: Tensor, z0: Tensor, batch: Any, level_N: Any, weight_N: Any) -> Loss:
        squared_N = (output - z0).square().sum(dim=-1)
        return Loss((weight_N * squared_N).mean(), {"squared_error": squared_N.detach()})

    def denoised(self, output: Tensor, shared: nn.Module) -> Tensor:
        return output

    def answer(self, output: Tensor, shared: nn.Module) -> Tensor:
        return output

    def figures(self) -> list[Figures]:
        return [PointFigures(), LevelFigures()]


class PointFigures(Figures):
    """Mean squared error after every block of the chain."""

    size = 2

    def add(self, answer: Tensor, batch: Any) -> Tensor:
        squared_N = (answer - batch["target"]).square().sum(dim=-1).double()
        return torch.stack([squared_N.sum(), torch.ones_like(squared_N).sum()])

    def result(self, totals: Tensor) -> dict[str, Any]:
        mse = (totals[:, 0] / totals[:, 1]).tolist()
        return {"mse": mse[-1], "mse_after_block": mse}


class LevelFigures(Figures):
    """Mean squared error of each block on its own levels, without the others."""

    kind = "levels"
    size = 2

    def measure(
        self, denoiser: Denoiser, batch: Any, block: int, generator: torch.Generator
    ) -> Tensor:
        process, target = denoiser.process, batch["target"]
        assert process.partition is not None
        level_N = process.partition.sample_level(block, len(target), generator).to(target)
        draw = process.draw(tuple(target.shape), generator, target.dtype)
        z = process.corrupt(target, level_N, None if draw is None else draw.to(target.device))
        squared_N = (denoiser(batch["input"], z, level_N) - target).square().sum(dim=-1).double()
        return torch.stack([squared_N.sum(), torch.ones_like(squared_N).sum()])

    def result(self, totals: Tensor) -> dict[str, Any]:
        return {"mse_of_block": (totals[:, 0] / totals[:, 1]).tolist()}


def register() -> None:
    """One line in each registry."""
    task, model = __name__, "toy.points_model"
    registry.TASKS["points"] = registry.Plugin(f"{task}:PointsTaskOptions", f"{task}:PointsTask")
    registry.MODELS["points_mlp"] = registry.Plugin(
        f"{model}:PointsModelOptions", f"{model}:PointsModel"
    )
    registry.DATASETS["points"] = registry.Plugin(f"{task}:PointsOptions", task)
