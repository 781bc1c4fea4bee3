"""The trained model in one process: all blocks, no process group. `dbdist.load(OUT)`.

An exported model is a folder with `model.safetensors` (keys `shared.*`, `layers.*`;
`block-B.shared.*` where every block kept shared modules of its own) and `config.json`.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dbdist.build import Setup, build_setup
from dbdist.checkpoint.snapshot import Snapshot
from dbdist.checkpoint.weights import check_weights, fill, load_weights
from dbdist.config import registry
from dbdist.config.config import Config
from dbdist.errors import CheckpointError, UserError
from dbdist.inference.older import upgraded_export
from dbdist.models.base import build_block, build_shared, materialise
from dbdist.models.denoiser import Denoiser
from dbdist.processes.partition import Steps
from dbdist.sampling.sampler import Rows, Sampler, build_sampler
from dbdist.tasks.base import Batch, Task
from dbdist.tensors import named_tensors
from dbdist.whole_files import read_file, write_json

FORMAT = "dbdist-model"
VERSION = 2
MAX_EVALUATIONS = 10_000
"""Of a denoiser, for one answer: steps of the sampler times its draws."""
_SECTIONS = ("task", "model", "noise", "sampler")
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


class WholeModel(nn.Module):
    """All blocks of a model. They may share one set of shared modules or have their own."""

    def __init__(self, denoisers: list[Denoiser], task: Task, sampler: Sampler) -> None:
        super().__init__()
        self.denoisers = nn.ModuleList(denoisers)
        self.task = task
        self.sampler = sampler

    @torch.no_grad()
    def forward(self, batch: Batch, first: int = 0, **changes: Any) -> Tensor:
        """The chain's answers. first: number of the first sample; numbers name the noise.

        changes: of the sampler, for this call.
        """
        sampler = replace(self.sampler, **changes)
        num_samples = len(next(iter(batch.values())))
        rows = Rows(first, first + num_samples)
        condition, answer, z, carry = self.task.condition(batch), None, None, None
        for block, denoiser in enumerate(self.denoisers):
            assert isinstance(denoiser, Denoiser)
            if z is None or carry is None:
                like = next(p for p in denoiser.shared.parameters() if p.is_floating_point())
                z = sampler.initial_state(self.task, rows, like.dtype).to(like.device)
                carry = like.new_zeros(num_samples, *(self.task.carry_shape or (0,)))
            shared = denoiser.shared
            z, answer = sampler.run_block(block, denoiser, self.task, shared, condition, z, rows)
            carry, answer = self.task.read(block, answer, carry)
        assert answer is not None, "there are no blocks"
        return answer


@dataclass(frozen=True)
class Description:
    """The content of config.json: what was trained, and how its chain is sampled."""

    config: Config
    spec: Any
    layers_per_block: tuple[int, ...]
    private_shared: bool = False
    owners: tuple[int, ...] | None = None
    """Block of each sampler step, where it is not the partition's choice (published weights)."""

    def to_json(self) -> dict[str, Any]:
        c = self.config
        return {
            "format": FORMAT,
            "version": VERSION,
            "mode": c.mode,
            "seed": c.seed,
            **{name: asdict(getattr(c, name)) for name in _SECTIONS},
            "data": {"source": c.data.name, **asdict(self.spec)},
            "layers_per_block": list(self.layers_per_block),
            "private_shared": self.private_shared,
            "owners": None if self.owners is None else list(self.owners),
        }

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> "Description":
        """The inverse of `to_json`. Raises what wrong values raise."""
        names = {s: values[s]["name"] for s in ("task", "model", "noise")}
        data = dict(values["data"])
        names["data"] = data.pop("source")
        classes = registry.section_classes(names)
        sections = {name: _section(classes[name], values[name]) for name in _SECTIONS}
        source = registry.default_section("data", names)
        config = Config(
            mode=values["mode"],
            seed=values["seed"],
            data=replace(source, name=names["data"]),
            **sections,
        )
        spec = registry.find("data", names["data"]).load().spec_from(data)
        owners = values.get("owners")
        return Description(
            config,
            spec,
            tuple(values["layers_per_block"]),
            values["private_shared"],
            None if owners is None else tuple(owners),
        )

    def build(self, device: torch.device, dtype: torch.dtype | None) -> WholeModel:
        """The model, empty; on the meta device without memory. dtype: None leaves the model's."""
        setup = build_setup(self.config, self.spec)
        ends = [sum(self.layers_per_block[:b]) for b in range(len(self.layers_per_block) + 1)]
        shared = build_shared(setup.model)
        denoisers = [
            setup.denoiser(
                build_shared(setup.model) if self.private_shared else shared,
                build_block(setup.model, range(a, b)),
            )
            for a, b in pairwise(ends)
        ]
        model = WholeModel(denoisers, setup.task, self._sampler(setup))
        model = model if dtype is None else model.to(dtype)
        return model if device.type == "meta" else materialise(model, device)

    def _sampler(self, setup: Setup) -> Sampler:
        if self.owners is None:
            return build_sampler(setup)
        s = setup.config.sampler
        partition = setup.process.partition
        assert partition is not None
        levels = partition.levels(len(self.owners), s.start_level)
        steps = Steps(levels, self.owners)
        return Sampler(
            setup.process, steps, setup.config.seed, s.start, s.num_draws, s.guidance_scale
        )


