"""The trained model in one process: all blocks, no process group.
`dbdist.load(OUT).predict(images)`.

An exported model is a folder with `model.safetensors` (keys `shared.*`, `layers.*`;
`block-B.shared.*` where every block kept shared modules of its own) and `config.json`.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dbdist.data.datasets import DatasetSpec, normalize
from dbdist.denoiser import Denoiser
from dbdist.errors import CheckpointError
from dbdist.models import vit
from dbdist.noise import NoiseSchedule
from dbdist.sampler import Sampler
from dbdist.tasks.classification import ClassReadout

FORMAT = "dbdist-model"
VERSION = 1


class BlockwiseClassifier(nn.Module):
    """All blocks of a DiffusionBlocks classifier. Blocks may share one set of shared modules or
    have their own."""

    def __init__(
        self,
        denoisers: list[Denoiser],
        sampler: Sampler,
        normalized: bool,
        readout: tuple[int, ...],
    ):
        super().__init__()
        self.denoisers = nn.ModuleList(denoisers)
        self.sampler = sampler
        self.normalized = normalized
        self.readout = readout

    @torch.no_grad()
    def forward(self, images: Tensor, seed: int = 0) -> Tensor:
        """Class probabilities (N, K) of normalised images."""
        answers, z = [], None
        for block, denoiser in enumerate(self.denoisers):
            assert isinstance(denoiser, Denoiser)
            table = denoiser.shared.label_table
            if z is None:
                z = self.sampler.initial_state(len(images), table.shape[1:], seed, 0, table.dtype)
                z = z.to(table.device)
            task = ClassReadout(table, self.normalized)
            z, answer = self.sampler.run_block(block, denoiser, task, images, z)
            answers.append(answer)
        return torch.stack([answers[b] for b in self.readout]).mean(dim=0)


class LoadedModel:
    """An exported model, ready to use; holds no process group and needs no config file."""

    def __init__(self, network: nn.Module, spec: DatasetSpec, device: torch.device) -> None:
        self.network = network.eval()
        self.spec = spec
        self.device = device

    def predict(self, images: Any, batch_size: int = 256) -> Tensor:
        """Class indices (N,) of images; see `predict_proba` for what images may be."""
        return self.predict_proba(images, batch_size).argmax(dim=-1)

    @torch.no_grad()
    def predict_proba(self, images: Any, batch_size: int = 256) -> Tensor:
        """Class probabilities (N, K).

        images: tensor or array (N, C, S, S), or (N, S, S) with one channel: uint8, or float in [0,
        1]. Raises ValueError for another shape or range.
        """
        pixels = normalize(torch.as_tensor(images), self.spec)
        dtype = next(self.network.parameters()).dtype
        parts = [self.network(part.to(self.device, dtype)) for part in pixels.split(batch_size)]
        if not parts:
            return torch.empty(0, self.spec.num_classes)
        answer = torch.cat(parts).cpu()
        return answer if isinstance(self.network, BlockwiseClassifier) else answer.softmax(dim=-1)


def save_model(out: Path, weights: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Writes an exported model; config.json comes last and marks it complete."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").unlink(missing_ok=True)
    partial = out / "model.safetensors.partial"
    save_file({k: v.contiguous() for k, v in weights.items()}, partial)
    os.replace(partial, out / "model.safetensors")
    partial = out / "config.json.partial"
    partial.write_text(
        json.dumps({"format": FORMAT, "version": VERSION, **config}, indent=2) + "\n"
    )
    os.replace(partial, out / "config.json")


def load(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> LoadedModel:
    """The exported model in this folder (`dbdist export`, `dbdist import-published`).

    Raises CheckpointError, in one sentence, for a folder that holds none or files that do not fit
    together.
    """
    folder, device = Path(path), torch.device(device)
    try:
        config = json.loads((folder / "config.json").read_text())
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} holds no exported model (config.json); `dbdist export RUN OUT` makes one"
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"{folder}/config.json cannot be read ({error}); export the model again"
        ) from None
    if (
        not isinstance(config, dict)
        or config.get("format") != FORMAT
        or config.get("version") != VERSION
    ):
        raise CheckpointError(f"{folder}/config.json is not of format {FORMAT} version {VERSION}")
    weights = load_weights(folder / "model.safetensors")
    try:
        spec = _dataset_spec(config["data"])
        network = _build(config, device, next(iter(weights.values())).dtype)
    except (KeyError, TypeError, ValueError, StopIteration) as error:
        raise CheckpointError(
            f"{folder}/config.json is incomplete ({error!r}); export the model again"
        ) from None
    fill(network, network_weights(network, weights), folder / "model.safetensors")
    return LoadedModel(network, spec, device)


def load_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises CheckpointError for a missing or damaged one."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}); restore it from a copy or use another checkpoint"
        ) from None


def fill(module: nn.Module, weights: Mapping[str, Tensor], source: Path) -> None:
    """Copies weights into the module by name. Raises CheckpointError where names or shapes
    differ."""
    own = dict(module.named_parameters())
    for problem, names in (
        ("lacks", own.keys() - weights.keys()),
        ("has a foreign", weights.keys() - own.keys()),
    ):
        if names:
            raise CheckpointError(
                f"{source} {problem} tensor {min(names)}: it belongs to another model"
            )
    with torch.no_grad():
        for name, parameter in own.items():
            if parameter.shape != weights[name].shape:
                raise CheckpointError(
                    f"{source}: {name} has shape {list(weights[name].shape)}, the model needs "
                    f"{list(parameter.shape)}"
                )
            parameter.copy_(weights[name])


def network_weights(network: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Exported names to the names of this network's parameters."""
    if not isinstance(network, BlockwiseClassifier):
        named = {f"block.{k}" if k.startswith("layers.") else k: v for k, v in weights.items()}
        return named
    own = {}
    for name, _ in network.named_parameters():
        _, block, part, rest = name.split(".", 3)
        exported = f"shared.{rest}" if part == "shared" else rest
        private = f"block-{block}.{exported}"
        if (tensor := weights.get(private, weights.get(exported))) is not None:
            own[name] = tensor
    return own


