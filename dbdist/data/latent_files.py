"""The files of a folder of latents: shards, and `index.json`, which is written last.

A shard is a safetensors file with the samples' posteriors, `mean` and `std` (n, C, S, S), or with
`latents` alone; perhaps the same of the mirrored images (`mean_mirrored` …); and `labels` (n,).
Latents are as diffusers' pipelines have them: (raw - shift) x scaling.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, get_args

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dbdist.data.paths import require_file, shown
from dbdist.errors import DataError
from dbdist.whole_files import open_file, read_file

FORMAT = "dbdist-latents"
VERSION = 1
INDEX = "index.json"
UNFINISHED = "unfinished.json"
"""What will be the index, of the shards that are there; the index takes its place."""
DTYPES = {"float16": torch.float16, "float32": torch.float32}
Split = Literal["train", "test"]
T = TypeVar("T")


@dataclass(frozen=True)
class Form:
    """What every shard of a folder holds."""

    channels: int
    image_size: int
    """Side of a latent."""
    dtype: Literal["float16", "float32"]
    has_posterior: bool
    """Whether samples are a mean and a standard deviation to draw by."""
    has_mirrored: bool
    """Whether training shards hold the latents of the mirrored images too."""

    def names(self, is_mirrored: bool = False) -> tuple[str, ...]:
        """The tensors that make a sample: its mean and standard deviation, or its values."""
        names = ("mean", "std") if self.has_posterior else ("latents",)
        return tuple(f"{name}_mirrored" for name in names) if is_mirrored else names

    def all_names(self, split: Split) -> tuple[str, ...]:
        """Every tensor of a shard but its labels."""
        has_mirrored = self.has_mirrored and split == "train"
        return self.names() + (self.names(is_mirrored=True) if has_mirrored else ())


@dataclass(frozen=True)
class VaeIdentity:
    """Which autoencoder made the latents, and in which unit they are."""

    name: str
    sha256: str
    """Of the file of its weights."""
    scaling: float
    shift: float


@dataclass(frozen=True)
class Shard:
    """A file of samples, and what their channels add up to."""

    file: str
    num_samples: int
    num_bytes: int
    sha256: str
    sums: tuple[float, ...]
    """Of the values, per channel."""
    squares: tuple[float, ...]
    """Of the squared values, per channel; with a posterior, of what is drawn on average."""


@dataclass(frozen=True)
class Contents:
    """What a folder is to hold; whoever continues one must mean the same."""

    form: Form
    vae: VaeIdentity
    num_classes: int
    class_names: tuple[str, ...] | None
    shard_size: int
    source: Mapping[str, Any]
    """What tells the encoded images from others, as plain values."""


@dataclass(frozen=True)
class Index:
    """What index.json says."""

    contents: Contents
    shards: Mapping[str, tuple[Shard, ...]]
    """Of "train" and of "test"."""
    mean: tuple[float, ...]
    """Per channel, over the training set as it is drawn, without mirrored images."""
    std: tuple[float, ...]


def to_json(contents: Contents, shards: Mapping[str, Sequence[Shard]]) -> dict[str, Any]:
    """What unfinished.json holds, and index.json besides the channels' statistics."""
    listed = {split: [asdict(shard) for shard in shards[split]] for split in ("train", "test")}
    values = {"contents": asdict(contents), "shards": listed}
    return json.loads(json.dumps({"format": FORMAT, "version": VERSION, **values}))


def read_index(root: Path) -> Index:
    """The index of a folder. Raises DataError where there is none, or a damaged one."""
    path = root / INDEX
    if not path.exists():
        remedy = "data.root must name a folder that `dbdist encode-latents` wrote"
        if (root / UNFINISHED).exists():
            remedy = "the same `dbdist encode-latents` again finishes the folder"
        raise DataError(f"{shown(path)} is missing; {remedy}")
    values = read_listing(path)
    try:
        given = {key: _floats(values[key]) for key in ("mean", "std")}
        index = Index(contents_of(values), shards_of(values), **given)
        channels = index.contents.form.channels
        if not len(index.mean) == len(index.std) == channels:
            raise ValueError(f"mean and std are not of {channels} channels")
        if min(index.std) <= 0:
            raise ValueError("a channel's std is not above 0")
        for split, shards in index.shards.items():
            if not shards or [s.file for s in shards] != shard_files(split, len(shards)):
                raise ValueError(f"{split} has not one shard after the other")
    except (LookupError, TypeError, ValueError, OverflowError) as error:
        reason = " ".join(shown(str(error)).split())[:200]
        raise DataError(f"{shown(path)} is damaged ({reason}); encode again") from None
    return index


