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
from torch import Tensor, nn

from dbdist.checkpoint.snapshot import Snapshot
from dbdist.checkpoint.weights import check_weights, fill, load_weights
from dbdist.data import DatasetSpec, normalize
from dbdist.errors import CheckpointError, UserError
from dbdist.models import vit
from dbdist.models.denoiser import Denoiser
from dbdist.processes.gaussian import NoiseSchedule
from dbdist.sampling.sampler import Sampler
from dbdist.tasks.classification import ClassReadout

FORMAT = "dbdist-model"
VERSION = 1
MAX_EVALUATIONS = 10_000
"""Of a denoiser, for one answer: steps of the sampler times its draws."""
_WRONG_VALUES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What a description of another shape than ours ends in."""


class BlockwiseClassifier(nn.Module):
    """All blocks of a DiffusionBlocks classifier. Blocks may share one set of shared modules or
    have their own."""

    def __init__(
        self,
        denoisers: list[Denoiser],
        sampler: Sampler,
        normalized: bool,
        readout: tuple[int, ...],
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.denoisers = nn.ModuleList(denoisers)
        self.sampler = sampler
        self.normalized = normalized
        self.readout = readout
        self.seed = seed

    @torch.no_grad()
    def forward(self, images: Tensor, batch_idx: int = 0) -> Tensor:
        """Class probabilities (N, K) of normalised images. batch_idx: names the noise they start
        from, where they start from noise."""
        answers, z = [], None
        for block, denoiser in enumerate(self.denoisers):
            assert isinstance(denoiser, Denoiser)
            table = denoiser.shared.label_table
            if z is None:
                shape = tuple(table.shape[1:])
                z = self.sampler.initial_state(
                    len(images), shape, self.seed, batch_idx, table.dtype
                ).to(table.device)
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

        images: tensor or array (N, C, S, S), or (N, S, S) with one channel; uint8, or float from 0
        to 1. Raises ValueError for another shape or range.
        """
        pixels = normalize(torch.as_tensor(images), self.spec)
        dtype = next(self.network.parameters()).dtype
        answers = [torch.empty(0, self.spec.num_classes, dtype=dtype)]
        for batch_idx, part in enumerate(pixels.split(batch_size) if len(pixels) else ()):
            part = part.to(self.device, dtype)
            if isinstance(self.network, BlockwiseClassifier):
                answers.append(self.network(part, batch_idx).cpu())
            else:
                answers.append(self.network(part).softmax(dim=-1).cpu())
        return torch.cat(answers)


def save_model(out: Path, weights: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Writes an exported model; config.json comes last and marks it complete. Raises
    CheckpointError where it cannot be written."""
    on_host = {name: tensor.cpu() for name, tensor in weights.items()}
    text = json.dumps({"format": FORMAT, "version": VERSION, **config}, indent=2) + "\n"
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.json").unlink(missing_ok=True)
        file = Snapshot(on_host)
        file.fill(on_host)
        file.write(out / "model.safetensors")
        partial = out / "config.json.partial"
        partial.write_text(text)
        os.replace(partial, out / "config.json")
    except OSError as error:
        raise CheckpointError(f"{out} cannot be written ({error.strerror})") from None


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
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{folder}/config.json cannot be read ({error}); export the model again"
        ) from None
    if (
        not isinstance(config, dict)
        or config.get("format") != FORMAT
        or config.get("version") != VERSION
    ):
        raise CheckpointError(f"{folder}/config.json is not of format {FORMAT} version {VERSION}")
    file = folder / "model.safetensors"
    weights = load_weights(file)
    dtypes = {tensor.dtype for tensor in weights.values()}
    if len(dtypes) != 1 or not (dtype := dtypes.pop()).is_floating_point:
        raise CheckpointError(f"{file} does not hold the weights of a model")
    try:
        spec = _dataset_spec(config["data"])
        _check_extent(config, spec, weights)
        # Without memory first: the weights say how much a description may ask for.
        empty = _build(config, torch.device("meta"), dtype)
        own = {name: p.shape for name, p in empty.named_parameters()}
        named = network_weights(empty, weights)
    except (UserError, *_WRONG_VALUES) as error:
        raise CheckpointError(
            f"{folder}/config.json does not describe a model ({_reason(error)}); export it again"
        ) from None
    check_weights(own, named, file)
    network = _build(config, device, dtype)
    fill(network, named, file)
    model = LoadedModel(network, spec, device)
    try:  # whatever is wrong shows now, and not at the first image of the user's
        model.predict(torch.zeros(1, spec.channels, spec.image_size, spec.image_size))
    except (UserError, *_WRONG_VALUES) as error:
        raise CheckpointError(
            f"{folder}/config.json does not fit its weights ({_reason(error)}); export the model "
            "again"
        ) from None
    return model


def network_weights(network: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Exported names to the names of this network's parameters."""
    if not isinstance(network, BlockwiseClassifier):
        named = {f"block.{k}" if k.startswith("layers.") else k: v for k, v in weights.items()}
        return named
    own, used = {}, set()
    for name, _ in network.named_parameters():
        _, block, part, rest = name.split(".", 3)
        exported = f"shared.{rest}" if part == "shared" else rest
        private = f"block-{block}.{exported}"
        found = private if private in weights else exported
        if found in weights:
            own[name] = weights[found]
            used.add(found)
    return own | {name: weights[name] for name in weights.keys() - used}


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


def _check_extent(config: dict[str, Any], spec: DatasetSpec, weights: Mapping[str, Tensor]) -> None:
    """Raises ValueError for counts that would take for ever: they bound what is built and run."""
    model, layers, noise = config["model"], config["layers_per_block"], config["noise"]
    sizes = spec.image_size, spec.channels, spec.num_classes
    if sizes != (model["image_size"], model["channels"], model["num_classes"]):
        raise ValueError(f"data {sizes} is not what the model is made for")
    if not layers or min(layers) < 0 or sum(layers) > len(weights):
        raise ValueError(f"{sum(layers)} layers of {len(weights)} tensors")
    if noise is not None:
        if noise["num_blocks"] != len(layers):
            raise ValueError(f"num_blocks {noise['num_blocks']} of {len(layers)}")
        sampler = config["sampler"]
        evaluations = sampler["num_steps"] * sampler.get("num_draws", 1)
        if not evaluations <= MAX_EVALUATIONS:
            raise ValueError(f"{evaluations} evaluations; {MAX_EVALUATIONS} at most")


def _reason(error: Exception) -> str:
    """An error in one line."""
    return " ".join(repr(error).split())[:300]


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
    seed, readout = options.pop("seed", 0), tuple(options.pop("readout"))
    table = options.pop("label_table")
    if table not in ("normalized", "raw") or options["start"] not in ("mean", "noise"):
        raise ValueError(f"label_table {table!r}, start {options['start']!r}")
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
    sampler = Sampler(schedule, **options)
    return BlockwiseClassifier(denoisers, sampler, table == "normalized", readout, seed).to(dtype)