def describe(
    architecture: vit.ViTConfig,
    spec: DatasetSpec,
    layers_per_block: list[int],
    schedule: NoiseSchedule | None,
    sampler: Mapping[str, Any],
    private_shared: bool = False,
) -> dict[str, Any]:
    """The content of config.json; schedule is None for the plain ViT."""
    return {
        "data": asdict(spec),
        "model": asdict(architecture),
        "layers_per_block": layers_per_block,
        "noise": asdict(schedule) if schedule else None,
        "sampler": dict(sampler),
        "private_shared": private_shared,
    }


def _dataset_spec(values: dict[str, Any]) -> DatasetSpec:
    sizes: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return DatasetSpec(**sizes)


def _build(config: dict[str, Any], device: torch.device, dtype: torch.dtype) -> nn.Module:
    architecture = vit.ViTConfig(**config["model"])
    ends = [0]
    for count in config["layers_per_block"]:
        ends.append(ends[-1] + count)
    layers = [range(a, b) for a, b in pairwise(ends)]
    if config["noise"] is None:
        shared = vit.build_plain_shared(architecture, None, device)
        block = vit.build_block(architecture, layers[0], None, device, conditioned=False)
        return vit.PlainViT(shared, block).to(dtype)
    schedule = NoiseSchedule(**config["noise"])
    options = dict(config["sampler"])
    normalized, readout = options.pop("label_table") == "normalized", tuple(options.pop("readout"))
    if options.get("blocks") is not None:
        options["blocks"] = tuple(options["blocks"])
    common = vit.build_shared(architecture, None, device)
    denoisers = [
        Denoiser(
            vit.build_shared(architecture, None, device) if config["private_shared"] else common,
            vit.build_block(architecture, indices, None, device),
            schedule,
        )
        for indices in layers
    ]
    return BlockwiseClassifier(denoisers, Sampler(schedule, **options), normalized, readout).to(
        dtype
    )
