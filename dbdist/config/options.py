"""The options that every task has in common: key, type, default, help, range.

`configs/*.yaml` say what differs from these defaults; `--section.key value` on the command line
wins over both. The classes that a name selects (`tasks/options.py` and its like) build on the base
classes here. `config.Config` holds the sections together.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from dbdist.config.ranges import FRACTION, FRACTION_BELOW_1, POSITIVE, Range, at_least
from dbdist.errors import ConfigError

Ranges = Mapping[str, Range]
"""Option name -> the numbers that are allowed."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """A section of the configuration. It says which numbers its options may be."""

    RANGES: ClassVar[Ranges] = {}

    def check(self) -> None:
        """Raises ConfigError where options of this section do not go together."""


@dataclass(frozen=True, kw_only=True)
class ModelOptions(Options):
    """A residual network and how it is cut into blocks. Each architecture adds its own sizes."""

    RANGES: ClassVar[Ranges] = {
        "num_blocks": at_least(1, 10_000),
        "num_layers": at_least(1, 10_000),
    }

    name: str
    """Architecture; `dbdist.config.registry.MODELS` lists them."""
    num_blocks: int = 3
    """Blocks B, each trained on its own range of noise levels; end_to_end has one."""
    num_layers: int = 6
    """Layers over all blocks."""
    layers_per_block: tuple[int, ...] | None = None
    """Layers of block 0 (most noise, first layers), 1, …; null: num_layers / num_blocks each."""

    def check_conditioned(self) -> None:
        """Raises ConfigError where the network cannot be told a noise level."""

    def check_cut(self) -> None:
        """Raises ConfigError where the layers cannot be cut into these blocks."""
        counts = self.layers_per_block
        if counts is None:
            if self.num_layers % self.num_blocks:
                raise ConfigError(
                    f"model.num_blocks {self.num_blocks} does not divide model.num_layers "
                    f"{self.num_layers}; choose a divisor or give model.layers_per_block"
                )
        elif len(counts) != self.num_blocks or sum(counts) != self.num_layers:
            raise ConfigError(
                f"model.layers_per_block {list(counts)} must have {self.num_blocks} entries "
                f"(model.num_blocks) that add up to {self.num_layers} (model.num_layers)"
            )
        elif min(counts) < 1:
            raise ConfigError("model.layers_per_block: every block needs at least 1 layer")


@dataclass(frozen=True, kw_only=True)
class ProcessOptions(Options):
    """How a clean state is corrupted. Each process adds its own levels."""

    name: str
    """Process; `dbdist.config.registry.PROCESSES` lists them."""


@dataclass(frozen=True, kw_only=True)
class DataOptions(Options):
    """Where the samples come from. Each family of data sets adds its own keys."""

    RANGES: ClassVar[Ranges] = {"num_workers": at_least(0, 1024)}

    name: str
    """Data set; `dbdist.config.registry.DATASETS` lists them."""
    root: str = "data"
    """Folder of the data set's files; what can be downloaded goes there once per node."""
    num_workers: int = 0
    """Processes per rank that load and augment ahead of training; 0: in the training process."""
    on_error: Literal["stop", "skip"] = "stop"
    """A picture that cannot be read: the run saves and stops, or another picture of its class takes
    its place, always the same one, and a warning names it."""


@dataclass(frozen=True, kw_only=True)
class SamplerOptions(Options):
    """How the chain of blocks makes an answer. Each task adds its own keys and defaults."""

    RANGES: ClassVar[Ranges] = {
        "num_steps": at_least(1, 100_000),
        "num_draws": at_least(1),
        "guidance_scale": at_least(0),
        "rho": POSITIVE,
    }

    num_steps: int | None = None
    """Denoiser evaluations over the whole chain, at least num_blocks; null: 2 x num_blocks."""
    grid: Literal["partition", "rho"] = "partition"
    """Levels of the steps: equal steps of what the blocks share (partition), or equal steps of
    level^(1/rho) (rho), where a block may get many steps and another few."""
    rho: float = 7.0
    """With grid: rho, the exponent; > 0. EDM (2206.00364), equation 5."""
    start: Literal["mean", "noise"] = "noise"
    """First state: a draw of the process at the starting level, or its mean."""
    num_draws: int = 1
    """First states whose answers are averaged; more than 1 needs start: noise."""
    guidance_scale: float = 0.0
    """u + scale (c - u) of unconditional and conditional output; 0: no guidance."""

    @property
    def start_level(self) -> float | None:
        """Level of the first evaluation; None: the process's highest."""
        return None

    @property
    def order(self) -> int:
        """Slopes of which a step takes the mean: 1 (Euler), or 2 (Heun) where the process can."""
        return 1

    def check_blocks(self, num_blocks: int) -> None:
        """Raises ConfigError where this many blocks cannot be sampled like this."""
        if self.num_steps is not None and self.num_steps < num_blocks:
            raise ConfigError(
                f"sampler.num_steps is {self.num_steps}; every one of the {num_blocks} blocks "
                "needs a step"
            )

    def check(self) -> None:
        if self.grid != "rho" and self.rho != type(self).rho:
            raise ConfigError(f"sampler.rho is {self.rho:g}, which needs sampler.grid: rho")
        if self.num_draws > 1 and self.start == "mean":
            raise ConfigError(
                f"sampler.num_draws is {self.num_draws}, but sampler.start: mean draws nothing; "
                "use start: noise"
            )


