"""Weights of the published ViT code: read, run exactly as published, and convert them.

The published model differs from ours in names, in separate query, key and value projections, and in
the sampler's choice of block where a grid point falls on a boundary (float32 rounding decides).
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dbdist.checkpoint.weights import fill
from dbdist.config.config import Config
from dbdist.data.images import DatasetSpec
from dbdist.data.options import ImageOptions
from dbdist.errors import CheckpointError, ConfigError
from dbdist.inference.exported import Description, save_model
from dbdist.inference.foreign_weights import Absent, read_weights, unwrapped
from dbdist.models import vit
from dbdist.models.base import build_block, build_shared, materialise
from dbdist.models.denoiser import Denoiser
from dbdist.models.options import ViTOptions
from dbdist.processes.gaussian import Gaussian, NoiseSchedule
from dbdist.processes.options import GaussianOptions
from dbdist.processes.partition import Steps
from dbdist.sampling.sampler import Sampler
from dbdist.tasks.classification import Classification
from dbdist.tasks.options import ClassificationOptions, ClassificationSamplerOptions

SHARED_NAMES = {
    "vit.embeddings.patch_embeddings.projection": "patch_embed",
    "vit.embeddings.position_embeddings": "positions",
    "vit.embeddings.label_embeddings.weight": "label_table",
    "vit.time_embedder.mlp.0": "noise_mlp_in",
    "vit.time_embedder.mlp.2": "noise_mlp_out",
    "vit.layernorm": "norm",
    "adaLN_modulation.linear": "adaln.linear",
    "classifier": "head",
}
LAYER_NAMES = {
    "attention.output.dense": "attention.out",
    "intermediate.dense": "mlp_in",
    "output.dense": "mlp_out",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "adaLN_modulation.linear": "adaln.linear",
}
LAYER_KEY = re.compile(r"vit\.encoder\.layer\.(\d+)\.(.+)\.(weight|bias)")


@dataclass(frozen=True, kw_only=True)
class PublishedConfig:
    """Sizes of a published model, under the names its files use."""

    image_size: int
    patch_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    num_labels: int
    num_blocks: int
    num_channels: int = 3

    def options(self) -> ViTOptions:
        """Our architecture of these sizes."""
        return ViTOptions(
            num_blocks=self.num_blocks,
            num_layers=self.num_layers,
            layers_per_block=tuple(self.layers_per_block()),
            patch_size=self.patch_size,
            hidden_size=self.hidden_size,
            num_heads=self.num_heads,
            mlp_size=self.intermediate_size,
            init="published",
        )

    def spec(self) -> DatasetSpec:
        """Images in [0, 1], used as they are."""
        return DatasetSpec(
            name="published",
            channels=self.num_channels,
            image_size=self.image_size,
            num_classes=self.num_labels,
            mean=(0.0,) * self.num_channels,
            std=(1.0,) * self.num_channels,
            class_names=None,
        )

    def layers_per_block(self) -> list[int]:
        if self.num_blocks < 1 or self.num_layers % self.num_blocks:
            raise ConfigError(
                f"num_blocks {self.num_blocks} does not divide num_layers {self.num_layers}"
            )
        return [self.num_layers // self.num_blocks] * self.num_blocks


class PublishedViT(nn.Module):
    """The published model in evaluation mode: `denoise` runs a block, `sample` all."""

    def __init__(self, config: PublishedConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        cpu = torch.device("cpu")
        model = vit.ViT.of(config.options(), config.spec())
        self.config = config
        self.schedule = NoiseSchedule(config.num_blocks)
        self.process = Gaussian(self.schedule)
        self.shared = materialise(build_shared(model), cpu).to(dtype)
        ends = [sum(config.layers_per_block()[:b]) for b in range(config.num_blocks + 1)]
        self.blocks = nn.ModuleList(
            materialise(build_block(model, range(a, b)), cpu).to(dtype) for a, b in pairwise(ends)
        )
        self.eval()

    def denoiser(self, block: int) -> Denoiser:
        """Shared modules and one block; block 0 has the most noise."""
        return Denoiser(self.shared, self.blocks[block], self.process).train(self.training)

    def task(self, label_table: Literal["raw", "normalized"] = "raw") -> Classification:
        """The task that reads logits as the published code does."""
        sampler = ClassificationSamplerOptions(label_table=label_table, readout="last")
        width, num_blocks = self.config.hidden_size, self.config.num_blocks
        spec = self.config.spec()
        return _Logits(ClassificationOptions(), sampler, spec, width, num_blocks)

    def denoise(
        self, block: int, images: Tensor, z: Tensor, sigma: Tensor | float, cfg_scale: float = 0.0
    ) -> Tensor:
        """Logits (N, K) of one block.

        images: (N, C, S, S); z: (N, D); sigma: a number or (N,). cfg_scale: classifier-free
        guidance, u + cfg_scale (c - u); 0 for none.
        """
        if not 0 <= block < len(self.blocks):
            raise ValueError(f"block {block} is not one of 0..{len(self.blocks) - 1}")
        sigma_N = torch.as_tensor(sigma, dtype=z.dtype, device=z.device).reshape(-1).expand(len(z))
        sampler = Sampler(self.process, Steps((), ()), guidance_scale=cfg_scale)
        return sampler.guided(self.denoiser(block), self.task(), images, z, sigma_N)

    def sample(
        self,
        images: Tensor,
        z_init: Tensor,
        num_steps: int,
        cfg_scale: float = 0.0,
        label_table: Literal["raw", "normalized"] = "raw",
    ) -> Tensor:
        """Logits (N, K) after the whole chain.

        images: (N, C, S, S). z_init: (N, D), the first state, already at the scale of the highest
        level. num_steps: evaluations from sigma 80 to 0.002. label_table: as published (raw), or as
        in training.
        """
        if label_table not in ("raw", "normalized"):
            raise ValueError(f"label_table is {label_table!r}; it must be 'raw' or 'normalized'")
        blocks = published_block_of_step(self.schedule, num_steps)
        if num_steps == 1:  # the published grid of one point is sigma_min
            return self.denoise(blocks[0], images, z_init, self.schedule.sigma_min, cfg_scale)
        steps = Steps(self.schedule.levels(num_steps), tuple(blocks))
        sampler = Sampler(self.process, steps, guidance_scale=cfg_scale)
        task, z, logits = self.task(label_table), z_init, None
        for block in sorted(set(blocks)):
            denoiser = self.denoiser(block)
            z, logits = sampler.run_block(block, denoiser, task, self.shared, images, z)
        assert logits is not None
        return logits


class _Logits(Classification):
    """Reads out the logits themselves, as the published code returns them."""

    def answer(self, output: Tensor, shared: nn.Module) -> Tensor:
        return output


def published_block_of_step(schedule: NoiseSchedule, num_steps: int) -> list[int]:
    """Returns the block that the published sampler runs at each step.

    It compares a float32 grid with float64 boundaries, so a grid point on a boundary falls to
    either side, and a block may be left out.
    """
    sigmas = (
        torch.tensor(schedule.levels(num_steps)).float().double()
        if num_steps > 1
        else torch.tensor([schedule.sigma_min])
    )
    ascending = torch.searchsorted(schedule.boundaries, sigmas.double(), right=True) - 1
    return [
        schedule.num_blocks - 1 - k for k in ascending.clamp(0, schedule.num_blocks - 1).tolist()
    ]


def load_published_vit(
    path_or_state_dict: str | PathLike[str] | Mapping[str, Tensor],
    config: PublishedConfig | Mapping[str, Any] | None = None,
) -> PublishedViT:
    """The published model with these weights, in their precision.

    path_or_state_dict: a .safetensors file, a Lightning .ckpt (tensors only are read, nothing is
    executed), or a state dict. config: its sizes (`PublishedConfig` or a mapping with these keys);
    None takes them from the file's metadata and, where that is silent, from the tensors' shapes.
    Raises CheckpointError for a missing or damaged file, missing or foreign tensors, or sizes that
    are nowhere to be found (num_heads, num_blocks).
    """
    source, state, stored = _read(path_or_state_dict)
    sizes = _sizes(source, state, {**stored, **_mapping(config)})
    try:
        weights = _rename(source, state, sizes)
        dtype = next(iter(weights.values())).dtype
        model = PublishedViT(sizes, dtype)
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{source} is not a published ViT ({reason})") from None
    fill(model, weights, source)
    return model


def import_published(
    checkpoint: Path,
    out: Path,
    config: Mapping[str, Any] | None = None,
    spec: DatasetSpec | None = None,
) -> None:
    """Converts published weights to an exported model with the published sampler.

    spec: the dataset's names and normalisation; None stands for images in [0, 1] used as they are.
    """
    model = load_published_vit(checkpoint, config)
    sizes = model.config
    source, spec = spec.name if spec else "image_folder", spec or sizes.spec()
    if (spec.channels, spec.image_size, spec.num_classes) != (
        sizes.num_channels,
        sizes.image_size,
        sizes.num_labels,
    ):
        raise ConfigError(
            f"{checkpoint} was trained on {sizes.num_channels} x {sizes.image_size} x "
            f"{sizes.image_size} images of "
            f"{sizes.num_labels} classes, which is not the dataset {spec.name}"
        )
    weights = {
        name if name.startswith("shared.") else name.split(".", 2)[2]: tensor.detach()
        for name, tensor in model.named_parameters()
    }
    num_steps = max(sizes.num_blocks, 2)  # published: as many as blocks; a single one is useless
    described = Config(
        model=sizes.options(),
        noise=GaussianOptions(),
        data=ImageOptions(name=source),
        sampler=ClassificationSamplerOptions(
            num_steps=num_steps,
            start="noise",
            label_table="raw",
            readout=(sizes.num_blocks - 1,),
        ),
    )
    owners = tuple(published_block_of_step(model.schedule, num_steps))
    layers = tuple(sizes.layers_per_block())
    save_model(out, weights, Description(described, spec, layers, owners=owners))


ANCHOR = "vit.embeddings.patch_embeddings.projection.weight"
"""A tensor that every published model has."""


def _read(
    source: str | PathLike[str] | Mapping[str, Tensor],
) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    """Returns a name for messages, the tensors, and sizes; warns of what it does not read."""
    if isinstance(source, Mapping):
        path = Path("state dict")
        found = unwrapped(path, source, ANCHOR)
    else:
        path = Path(source)
        found = read_weights(path, ANCHOR)
    tensors = dict(found.tensors)
    tensors.pop("sigmas", None)  # the sampler's grid, a buffer of the Lightning module
    ignored = [name for name in found.ignored if name != "sigmas"]
    if ignored:
        logging.getLogger("dbdist").warning(
            "%s: left out %d other tensors: %s, …", path, len(ignored), ", ".join(ignored[:3])
        )
    try:
        return path, tensors, _numbers(_flat_sizes(found.beside))
    except RecursionError:
        raise CheckpointError(f"{path}: hyper_parameters contain themselves") from None


def _numbers(found: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes among them."""
    known = {k: v for k, v in found.items() if k in PublishedConfig.__dataclass_fields__}
    try:
        return {k: int(v) for k, v in known.items()}
    except ValueError as error:
        raise CheckpointError(f"a size beside the weights is no number ({error})") from None


