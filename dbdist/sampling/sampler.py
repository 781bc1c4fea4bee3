"""The sampler: steps of the process undone, each by the block that owns its level.

`Sampler.run_block` takes one block's steps; the chain calls it on one rank after the other, a
single process for every block in turn. States have any trailing shape and type. Does not
communicate. Source: EDM (2206.00364), Algorithm 1; DiffusionBlocks (2506.14202), section 3.4.
"""

# What torch and jsonargparse leave untyped:
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dbdist import seeds
from dbdist.build import Setup
from dbdist.processes.base import Process
from dbdist.processes.partition import Steps
from dbdist.tasks.base import Condition, Task

Denoise = Callable[[Condition, Tensor, Tensor], Tensor]
"""(condition, z, level_N) -> the head's output: a `Denoiser`."""


@dataclass(frozen=True)
class Rows:
    """Which samples of which batch a micro-batch holds; names their random numbers."""

    batch_idx: int
    start: int
    stop: int
    batch_size: int


@dataclass(frozen=True)
class Sampler:
    """The levels of the sampler, which block takes each, and how steps are taken.

    num_draws: states per sample whose answers are averaged. guidance_scale: 0 for none.
    """

    process: Process
    steps: Steps
    seed: int = 0
    start: Literal["mean", "noise"] = "mean"
    num_draws: int = 1
    guidance_scale: float = 0.0

    def initial_state(self, task: Task, rows: Rows, dtype: torch.dtype) -> Tensor:
        """First states of a micro-batch; the draws of a sample are adjacent.

        What a sample starts from depends on its batch and place alone. dtype: of the model.
        """
        size = (rows.batch_size * self.num_draws, *task.state_shape)
        generator = seeds.generator(self.seed, "sampler", rows.batch_idx)
        dtype = task.state_dtype or dtype
        z = self.process.start(size, self.start, self.steps.levels[0], generator, dtype)
        return z[rows.start * self.num_draws : rows.stop * self.num_draws]

    @torch.no_grad()
    def run_block(
        self,
        block: int,
        denoise: Denoise,
        task: Task,
        shared: nn.Module,
        condition: Condition,
        z: Tensor,
        rows: Rows | None = None,
    ) -> tuple[Tensor, Tensor]:
        """This block's steps on states z: the state for the next block, and this block's answer.

        condition: one row a sample; z: `num_draws` rows a sample. rows: names what steps draw. The
        answer is read from the block's last step, averaged over draws: one row a sample.
        """
        condition_of_z = _repeated(condition, self.num_draws)
        levels, output = self.steps.levels, None
        for i in self.steps.of(block):
            level_N = self._levels(levels[i], z)
            output = self.guided(denoise, task, condition_of_z, z, level_N)
            if i + 1 < len(levels):
                denoised = task.denoised(output, shared)
                draw = self._draw(i, task, rows, z) if self.process.draws_in_steps else None
                z = self.process.step(z, denoised, levels[i], levels[i + 1], draw)
        assert output is not None, f"block {block} takes no step"
        answer = task.answer(output, shared)
        if self.num_draws > 1:
            answer = answer.unflatten(0, (-1, self.num_draws)).mean(dim=1)
        return z, answer

    def guided(
        self, denoise: Denoise, task: Task, condition: Condition, z: Tensor, level_N: Tensor
    ) -> Tensor:
        """Classifier-free guidance on the head's output: u + scale (c - u)."""
        output = denoise(condition, z, level_N)
        if self.guidance_scale == 0:
            return output
        unconditional = denoise(task.no_condition(condition, len(z)), z, level_N)
        return unconditional + self.guidance_scale * (output - unconditional)

    def _levels(self, level: float, z: Tensor) -> Tensor:
        dtype = z.dtype if z.is_floating_point() else torch.get_default_dtype()
        return torch.full((len(z),), level, dtype=dtype, device=z.device)

    def _draw(self, step: int, task: Task, rows: Rows | None, z: Tensor) -> Tensor | None:
        """What a step draws for these rows: those of the whole batch's draw, wherever it is cut."""
        assert rows is not None, "steps that draw need to know their rows"
        generator = seeds.generator(self.seed, "step", rows.batch_idx, step)
        size = (rows.batch_size * self.num_draws, *task.state_shape)
        draw = self.process.draw(size, generator, z.dtype)
        if draw is None:
            return None
        return draw[rows.start * self.num_draws : rows.stop * self.num_draws].to(z.device)


def build_sampler(setup: Setup) -> Sampler:
    """The configured sampler. Raises ConfigError where it leaves a block out."""
    config, s = setup.config, setup.config.sampler
    steps = setup.process.steps(s, config.sampler_steps)
    if config.is_plain:
        return Sampler(setup.process, steps, config.seed)
    return Sampler(setup.process, steps, config.seed, s.start, s.num_draws, s.guidance_scale)


def describe_sampler(setup: Setup) -> dict[str, Any]:
    """The sampler with its defaults resolved; empty without a process to undo."""
    if setup.process.partition is None:
        return {}
    sampler = build_sampler(setup)
    resolved = {"num_steps": len(sampler.steps.levels)}
    start = f"{setup.process.partition.level_name}_start"
    return {**asdict(setup.config.sampler), **resolved, start: sampler.steps.levels[0]}


def _repeated(condition: Condition, times: int) -> Condition:
    if isinstance(condition, Tensor):
        return condition.repeat_interleave(times, dim=0)
    return tuple(_repeated(c, times) for c in condition)
