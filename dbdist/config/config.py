"""The configuration of a run: the sections of `options`, what follows from them, and the checks
that need no data and no processes."""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from itertools import accumulate
from typing import Any, Literal

from dbdist.config.options import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    ModelConfig,
    NoiseConfig,
    ParallelConfig,
    SamplerConfig,
    TaskConfig,
    TrainConfig,
)
from dbdist.errors import ConfigError
from dbdist.processes.gaussian import NoiseSchedule

Mode = Literal["block_parallel", "sequential", "end_to_end"]
Shared = Literal["coordinated", "sharded", "averaged", "private"]


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
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
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
    def mlp_size(self) -> int:
        if self.model.mlp_size is None:
            return 4 * self.model.hidden_size
        return self.model.mlp_size

    @property
    def sampler_steps(self) -> int:
        return self.sampler.num_steps or 2 * self.num_blocks

    @property
    def readout_blocks(self) -> tuple[int, ...]:
        """Blocks whose probabilities make the answer."""
        if self.sampler.readout == "last":
            return (self.num_blocks - 1,)
        if self.sampler.readout == "all":
            return tuple(range(self.num_blocks))
        return tuple(sorted(set(self.sampler.readout)))

    def noise_schedule(self) -> NoiseSchedule:
        """The partition that this configuration trains and samples with."""
        n = self.noise
        return NoiseSchedule(
            self.num_blocks,
            n.p_mean,
            n.p_std,
            n.sigma_min,
            n.sigma_max,
            n.sigma_data,
            n.overlap,
            n.partition,
        )

    def max_steps(self, num_train: int) -> int:
        """Optimizer steps of each block, for a training set of this many samples."""
        if self.train.max_steps is not None:
            return self.train.max_steps
        assert self.train.epochs is not None  # validate() has seen to it
        return max(1, round(self.train.epochs * num_train / self.train.batch_size))

    def validate(self) -> "Config":
        """Raises ConfigError for the first value or combination that cannot be honoured; returns
        self."""
        _validate_values(self)
        self._validate_model()
        self._validate_train()
        self._validate_parallel()
        self.noise_schedule()
        if self.mode != "end_to_end":
            self._validate_sampler()
        _at_least(
            0,
            checkpoint__every_steps=self.checkpoint.every_steps,
            eval__every_steps=self.eval.every_steps,
        )
        _at_least(
            1,
            checkpoint__keep_last=self.checkpoint.keep_last,
            eval__batch_size=self.eval.batch_size,
            eval__micro_batch_size=self.eval.micro_batch_size,
        )
        _at_least(
            0,
            data__num_workers=self.data.num_workers,
            data__augment__crop_padding=self.data.augment.crop_padding,
            data__augment__randaugment_ops=self.data.augment.randaugment_ops,
        )
        _between(
            0, 30, data__augment__randaugment_magnitude=self.data.augment.randaugment_magnitude
        )
        if self.data.image_size is not None:
            _at_least(1, data__image_size=self.data.image_size)
        return self

    def _validate_model(self) -> None:
        m = self.model
        _at_least(
            1,
            model__num_blocks=m.num_blocks,
            model__num_layers=m.num_layers,
            model__hidden_size=m.hidden_size,
            model__num_heads=m.num_heads,
            model__patch_size=m.patch_size,
            model__mlp_size=self.mlp_size,
        )
        _between(0, 1, model__dropout=m.dropout, model__attention_dropout=m.attention_dropout)
        if m.hidden_size % m.num_heads:
            raise ConfigError(
                f"model.num_heads {m.num_heads} does not divide model.hidden_size {m.hidden_size}"
            )
        if self.mode != "end_to_end" and m.hidden_size < 6:
            raise ConfigError(
                f"model.hidden_size is {m.hidden_size}; the noise-level embedding is a sixth of "
                "it, so it must be at least 6"
            )
        if self.mode == "end_to_end":
            return
        if m.layers_per_block is None:
            if m.num_layers % m.num_blocks:
                raise ConfigError(
                    f"model.num_blocks {m.num_blocks} does not divide model.num_layers "
                    f"{m.num_layers}; choose a divisor or give model.layers_per_block"
                )
        elif len(m.layers_per_block) != m.num_blocks or sum(m.layers_per_block) != m.num_layers:
            raise ConfigError(
                f"model.layers_per_block {list(m.layers_per_block)} must have {m.num_blocks} "
                f"entries (model.num_blocks) that add up to {m.num_layers} (model.num_layers)"
            )
        elif min(m.layers_per_block) < 1:
            raise ConfigError("model.layers_per_block: every block needs at least 1 layer")

    def _validate_train(self) -> None:
        t = self.train
        if t.max_steps is None and t.epochs is None:
            raise ConfigError("train.max_steps and train.epochs are both null; give one of them")
        _at_least(
            1,
            train__max_steps=t.max_steps if t.max_steps is not None else 1,
            train__batch_size=t.batch_size,
            train__accumulation_steps=t.accumulation_steps,
            train__log_every=t.log_every,
        )
        _at_least(
            0,
            train__warmup_steps=t.warmup_steps,
            train__weight_decay=t.weight_decay,
            train__max_skipped=t.max_skipped,
        )
        if t.schedule == "constant" and t.min_lr_ratio != 0:
            raise ConfigError("train.min_lr_ratio needs train.schedule: cosine")
        if t.schedule_steps is not None:
            _at_least(1, train__schedule_steps=t.schedule_steps)
            if t.schedule != "cosine":
                raise ConfigError("train.schedule_steps needs train.schedule: cosine")
        for key, value in (
            ("lr", t.lr),
            ("eps", t.eps),
            ("epochs", t.epochs),
            ("clip_norm", t.clip_norm),
        ):
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"train.{key} is {value}; it must be greater than 0")
        _between(
            0,
            1,
            train__min_lr_ratio=t.min_lr_ratio,
            task__condition_dropout=self.task.condition_dropout,
        )
        if not all(0 <= beta < 1 for beta in t.betas):
            raise ConfigError(
                f"train.betas is {list(t.betas)}; both must be at least 0 and below 1"
            )
        if not 0 <= t.ema_decay < 1:
            raise ConfigError(
                f"train.ema_decay is {t.ema_decay}; it must be at least 0 and below 1"
            )
        parts = self.parallel.replicas * t.accumulation_steps
        if self.parallel.replicas >= 1 and t.batch_size % parts:
            raise ConfigError(
                f"train.batch_size {t.batch_size} is not a multiple of parallel.replicas x "
                f"train.accumulation_steps = {parts}"
            )

    def _validate_parallel(self) -> None:
        p = self.parallel
        _at_least(1, parallel__replicas=p.replicas, parallel__sync_every=p.sync_every)
        _at_least(0, parallel__check_every=p.check_every)
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
        if not 0 < p.timeout_s < 1e7:
            raise ConfigError(f"parallel.timeout_s is {p.timeout_s}; it must lie between 0 and 1e7")
        if not p.outer_lr > 0:
            raise ConfigError(f"parallel.outer_lr is {p.outer_lr}; it must be greater than 0")
        if not 0 <= p.outer_momentum < 1:
            raise ConfigError(
                f"parallel.outer_momentum is {p.outer_momentum}; it must be at least 0 and below 1"
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

    def _validate_sampler(self) -> None:
        s = self.sampler
        if s.num_steps is not None and s.num_steps < self.num_blocks:
            raise ConfigError(
                f"sampler.num_steps is {s.num_steps}; every one of the {self.num_blocks} blocks "
                "needs a step"
            )
        self.noise_schedule().block_of_step(self.sampler_steps, s.sigma_start)
        _at_least(1, sampler__num_draws=s.num_draws)
        if s.num_draws > 1 and s.start == "mean":
            raise ConfigError(
                f"sampler.num_draws is {s.num_draws}, but sampler.start: mean draws nothing; use "
                "start: noise"
            )
        if not 0 <= s.guidance_scale < math.inf:
            raise ConfigError(
                f"sampler.guidance_scale is {s.guidance_scale}; it must be at least 0"
            )
        if not self.readout_blocks or not all(
            0 <= b < self.num_blocks for b in self.readout_blocks
        ):
            raise ConfigError(
                f"sampler.readout is {s.readout}; allowed are last, all or a list of blocks "
                f"0..{self.num_blocks - 1}"
            )


LARGEST: dict[str, int] = {
    "model.num_layers": 10_000,
    "model.num_blocks": 10_000,
    "model.hidden_size": 2**20,
    "model.mlp_size": 2**22,
    "model.patch_size": 2**14,
    "data.image_size": 2**14,
    "data.num_workers": 1024,
    "data.augment.crop_padding": 2**14,
    "data.augment.randaugment_ops": 1000,
    "sampler.num_steps": 100_000,
    "train.max_steps": 10**8,
    "train.epochs": 10**6,
}
"""Beyond these, memory ends before anything can be told. Other whole numbers have 64 bits."""


def _validate_values(config: Config) -> None:
    """Raises ConfigError for a number that is too large for any run, or a path that is none."""
    for key, value in _values(config):
        largest: int = LARGEST.get(key, (1 << 63) - 1)
        if isinstance(value, int) and not -largest <= value <= largest:
            shown = value if abs(value) < 2**64 else "far too large"
            raise ConfigError(f"{key} is {shown}; it may be {largest} at most")
        if isinstance(value, float) and key in LARGEST and not value <= largest:
            raise ConfigError(f"{key} is {value}; it may be {largest} at most")
        if isinstance(value, str):
            try:
                longest = max(map(len, os.fsencode(value).split(b"/")))
            except UnicodeError:
                longest = 0
            if "\0" in value or not 0 < longest < 256 or len(value) > 2000:
                raise ConfigError(f"{key} is {value[:80]!r}, which can be no path or name")


def _values(section: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every option; of a list, each value."""
    for option in fields(section):
        value, key = getattr(section, option.name), f"{prefix}{option.name}"
        if is_dataclass(value):
            yield from _values(value, f"{key}.")
        else:
            yield from ((key, v) for v in (value if isinstance(value, tuple) else (value,)))


def _at_least(bound: int, **values: int | float) -> None:
    for key, value in values.items():
        if not value >= bound:
            raise ConfigError(f"{key.replace('__', '.')} is {value}; it must be at least {bound}")


def _between(low: int, high: int, **values: int | float) -> None:
    for key, value in values.items():
        if not low <= value <= high:
            raise ConfigError(
                f"{key.replace('__', '.')} is {value}; it must lie between {low} and {high}"
            )
