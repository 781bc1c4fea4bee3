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
from dbdist.processes.base import Process, SecondOrder
from dbdist.processes.partition import Steps
from dbdist.tasks.base import Condition, Task

Denoise = Callable[[Condition, Tensor, Tensor], Tensor]
"""(condition, z, level_N) -> the head's output: a `Denoiser`."""


@dataclass(frozen=True)
class Rows:
    """The numbers of the samples in a micro-batch.

    What is random for a sample depends on its number alone: the same seed gives the same sample,
    however the samples are cut into batches.
    """

    start: int
    stop: int

    def draw(
        self, seed: int, purpose: str, *keys: seeds.Key, of: Callable[[torch.Generator], Tensor]
    ) -> Tensor:
        """Joins what `of` draws for each sample, from a generator of the sample's own."""
        samples = range(self.start, self.stop)
        return torch.cat([of(seeds.generator(seed, purpose, i, *keys)) for i in samples])


@dataclass(frozen=True)
class Sampler:
    """The levels of the sampler, which block takes each, and how steps are taken.

    num_draws: states per sample whose answers are averaged. guidance_scale: 0 for none. order: 1,
    or 2 for Heun's method, whose second evaluation of a step, at the next step's level, is done by
    the same block: nothing more travels, even where the next level is another block's.
    """

    process: Process
    steps: Steps
    seed: int = 0
    start: Literal["mean", "noise"] = "mean"
    num_draws: int = 1
    guidance_scale: float = 0.0
    order: int = 1

    def initial_state(self, task: Task, rows: Rows, dtype: torch.dtype) -> Tensor:
        """First states of a micro-batch; the draws of a sample are adjacent.

        dtype: of the model.
        """
        size, level = (self.num_draws, *task.state_shape), self.steps.levels[0]
        dtype = task.state_dtype or dtype
        return rows.draw(
            self.seed,
            "sampler",
            of=lambda generator: self.process.start(size, self.start, level, generator, dtype),
        )

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
                denoised, ends = task.denoised(output, shared), (levels[i], levels[i + 1])
                draw = self._draw(i, task, rows, z) if self.process.draws_in_steps else None
                next_z = self.process.step(z, denoised, *ends, draw)
                if self.order == 2:
                    assert isinstance(self.process, SecondOrder)
                    level_N = self._levels(ends[1], z)
                    again = self.guided(denoise, task, condition_of_z, next_z, level_N)
                    next_denoised = task.denoised(again, shared)
                    next_z = self.process.corrected(z, denoised, next_z, next_denoised, *ends)
                z = next_z
        assert output is not None, f"block {block} takes no step"
        answer = task.answer(output, shared)
        if self.num_draws > 1:
            answer = answer.unflatten(0, (-1, self.num_draws)).mean(dim=1)
        return z, answer

    def guided(
        self, denoise: Denoise, task: Task, condition: Condition, z: Tensor, level_N: Tensor
    ) -> Tensor:
        """Classifier-free guidance on the head's output, u + scale (c - u), both in one pass."""
        if self.guidance_scale == 0:
            return denoise(condition, z, level_N)
        both = _joined(condition, task.no_condition(condition, len(z)))
        output = denoise(both, torch.cat([z, z]), torch.cat([level_N, level_N]))
        conditional, unconditional = output.chunk(2)
        return unconditional + self.guidance_scale * (conditional - unconditional)

    def _levels(self, level: float, z: Tensor) -> Tensor:
        dtype = z.dtype if z.is_floating_point() else torch.get_default_dtype()
        return torch.full((len(z),), level, dtype=dtype, device=z.device)

    def _draw(self, step: int, task: Task, rows: Rows | None, z: Tensor) -> Tensor | None:
        """What a step draws for these samples."""
        assert rows is not None, "steps that draw need to know their samples"
        size = (self.num_draws, *task.state_shape)

        def draw(generator: torch.Generator) -> Tensor:
            found = self.process.draw(size, generator, z.dtype)
            assert found is not None, "a process that draws in its steps draws something"
            return found

        return rows.draw(self.seed, "step", step, of=draw).to(z.device)


def build_sampler(setup: Setup) -> Sampler:
    """The configured sampler. Raises ConfigError where it leaves a block out."""
    config, s = setup.config, setup.config.sampler
    steps = setup.process.steps(s, config.sampler_steps)
    if config.is_plain:
        return Sampler(setup.process, steps, config.seed)
    return Sampler(
        setup.process, steps, config.seed, s.start, s.num_draws, s.guidance_scale, s.order
    )


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


def _joined(one: Condition, other: Condition) -> Condition:
    if isinstance(one, Tensor):
        return torch.cat([one, other])
    return tuple(_joined(a, b) for a, b in zip(one, other, strict=True))
