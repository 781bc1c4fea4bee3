"""From a configuration to modules: what a rank materialises, and nothing else.

Weights are made empty when a checkpoint will fill them (seed None). Does not communicate.
"""

from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from dbdist import build
from dbdist.config.config import Config
from dbdist.data import DatasetSpec
from dbdist.models import vit
from dbdist.models.denoiser import Denoiser
from dbdist.tasks.classification import DenoisingLoss, EndToEndLoss


def architecture(config: Config, spec: DatasetSpec) -> vit.ViTConfig:
    """Sizes of the model for this dataset. Raises ConfigError when patches do not tile the
    images."""
    m = config.model
    return vit.ViTConfig(
        image_size=spec.image_size,
        channels=spec.channels,
        num_classes=spec.num_classes,
        patch_size=m.patch_size,
        hidden_size=m.hidden_size,
        num_heads=m.num_heads,
        mlp_size=config.mlp_size,
        dropout=m.dropout,
        attention_dropout=m.attention_dropout,
        init=m.init,
    )


def build_shared(
    config: Config, sizes: vit.ViTConfig, seed: int | None, device: torch.device
) -> vit.ViTShared | vit.PlainViTShared:
    """The shared modules of this mode."""
    build = vit.build_plain_shared if config.mode == "end_to_end" else vit.build_shared
    return build(sizes, seed, device)


def build_block(
    config: Config, sizes: vit.ViTConfig, block: int, seed: int | None, device: torch.device
) -> vit.Block:
    """One block; in end_to_end the only one, of all layers."""
    return vit.build_block(
        sizes,
        config.layers_of_block[block],
        seed,
        device,
        conditioned=config.mode != "end_to_end",
        recompute=config.train.activation_checkpointing,
    )


def join(config: Config, shared: nn.Module, block: nn.Module) -> Denoiser | vit.PlainViT:
    """Shared modules and a block as the model that runs: a denoiser, or the plain ViT."""
    if isinstance(shared, vit.ViTShared):
        return Denoiser(shared, block, config.noise_schedule())
    assert isinstance(shared, vit.PlainViTShared)
    return vit.PlainViT(shared, block)


def build_objective(config: Config, model: Denoiser | vit.PlainViT) -> DenoisingLoss | EndToEndLoss:
    """The training objective around it."""
    if isinstance(model, Denoiser):
        return DenoisingLoss(model, config.task.weighting)
    return EndToEndLoss(model)


def describe_model(config: Config, spec: DatasetSpec) -> dict[str, Any]:
    """What a checkpoint must agree with: sizes, cut and partition of the model."""
    schedule = None if config.mode == "end_to_end" else config.noise_schedule()
    sizes = asdict(build.architecture(config, spec))
    for key in ("dropout", "attention_dropout", "init"):
        del sizes[key]
    return {
        "mode": "end_to_end" if schedule is None else "blocks",
        "architecture": sizes,
        "layers_per_block": [len(layers) for layers in config.layers_of_block],
        "boundaries": schedule.boundaries.tolist() if schedule else None,
        "noise": asdict(schedule) if schedule else None,
        "data": spec.name,
    }