def save_model(out: Path, weights: dict[str, Tensor], description: Description) -> None:
    """Writes an exported model; config.json comes last and marks it complete.

    Raises CheckpointError where it cannot be written, or would replace what is no exported model.
    """
    _check_replaceable(out)
    on_host = {name: tensor.cpu() for name, tensor in weights.items()}
    try:
        out.mkdir(parents=True, exist_ok=True)
        unfinished = {"format": FORMAT, "version": VERSION, "is_unfinished": True}
        write_json(out / "config.json", unfinished)  # so that the folder is known to be ours
        file = Snapshot(on_host)
        file.fill(on_host)
        file.write(out / "model.safetensors")
        write_json(out / "config.json", description.to_json())
    except OSError as error:
        raise CheckpointError(f"{out} cannot be written ({error.strerror})") from None


def load(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> Any:
    """The exported model in this folder, ready to use: what its task offers.

    A classifier has `class_names`, `predict`, `predict_labels` and `predict_proba`. Raises
    CheckpointError, in one sentence, for a folder that holds none or files that do not fit
    together.
    """
    folder, device = Path(path).expanduser(), torch.device(device)
    values = _read(folder / "config.json")
    file = folder / "model.safetensors"
    weights = load_weights(file)
    dtypes = {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()}
    if not dtypes:
        raise CheckpointError(f"{file} does not hold the weights of a model")
    dtype = dtypes.pop() if len(dtypes) == 1 else None
    try:
        description = Description.from_json(values)
        _check_extent(description, weights)
        # Without memory first: the weights say how much a description may ask for.
        empty = description.build(torch.device("meta"), dtype)
        own = named_tensors(empty)
        named = network_weights(own, weights)
    except UserError as error:  # such as a task that is not registered here
        raise CheckpointError(f"{folder}/config.json: {error}") from None
    except _WRONG_VALUES as error:
        raise CheckpointError(
            f"{folder}/config.json does not describe a model ({_reason(error)}); export it again"
        ) from None
    check_weights(own, named, file)
    network = description.build(device, dtype)
    fill(network, named, file)
    network.eval()
    like = next(p.dtype for p in network.parameters() if p.is_floating_point())
    model = network.task.loaded(network, device, like)
    try:  # whatever is wrong shows now, and not at the first use
        model.probe()
    except (UserError, *_WRONG_VALUES) as error:
        raise CheckpointError(
            f"{folder}/config.json does not fit its weights ({_reason(error)}); export the model "
            "again"
        ) from None
    return model


def network_weights(own: Mapping[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Exported tensors under the names of a `WholeModel`; what has no place keeps its name."""
    found, used = {}, set()
    for name in own:
        _, block, kind, rest = name.split(".", 3)
        exported = f"shared.{rest}" if kind == "shared" else rest
        private = f"block-{block}.{exported}"
        source = private if private in weights else exported
        if source in weights:
            found[name] = weights[source]
            used.add(source)
    return found | {name: weights[name] for name in weights.keys() - used}


def _read(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(read_file(file))
    except FileNotFoundError:
        raise CheckpointError(
            f"{file.parent} holds no exported model (config.json); `dbdist export RUN OUT` makes "
            "one"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}); export the model again") from None
    version = values.get("version") if isinstance(values, dict) else None
    if version not in (1, VERSION) or isinstance(version, bool) or values.get("format") != FORMAT:
        raise CheckpointError(f"{file} is not of format {FORMAT} version {VERSION}")
    if values.get("is_unfinished"):
        raise CheckpointError(f"{file} is of an export that was not finished; export it again")
    if version == VERSION:
        return values
    try:
        return upgraded_export(values)
    except _WRONG_VALUES as error:
        raise CheckpointError(
            f"{file} does not describe a model ({_reason(error)}); export it again"
        ) from None


def _check_replaceable(out: Path) -> None:
    """Raises CheckpointError for a folder whose files are not an exported model's."""
    config, weights = out / "config.json", out / "model.safetensors"
    try:
        if config.exists():
            values = json.loads(read_file(config))
            is_ours = isinstance(values, dict) and values.get("format") == FORMAT
        else:
            is_ours = not weights.exists()
    except (OSError, ValueError, RecursionError):
        is_ours = False
    if not is_ours:
        raise CheckpointError(
            f"{out} holds a config.json or model.safetensors that dbdist has not written; give "
            "another folder"
        )


def _section(kind: type[Any], values: Mapping[str, Any]) -> Any:
    """A section from JSON, where lists stand for tuples."""
    tuples = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return kind(**tuples)


def _check_extent(description: Description, weights: Mapping[str, Tensor]) -> None:
    """Raises ValueError for counts that would take for ever: they bound what is built and run."""
    config, layers = description.config, description.layers_per_block
    if not layers or min(layers) < 0 or sum(layers) > len(weights):
        raise ValueError(f"{sum(layers)} layers of {len(weights)} tensors")
    if config.is_plain:
        if len(layers) != 1:
            raise ValueError(f"{len(layers)} blocks in mode end_to_end")
        return
    if config.num_blocks != len(layers):
        raise ValueError(f"num_blocks {config.num_blocks} of {len(layers)}")
    if (cut := tuple(len(own) for own in config.layers_of_block)) != layers:
        raise ValueError(f"layers_per_block {layers}, model.layers_per_block {cut}")
    for section in (config.model, config.sampler):
        section.check()
    evaluations = config.sampler_steps * config.sampler.num_draws
    if not 0 < evaluations <= MAX_EVALUATIONS:
        raise ValueError(f"{evaluations} evaluations; {MAX_EVALUATIONS} at most")
    if description.owners is not None and not set(description.owners) <= set(range(len(layers))):
        raise ValueError(f"owners {description.owners}")


def _reason(error: Exception) -> str:
    """An error in one line."""
    return " ".join(repr(error).split())[:300]