def _flat_sizes(hyper_parameters: Any) -> dict[str, Any]:
    """Sizes among Lightning's hyper-parameters, nested or not, under our names or transformers'."""
    aliases = {"num_hidden_layers": "num_layers", "num_attention_heads": "num_heads"}
    found: dict[str, Any] = {}
    if isinstance(hyper_parameters, Absent):  # of a Namespace or the like
        return _flat_sizes(hyper_parameters.values)
    if isinstance(hyper_parameters, Mapping):
        for key, value in hyper_parameters.items():
            if isinstance(value, Mapping | Absent):
                found |= _flat_sizes(value)
            elif isinstance(key, str) and isinstance(value, int | str):
                found[aliases.get(key, key)] = value
    return found


def _mapping(config: PublishedConfig | Mapping[str, Any] | None) -> dict[str, Any]:
    if config is None:
        return {}
    if isinstance(config, PublishedConfig):
        return vars(config).copy()
    known = PublishedConfig.__dataclass_fields__
    if unknown := sorted(config.keys() - known.keys()):
        raise ConfigError(f"unknown size {unknown[0]}; known are {', '.join(known)}")
    return {k: int(v) for k, v in config.items() if v is not None}


def _sizes(source: Path, state: Mapping[str, Tensor], given: dict[str, Any]) -> PublishedConfig:
    """All sizes: those given, else what the tensors' shapes say."""
    try:
        patch = state["vit.embeddings.patch_embeddings.projection.weight"]
        classes, hidden = state["vit.embeddings.label_embeddings.weight"].shape
        num_patches = state["vit.embeddings.position_embeddings"].shape[-2] - 1
        layers = {int(m[1]) for k in state if (m := LAYER_KEY.fullmatch(k))}
        intermediate = state["vit.encoder.layer.0.intermediate.dense.weight"].shape[0]
        channels, side = patch.shape[1], patch.shape[-1]
    except KeyError as error:
        raise CheckpointError(f"{source} is not a published ViT: {error} is missing") from None
    except (IndexError, ValueError) as error:
        raise CheckpointError(f"{source} is not a published ViT: {error}") from None
    if layers != set(range(len(layers))):
        raise CheckpointError(
            f"{source} is not a published ViT: a layer is missing before the last"
        )
    shapes = {
        "image_size": round(max(num_patches, 0) ** 0.5) * side,
        "patch_size": side,
        "hidden_size": hidden,
        "num_layers": max(layers) + 1,
        "intermediate_size": intermediate,
        "num_labels": classes,
        "num_channels": channels,
    }
    for key, value in shapes.items():
        if given.setdefault(key, value) != value:
            raise CheckpointError(
                f"{source}: its tensors say {key} {value}, the configuration {given[key]}"
            )
    for key in ("num_heads", "num_blocks"):
        if key not in given:
            raise CheckpointError(
                f"{source} does not say {key}, which no tensor's shape tells; give it"
            )
    if given["num_heads"] < 1 or hidden % given["num_heads"]:
        raise CheckpointError(
            f"{source}: num_heads {given['num_heads']} does not divide hidden_size {hidden}"
        )
    return PublishedConfig(**given)


