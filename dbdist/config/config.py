"""The configuration of a run: its sections, what follows from them, and their checks.

The checks need no data and no processes.
"""

# What torch and jsonargparse leave untyped:
# pyright: reportUnknownVariableType=false

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from itertools import accumulate
from typing import Any, Literal

from dbdist.config import registry
from dbdist.config.options import (
    CheckpointConfig,
    DataOptions,
    EvalConfig,
    ModelOptions,
    Options,
    ParallelConfig,
    ProcessOptions,
    SamplerOptions,
    TaskOptions,
    TrainConfig,
)
from dbdist.errors import ConfigError

Mode = Literal["block_parallel", "sequential", "end_to_end"]
Shared = Literal["coordinated", "sharded", "averaged", "private"]
_LARGEST = (1 << 63) - 1


@dataclass(frozen=True, kw_only=True)
class Config:
    """A run of dbdist."""

    run_dir: str = "runs/default"
    """Folder of the run's files: config.yaml, metrics.jsonl, TensorBoard's events, checkpoints/,
    evaluation.json."""
    seed: int = 0
    """Names every random stream: initial weights, data order, noise, dropout."""
    mode: Mode = "block_parallel"
    """One block per rank, all at once; one process training one random block a step, as published;
    or plain backpropagation through all layers, where noise, task, sampler and the cut into blocks
    mean nothing."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda when there is a GPU."""
    model: ModelOptions = field(default_factory=partial(registry.default_section, "model"))
    data: DataOptions = field(default_factory=partial(registry.default_section, "data"))
    noise: ProcessOptions = field(default_factory=partial(registry.default_section, "noise"))
    task: TaskOptions = field(default_factory=partial(registry.default_section, "task"))
    sampler: SamplerOptions = field(default_factory=partial(registry.default_section, "sampler"))
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    @property
    def num_blocks(self) -> int:
        """Blocks that are trained: model.num_blocks, or one of all layers in end_to_end."""
        return 1 if self.mode == "end_to_end" else self.model.num_blocks

    @property
    def trained_blocks(self) -> tuple[int, ...] | None:
        """The blocks of `parallel.blocks`, ascending; None: all."""
        blocks = self.parallel.blocks
        return tuple(sorted({blocks} if isinstance(blocks, int) else set(blocks or ()))) or None

    @property
    def is_joint(self) -> bool:
        """Whether this run trains all blocks; with parallel.blocks it trains some."""
        return self.parallel.blocks is None

    @property
    def shared(self) -> Shared:
        """How the blocks have the shared modules in common.

        coordinated: one set, with one optimizer; so has every mode but block_parallel. sharded: one
        set, whose optimizer is split over all ranks. averaged: each block steps a copy, and the
        copies are averaged now and then. private: each block steps a copy that no other block sees.
        """
        p = self.parallel
        if self.mode != "block_parallel":
            return "coordinated"
        if p.sync == "never" or not self.is_joint:
            return "private"
        if p.sync == "every":
            return "averaged"
        return "sharded" if p.coordinator == "sharded" else "coordinated"

    @property
    def has_copies(self) -> bool:
        """Whether each block steps a copy of the shared modules, which its own file holds."""
        return self.shared in ("averaged", "private")

    @property
    def layers_of_block(self) -> list[range]:
        """Layer indices of each block, block 0 first; contiguous and complete."""
        counts = (
            self.model.layers_per_block
            or (self.model.num_layers // self.num_blocks,) * self.num_blocks
        )
        if self.mode == "end_to_end":
            counts = (self.model.num_layers,)
        ends = list(accumulate(counts))
        return [range(end - count, end) for end, count in zip(ends, counts, strict=True)]

    @property
    def is_plain(self) -> bool:
        """Whether the network is trained without levels: an end-to-end control."""
        return self.mode == "end_to_end" and self.task.has_plain_control

    @property
    def sampler_steps(self) -> int:
        """Denoiser evaluations of the whole chain."""
        if self.is_plain:
            return 1
        return self.sampler.num_steps or 2 * self.num_blocks

    def max_steps(self, num_train: int) -> int:
        """Optimizer steps of each block, for a training set of this many samples."""
        if self.train.max_steps is not None:
            return self.train.max_steps
        assert self.train.epochs is not None  # validate() has seen to it
        return max(1, round(self.train.epochs * num_train / self.train.batch_size))

    def validate(self) -> "Config":
        """Returns self, or raises ConfigError for the first value that cannot be honoured."""
        check_values(self)
        for name, section in self.sections():
            if name in registry.SECTIONS:
                registry.find(name, getattr(section, "name"))  # noqa: B009
            section.check()
        if self.mode != "end_to_end":
            self.model.check_cut()
        if not self.is_plain:
            self.model.check_conditioned()
            self.sampler.check_blocks(self.num_blocks)
        parts = self.parallel.replicas * self.train.accumulation_steps
        if self.train.batch_size % parts:
            raise ConfigError(
                f"train.batch_size {self.train.batch_size} is not a multiple of "
                f"parallel.replicas x train.accumulation_steps = {parts}"
            )
        self._validate_parallel()
        if not self.is_plain:  # at last, as this imports torch
            process = registry.find("noise", self.noise.name).load()
            process.of(self.noise, self.num_blocks).steps(self.sampler, self.sampler_steps)
        return self

    def sections(self) -> Iterator[tuple[str, Options]]:
        """(name, section) of every section."""
        for option in fields(self):
            if isinstance(section := getattr(self, option.name), Options):
                yield option.name, section

    def _validate_parallel(self) -> None:
        p = self.parallel
        self._validate_blocks()
        has_copies = {
            "block_parallel": p.replicas > 1 or (p.sync == "step" and self.num_blocks > 1),
            "sequential": False,
            "end_to_end": True,
        }
        if p.check_every > 0 and not has_copies[self.mode]:
            raise ConfigError(
                "parallel.check_every compares weights that several ranks hold alike, which needs "
                "parallel.sync: step or parallel.replicas of 2 or more; leave it out"
            )
        if p.sync != "every" and (p.outer_lr != 1 or p.outer_momentum != 0):
            raise ConfigError(
                "parallel.outer_lr and parallel.outer_momentum need parallel.sync: every"
            )
        if self.mode == "block_parallel" and p.sync == "never" and p.coordinator != "colocated":
            raise ConfigError(
                f"parallel.coordinator: {p.coordinator} has nothing to do with parallel.sync: "
                "never; use colocated"
            )
        if p.sync == "every" and p.coordinator == "sharded":
            raise ConfigError(
                "parallel.coordinator: sharded splits the one optimizer that only parallel.sync: "
                "step has; with sync: every each block has its own, so use colocated"
            )
        if p.deepspeed_config is not None and p.replica_engine != "deepspeed":
            raise ConfigError("parallel.deepspeed_config needs parallel.replica_engine: deepspeed")
        if self.mode == "sequential" and p.replica_engine != "ddp":
            raise ConfigError(
                f"parallel.replica_engine: {p.replica_engine} has no replicas to serve in mode "
                "sequential; leave it out"
            )
        defaults = (1, "colocated", "step")
        if self.mode != "block_parallel" and (p.replicas, p.coordinator, p.sync) != defaults:
            raise ConfigError(
                "parallel.replicas, coordinator and sync belong to mode block_parallel, not "
                f"{self.mode} (end_to_end makes every process of torchrun a replica)"
            )

    def _validate_blocks(self) -> None:
        p, allowed = self.parallel, range(self.num_blocks)
        if p.blocks is None:
            return
        if self.mode != "block_parallel" or p.sync == "step":
            raise ConfigError(
                "parallel.blocks needs parallel.sync: every or never; with sync: step no block "
                "trains without the others"
            )
        if p.coordinator != "colocated":
            raise ConfigError(
                f"parallel.blocks trains blocks by themselves, which parallel.coordinator: "
                f"{p.coordinator} has nothing to do with; use colocated"
            )
        blocks = (p.blocks,) if isinstance(p.blocks, int) else p.blocks
        if not blocks or len(set(blocks)) < len(blocks) or not set(blocks) <= set(allowed):
            raise ConfigError(
                f"parallel.blocks is {p.blocks}; it must name different blocks of 0..{allowed[-1]}"
            )


def check_values(config: Config) -> None:
    """Raises ConfigError for a number outside its range, or a path that is none."""
    for key, owner, value in _values(config):
        allowed = owner.RANGES.get(key.rpartition(".")[2]) if isinstance(owner, Options) else None
        if isinstance(value, bool):
            continue
        if isinstance(value, int | float) and allowed is not None:
            allowed.check(key, value)
        elif isinstance(value, int) and not -_LARGEST <= value <= _LARGEST:
            raise ConfigError(f"{key} is far too large; it may be {_LARGEST} at most")
        elif isinstance(value, str):
            _check_name(key, value)


def _check_name(key: str, value: str) -> None:
    try:
        name = os.fsencode(value)
        longest = max(map(len, name.split(b"/")))
        if key == "run_dir":
            name.decode()  # safetensors opens no other names
    except UnicodeError:
        longest = 0
    if "\0" in value or not 0 < longest < 256 or len(value) > 2000:
        raise ConfigError(f"{key} is {value[:80]!r}, which cannot be a path or name")


def _values(section: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, its section, value) of every option; of a list, each value."""
    for option in fields(section):
        value, key = getattr(section, option.name), f"{prefix}{option.name}"
        if is_dataclass(value):
            yield from _values(value, f"{key}.")
        else:
            for item in value if isinstance(value, tuple) else (value,):
                yield key, section, item