@dataclass(frozen=True, kw_only=True)
class TaskOptions(Options):
    """What is learned. Each task adds its own keys."""

    RANGES: ClassVar[Ranges] = {"condition_dropout": FRACTION}
    sampler: ClassVar[type[SamplerOptions]] = SamplerOptions
    """The class of the section `sampler` for this task."""
    defaults: ClassVar[Mapping[str, Any]] = {}
    """Defaults of other sections that differ for this task, by dotted key; names included."""
    has_plain_control: ClassVar[bool] = False
    """Whether mode end_to_end trains a network without levels instead of one block of all."""

    name: str
    """Task; `dbdist.config.registry.TASKS` lists them."""
    condition_dropout: float = 0.0
    """Probability of training a sample without its condition, for guidance; 0 to 1."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Options):
    """Optimization. Steps are optimizer steps of one block, in every mode."""

    RANGES: ClassVar[Ranges] = {
        "max_steps": at_least(1, 10**8),
        "epochs": Range(low=0, is_low_open=True, high=10**6),
        "batch_size": at_least(1),
        "accumulation_steps": at_least(1),
        "lr": POSITIVE,
        "schedule_steps": at_least(1),
        "warmup_steps": at_least(0),
        "min_lr_ratio": FRACTION,
        "weight_decay": at_least(0),
        "betas": FRACTION_BELOW_1,
        "eps": POSITIVE,
        "clip_norm": POSITIVE,
        "ema_decay": FRACTION_BELOW_1,
        "ema_rampup": FRACTION,
        "max_skipped": at_least(0),
        "log_every": at_least(1),
    }

    max_steps: int | None = None
    """Steps of each block; wins over epochs."""
    epochs: float | None = None
    """Passes of each block over the training set; used when max_steps is null."""
    batch_size: int = 128
    """Samples per block and step, over all replicas and accumulation steps, which divide it."""
    accumulation_steps: int = 1
    """Forward and backward passes per step, each over an equal part of the batch."""
    lr: float = 1e-3
    """AdamW learning rate after warm-up."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after warm-up: constant, or half a cosine down to min_lr_ratio x lr."""
    schedule_steps: int | None = None
    """Step at which the cosine ends; null: the last step. Give it to train on later with the same
    schedule, whatever max_steps is."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly from 0."""
    min_lr_ratio: float = 0.0
    """Where the cosine ends, as a fraction of lr; 0 to 1."""
    weight_decay: float = 0.01
    """AdamW weight decay, on all parameters."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW decay rates of the first and second moment."""
    eps: float = 1e-8
    """AdamW epsilon."""
    clip_norm: float | None = 1.0
    """Largest global norm of the gradients of a block and its shared modules; null: no clipping."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Compute type of the backbone (autocast), also in evaluation; the rest stays in fp32."""
    activation_checkpointing: bool = False
    """Recompute layers in backward instead of keeping activations: less memory, more time."""
    ema_decay: float = 0.0
    """Decay, per optimizer step, of averaged weights for evaluation and export; 0: off."""
    ema_rampup: float = 0.0
    """Half-life of the averages early on, as a fraction of the steps so far, until ema_decay's own
    is shorter; 0: ema_decay from the first step. EDM takes 0.05."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """A block whose loss or gradient is not finite: all ranks stop, or that step of the block is
    skipped and counted."""
    max_skipped: int = 10
    """With nonfinite: skip, steps in a row that a block may skip before all ranks stop."""
    log_every: int = 10
    """Steps between lines of metrics."""

    def check(self) -> None:
        if self.max_steps is None and self.epochs is None:
            raise ConfigError("train.max_steps and train.epochs are both null; give one of them")
        if self.ema_rampup > 0 and self.ema_decay == 0:
            raise ConfigError("train.ema_rampup needs train.ema_decay, the decay that it leads to")
        if self.schedule != "cosine":
            for key, is_given in (
                ("min_lr_ratio", self.min_lr_ratio != 0),
                ("schedule_steps", self.schedule_steps is not None),
            ):
                if is_given:
                    raise ConfigError(f"train.{key} needs train.schedule: cosine")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(Options):
    """Which rank does what (block_parallel; the other modes have no blocks to spread)."""

    RANGES: ClassVar[Ranges] = {
        "replicas": at_least(1),
        "sync_every": at_least(1),
        "outer_lr": POSITIVE,
        "outer_momentum": FRACTION_BELOW_1,
        "check_every": at_least(0),
        "timeout_s": Range(low=0, is_low_open=True, high=1e7, is_high_open=True),
    }

    replicas: int = 1
    """Data-parallel copies R of each block; the world has num_blocks x R ranks."""
    replica_engine: Literal["ddp", "fsdp", "deepspeed"] = "ddp"
    """How the copies of a block share its work: every rank with the whole block (ddp), or its
    weights, gradients and optimizer split among them by FSDP2 (fsdp) or DeepSpeed ZeRO (deepspeed).
    Also for end_to_end, whose copies are all processes."""
    deepspeed_config: str | None = None
    """Standard DeepSpeed JSON file, for replica_engine: deepspeed; null: ZeRO stage 1. Batch sizes,
    clipping, precision and optimizer come from this configuration."""
    coordinator: Literal["colocated", "dedicated", "sharded"] = "colocated"
    """Owner of the shared modules and their optimizer: rank 0 beside block 0 (colocated), a rank 0
    without a block, so one rank more (dedicated), or a shard on every rank (sharded, for large
    embeddings)."""
    sync: Literal["step", "every", "never"] = "step"
    """Shared modules: gradients averaged each step; parameters averaged every sync_every steps; or
    never, each block keeping its own."""
    sync_every: int = 20
    """Steps between averages of the shared parameters with sync: every."""
    outer_lr: float = 1.0
    """With sync: every, step size of the outer SGD that moves the shared parameters to their
    average; 1 with outer_momentum 0 is the plain average."""
    outer_momentum: float = 0.0
    """Nesterov momentum of the outer SGD; 0 to 1."""
    blocks: int | tuple[int, ...] | None = None
    """Blocks that this job trains, with sync: every or never; null: all. One rank for each (or
    parallel.replicas). They exchange nothing, whatever sync says, and start from the newest step
    that all of them have; the files of other blocks in the run directory stay as they are."""
    check_every: int = 0
    """Steps between comparisons, by hash, of the weights that several ranks hold; 0: never. A
    difference stops the run."""
    timeout_s: float = 600.0
    """Seconds that a rank may be stuck, or may need to start, before all ranks give up.
    Collectives, which cannot say who is late, fail after twice as long."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Options):
    """RUN/checkpoints."""

    RANGES: ClassVar[Ranges] = {"every_steps": at_least(0), "keep_last": at_least(1)}

    every_steps: int = 0
    """Steps between checkpoints; 0: only at the end."""
    keep_last: int = 2
    """Complete checkpoints kept; older ones are removed. At least 1."""
    fallback: bool = False
    """When the newest checkpoint is damaged, continue from (or evaluate, export) the newest intact
    one; training renames what is damaged to step-….damaged. false: say which is intact, and end."""
    resume: bool | None = None
    """null: continue where the run directory left off, if it did; true: there must be something to
    continue; false: there must not."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig(Options):
    """Evaluation on the test set through the chain of blocks."""

    RANGES: ClassVar[Ranges] = {
        "every_steps": at_least(0),
        "batch_size": at_least(1),
        "micro_batch_size": at_least(1),
    }

    every_steps: int = 0
    """Steps between evaluations in training; 0: only at the end."""
    batch_size: int = 256
    """Test images loaded at a time by each chain."""
    micro_batch_size: int = 64
    """Images that move through the chain together; several micro-batches are in flight at once."""
    drop_last: bool = False
    """Leave out the last partial batch, as the published evaluation does."""
    step: int | None = None
    """For `evaluate` and `export`: the checkpoint's step; null: the newest."""