def _rename(source: Path, state: Mapping[str, Tensor], sizes: PublishedConfig) -> dict[str, Tensor]:
    """Published names to the parameter names of `PublishedViT`; q, k and v become one tensor."""
    per_block = sizes.layers_per_block()[0]
    renamed: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if match := LAYER_KEY.fullmatch(key):
            layer, name, leaf = int(match[1]), match[2], match[3]
            prefix = f"blocks.{layer // per_block}.layers.{layer}"
            if name.startswith("attention.attention."):
                if name.endswith(".query"):
                    stem = key.removesuffix(f"query.{leaf}")
                    try:
                        parts = [
                            state[f"{stem}{part}.{leaf}"] for part in ("query", "key", "value")
                        ]
                    except KeyError as error:
                        raise CheckpointError(f"{source} lacks tensor {error}") from None
                    renamed[f"{prefix}.attention.qkv.{leaf}"] = torch.cat(parts)
            else:
                renamed[f"{prefix}.{LAYER_NAMES.get(name, name)}.{leaf}"] = tensor
        else:
            stem, _, leaf = key.rpartition(".")
            name = SHARED_NAMES.get(key) or (
                f"{SHARED_NAMES[stem]}.{leaf}" if stem in SHARED_NAMES else key
            )
            renamed[f"shared.{name}"] = tensor.squeeze(0) if name == "positions" else tensor
    return renamed
