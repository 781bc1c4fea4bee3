"""Makes task, model, process and modules from a configuration: what a rank needs, no more.

Weights are left empty where a checkpoint will fill them (seed None). Does not communicate.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dbdist.config import registry
from dbdist.config.config import Config
from dbdist.errors import ConfigError
from dbdist.models.base import Block, Model, build_block, build_shared, materialise
from dbdist.models.denoiser import Denoiser
from dbdist.processes.base import Process
from dbdist.processes.direct import Direct
from dbdist.tasks.base import DenoisingLoss, Task


@dataclass(frozen=True)
class Setup:
    """What a configuration means for a data set: the task, the model and the process."""

    config: Config
    spec: Any
    """Of the data set: what a model must know of it; has `identity()`."""
    task: Task
    model: Model
    process: Process

    def shared(self, seed: int | None, device: torch.device) -> nn.Module:
        """The shared modules."""
        module = build_shared(self.model)
        return materialise(module, device, self._weights(module, seed))

    def block(self, index: int, seed: int | None, device: torch.device) -> Block:
        """One block; on the meta device it stays empty."""
        layers = self.config.layers_of_block[index]
        recompute = self.config.train.activation_checkpointing
        module = build_block(self.model, layers, recompute=recompute)
        if device.type == "meta":
            return module
        return materialise(module, device, self._weights(module, seed))

    def denoiser(self, shared: nn.Module, block: nn.Module) -> Denoiser:
        """Shared modules and a block as the model that runs."""
        return Denoiser(shared, block, self.process)

    def objective(self, denoiser: Denoiser) -> DenoisingLoss:
        """The training objective around it."""
        return DenoisingLoss(denoiser, self.task)

    def describe(self) -> dict[str, Any]:
        """What a checkpoint must agree with: task, model, cut, process and the data's form."""
        partition = self.process.partition
        return {
            "mode": "end_to_end" if self.config.is_plain else "blocks",
            "task": self.config.task.name,
            "task_options": self.task.describe() or None,  # None in older checkpoints too
            "data": self.spec.name,  # before what follows from it
            "architecture": self.model.describe(),
            "layers_per_block": [len(layers) for layers in self.config.layers_of_block],
            "boundaries": partition.boundaries.tolist() if partition else None,
            "noise": None if self.config.is_plain else self.process.describe(),
            "inputs": _inputs(self.spec),
        }

    def _weights(self, module: nn.Module, seed: int | None) -> Any:
        return None if seed is None else self.model.weights(module, seed)


def _inputs(spec: Any) -> dict[str, Any]:
    """Form and scaling of the samples: what weights rely on, whatever classes are called."""
    return {k: v for k, v in spec.identity().items() if k not in ("name", "class_names")}


def build_setup(config: Config, spec: Any) -> Setup:
    """Raises ConfigError where task, model, process and data do not fit together."""
    task_class = registry.find("task", config.task.name).load()
    model_class = registry.find("model", config.model.name).load()
    process = build_process(config)
    try:
        model = task_class.build_model(config, spec, model_class)
        task = task_class.of(config, spec, model, process)
    except (AttributeError, TypeError) as error:  # of a spec or a model of another kind
        raise ConfigError(
            f"task {config.task.name}, model {config.model.name} and data {config.data.name} do "
            f"not fit together ({error}); choose others with task.name, model.name, data.name"
        ) from None
    needs = {"task.condition_dropout": config.task.condition_dropout}
    needs |= {} if config.is_plain else {"sampler.guidance_scale": config.sampler.guidance_scale}
    for key, value in needs.items():
        if value > 0 and type(task).drop is Task.drop:
            raise ConfigError(
                f"{key} is {value}, but task {config.task.name} has no unconditional input "
                "(Task.drop); leave it out"
            )
    return Setup(config, spec, task, model, process)


def build_process(config: Config) -> Process:
    """The process of this mode. Raises ConfigError."""
    if config.is_plain:
        return Direct()
    code = registry.find("noise", config.noise.name).load()
    return code.of(config.noise, config.num_blocks)