def read_listing(path: Path) -> dict[str, Any]:
    """What index.json or unfinished.json holds. Raises DataError for another file."""
    require_file(path)
    try:
        values = json.loads(read_file(path))
        is_known = (values["format"], values["version"]) == (FORMAT, VERSION)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        is_known, values = False, {}
    if not is_known:
        raise DataError(f"{shown(path)} is damaged or not {FORMAT} version {VERSION}")
    return values


def contents_of(values: Mapping[str, Any]) -> Contents:
    """What a listing is of. Raises what wrong values raise."""
    given = {**values["contents"]}
    names = given["class_names"]
    given["class_names"] = None if names is None else tuple(names)
    given["form"], given["vae"] = _read(Form, given["form"]), _read(VaeIdentity, given["vae"])
    contents = Contents(**given)
    num_classes = _count(contents.num_classes)
    if names is not None:
        if len(names) != num_classes or not all(isinstance(name, str) for name in names):
            raise ValueError(f"class_names are not the names of {num_classes} classes")
    return contents


def shards_of(values: Mapping[str, Any]) -> dict[str, tuple[Shard, ...]]:
    """The shards of a listing, by split. Raises what wrong values raise."""
    shards = {
        split: tuple(_read(Shard, entry) for entry in values["shards"][split])
        for split in ("train", "test")
    }
    for split, listed in shards.items():
        for shard in listed:
            shard_number(split, shard.file)
    return shards


def _read(kind: type[T], values: Mapping[str, Any]) -> T:
    """A dataclass of plain values. Raises TypeError, ValueError or KeyError for other types."""
    given = dict(values)
    for field in fields(kind):  # type: ignore[arg-type]
        value, wanted = given[field.name], field.type
        if wanted == tuple[float, ...]:
            given[field.name] = _floats(value)
        elif wanted is int:
            _count(value)
        elif wanted is float:
            (given[field.name],) = _floats([value])
        elif wanted in (str, bool):
            if not isinstance(value, wanted):  # type: ignore[arg-type]
                raise TypeError(f"{field.name} is {value!r}")
        elif value not in get_args(wanted):
            raise ValueError(f"{field.name} is {value!r}")
    return kind(**given)


def _floats(values: Any) -> tuple[float, ...]:
    numbers = tuple(float(value) for value in values)
    if not all(map(math.isfinite, numbers)):
        raise ValueError("a number is not finite")
    return numbers


def _count(value: Any) -> int:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{value!r} is no number of something")
    return value


def shard_files(split: str, count: int) -> list[str]:
    """The names of a split's first shards."""
    return [f"{split}-{number:05}.safetensors" for number in range(count)]


def shard_number(split: str, file: str) -> int:
    """The number in a shard's name. Raises ValueError for any other name: no path leads out."""
    if not (found := re.fullmatch(rf"{split}-(\d{{5,9}})\.safetensors", file, re.ASCII)):
        raise ValueError(f"{file!r} is no name of a shard")
    return int(found[1])


def is_partial(name: str) -> bool:
    """Whether a file is what an interrupted writer has left of another."""
    own = r"(index\.json|unfinished\.json|(train|test)-\d{5,9}\.safetensors)"
    return bool(re.fullmatch(rf"{own}\.\w+\.partial", name, re.ASCII))


def open_shard(path: Path, form: Form, split: Split, shard: Shard) -> dict[str, Tensor]:
    """The tensors of a shard, mapped and not read: rows come from the disk when they are used.

    Raises DataError where it is missing or has another size or form than the index says.
    """
    size = require_file(path).st_size
    if size != shard.num_bytes:
        refuse(path, f"has {size:,} bytes, index.json says {shard.num_bytes:,}")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, ValueError) as error:
        refuse(path, f"is damaged ({' '.join(shown(str(error)).split())[:200]})")
    expected = {**dict.fromkeys(form.all_names(split)), "labels": None}
    if tensors.keys() != expected.keys():
        refuse(path, f"holds {', '.join(sorted(tensors))}, not {', '.join(sorted(expected))}")
    n, side = shard.num_samples, form.image_size
    for name, tensor in tensors.items():
        is_labels = name == "labels"
        shape = (n,) if is_labels else (n, form.channels, side, side)
        dtype = torch.int64 if is_labels else DTYPES[form.dtype]
        if (tuple(tensor.shape), tensor.dtype) != (shape, dtype):
            refuse(
                path,
                f"has {name} of shape {[*tensor.shape]} and type {tensor.dtype}, index.json says "
                f"{[*shape]} and {dtype}",
            )
    return tensors


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content; raises OSError."""
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse(path: Path, why: str) -> NoReturn:
    """Raises DataError for a shard that is not what the index says."""
    raise DataError(f"{shown(path)} {why}; restore it from a copy or encode again")
