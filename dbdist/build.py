"""From a configuration to modules: what a rank materialises, and nothing else.

Weights are made empty when a checkpoint will fill them (seed None). Does not communicate.
"""

import torch
from torch import nn

from dbdist.config import Config
from dbdist.data import DatasetSpec
from dbdist.denoiser import Denoiser
from dbdist.models import vit
from dbdist.sampler import Sampler
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
