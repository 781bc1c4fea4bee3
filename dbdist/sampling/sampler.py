"""The sampler: Euler steps on the probability-flow ODE, each taken by the block that owns its noise
level.

`Sampler.run_block` takes one block's steps; the chain calls it on one rank after the other, a
single process for every block in turn. States have any trailing shape. Does not communicate.
Source: EDM (2206.00364), Algorithm 1 with first-order steps; DiffusionBlocks (2506.14202), section
3.4.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from dbdist import seeds
from dbdist.config.config import Config
from dbdist.processes.gaussian import NoiseSchedule

Denoise = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(condition, z, sigma_N) -> the head's output: a `Denoiser`, or its guided version."""


@runtime_checkable
class Readout(Protocol):
    """What the sampler asks of a task."""

    def denoised(self, output: Tensor) -> Tensor:
        """D(z), the clean state that the head's output stands for."""
        ...

    def probabilities(self, output: Tensor) -> Tensor:
        """The answer that the head's output stands for."""
        ...


@dataclass(frozen=True)
class Sampler:
    """The levels of the sampler and which block takes each.

    num_steps: evaluations in all. sigma_start: the first level, sigma_max when None. num_draws:
    states per sample whose answers are averaged. guidance_scale: 0 for none.
    """

    schedule: NoiseSchedule
    num_steps: int
    start: Literal["mean", "noise"] = "mean"
    sigma_start: float | None = None
    num_draws: int = 1
    guidance_scale: float = 0.0
    blocks: tuple[int, ...] | None = None
    """Owner of each step where it is not `schedule.block_of_step` (published weights resolve ties
    otherwise)."""

    @property
    def sigmas(self) -> Tensor:
        return self.schedule.grid(self.num_steps, self.sigma_start)

    def steps_of(self, block: int) -> list[int]:
        """Indices of the steps this block takes."""
        owners = self.blocks or self.schedule.block_of_step(self.num_steps, self.sigma_start)
        return [i for i, owner in enumerate(owners) if owner == block]

    def initial_state(
        self,
        num_samples: int,
        shape: tuple[int, ...],
        seed: int,
        batch_idx: int,
        dtype: torch.dtype,
    ) -> Tensor:
        """First z of a batch, (num_samples * num_draws, *shape); the draws of a sample are
        adjacent.

        `noise`: z0 is negligible beside sigma, so z ~ N(0, 1 + sigma^2) as published. `mean`: zero.
        """
        size = (num_samples * self.num_draws, *shape)
        if self.start == "mean":
            return torch.zeros(size, dtype=dtype)
        generator = seeds.generator(seed, "sampler", batch_idx)
        scale = math.sqrt(1 + float(self.sigmas[0]) ** 2)
        return scale * torch.randn(size, generator=generator, dtype=dtype)

    def run_block(
        self, block: int, denoise: Denoise, task: Readout, condition: Tensor, z: Tensor
    ) -> tuple[Tensor, Tensor]:
        """This block's steps on states z: the state for the next block, and this block's answer.

        condition: one row a sample; z: `num_draws` rows a sample. The answer is read from the
        block's last
        step, averaged over draws: one row a sample.
        """
        sigmas = self.sigmas
        condition_of_z = condition.repeat_interleave(self.num_draws, dim=0)
        output = None
        for i in self.steps_of(block):
            sigma_N = sigmas[i].to(z).expand(len(z))
            output = self.guided(denoise, condition_of_z, z, sigma_N)
            if i + 1 < self.num_steps:
                denoised = task.denoised(output)
                z = denoised + (sigmas[i + 1] / sigmas[i]).item() * (z - denoised)
        assert output is not None, f"block {block} takes no step"
        return z, task.probabilities(output).unflatten(0, (-1, self.num_draws)).mean(dim=1)

    def guided(self, denoise: Denoise, condition: Tensor, z: Tensor, sigma_N: Tensor) -> Tensor:
        """Classifier-free guidance on the head's output: u + scale (c - u), u for an all-zero
        condition."""
        output = denoise(condition, z, sigma_N)
        if self.guidance_scale == 0:
            return output
        unconditional = denoise(torch.zeros_like(condition), z, sigma_N)
        return unconditional + self.guidance_scale * (output - unconditional)


def build_sampler(config: Config) -> Sampler:
    s = config.sampler
    return Sampler(
        config.noise_schedule(),
        config.sampler_steps,
        s.start,
        s.sigma_start,
        s.num_draws,
        s.guidance_scale,
    )
