"""Images as latents of an autoencoder that computed them once, in normalised batches.

Takes a folder that `dbdist encode-latents` wrote, gives batches like those of a set of images. A
sample is a function of its key: an index, whose latent is the posterior's mean, or (index, seed)
for a draw from the posterior, and for the mirrored image with probability 1/2. Nothing here moves
the global random generators, imports the autoencoder or communicates.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from dbdist.data.base import Batch, Key
from dbdist.data.latent_files import Index, Shard, Split, open_shard, read_index, refuse, sha256_of
from dbdist.data.options import LatentOptions
from dbdist.data.paths import require_file, shown
from dbdist.errors import DataError

SIGMA_DATA = 0.5
"""Standard deviation of every channel of a batch, over the training set: what EDM2 advises."""


@dataclass(frozen=True)
class LatentSpec:
    """What a model must know of a set of latents, and a decoder of its batches."""

    name: str
    channels: int
    image_size: int
    """Side of a latent; the images' own is larger."""
    num_classes: int
    mean: tuple[float, ...]
    """What is taken off each channel: its mean over the training set."""
    std: tuple[float, ...]
    """What each channel is divided by then: its standard deviation / SIGMA_DATA."""
    class_names: tuple[str, ...] | None
    vae_sha256: str
    """Of the weights of the autoencoder."""
    scaling: float
    """Latents before normalisation are (raw - shift) x scaling."""
    shift: float

    def identity(self) -> dict[str, Any]:
        """What tells this data from other data: classes, size, scaling and autoencoder."""
        values = asdict(self)
        return {k: [*v] if isinstance(v, tuple) else v for k, v in values.items()}


def spec_of(index: Index) -> LatentSpec:
    """The spec of a folder."""
    contents = index.contents
    return LatentSpec(
        "latents",
        contents.form.channels,
        contents.form.image_size,
        contents.num_classes,
        index.mean,
        tuple(std / SIGMA_DATA for std in index.std),
        contents.class_names,
        contents.vae.sha256,
        contents.vae.scaling,
        contents.vae.shift,
    )


def spec_from(values: dict[str, Any]) -> LatentSpec:
    """A spec from what `asdict` or `identity` made of it, by way of JSON."""
    given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return LatentSpec(**given)


def dataset_spec(config: LatentOptions) -> LatentSpec:
    """The spec of the folder `data.root`, from its index."""
    return spec_of(read_index(_root(config)))


def prepare(config: LatentOptions) -> None:
    """Refuses a folder that lacks its index or a shard; nothing is ever fetched."""
    root = _root(config)
    for shards in read_index(root).shards.values():
        for shard in shards:
            require_file(root / shard.file)


def load_dataset(config: LatentOptions, split: Split) -> "LatentDataset":
    """A split of the folder `data.root`."""
    root = _root(config)
    index = read_index(root)
    has_mirrored = index.contents.form.has_mirrored
    if config.flip and not has_mirrored:
        raise DataError(
            f"data.flip needs latents of mirrored images, which {shown(root)} has not; encode "
            "again with --flip, or leave data.flip out"
        )
    flips = has_mirrored if config.flip is None else config.flip
    return LatentDataset(root, index, split, flips)


def _root(config: LatentOptions) -> Path:
    return Path(config.root).expanduser().absolute()


class LatentDataset:
    """One split of a folder of latents. Training samples are drawn, test samples are means."""

    def __init__(self, root: Path, index: Index, split: Split, flips: bool = False) -> None:
        """flips: mirror half of the training samples. Raises DataError for other shards."""
        self.spec = spec_of(index)
        self._form, self._root = index.contents.form, root
        self._flips = flips
        self.augments = split == "train" and (self._form.has_posterior or flips)
        self._shards: Sequence[Shard] = index.shards[split]
        self._tensors = [open_shard(root / s.file, self._form, split, s) for s in self._shards]
        self._ends = [*accumulate(shard.num_samples for shard in self._shards)]
        self.labels = torch.cat([self._labels(i) for i in range(len(self._shards))])

    @property
    def kind(self) -> str:
        """What the samples are, after their number."""
        num_classes = self.spec.num_classes
        return f"latents of {num_classes} {'class' if num_classes == 1 else 'classes'}"

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, key: Key) -> Batch:
        """One sample: its "image" (c, s, s) and its "label"."""
        return {name: values[0] for name, values in self.__getitems__([key]).items()}

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        """The "image" (n, c, s, s), which is a latent, and "label" (n,) of these samples."""
        index = torch.tensor(
            [key if isinstance(key, int) else key[0] for key in keys], dtype=torch.int64
        )
        seeds = [None if isinstance(key, int) or not self.augments else key[1] for key in keys]
        draws = [self._draw(seed) for seed in seeds]
        mirrored = torch.tensor([is_mirrored for is_mirrored, _ in draws], dtype=torch.bool)
        values = [self._read(name, index) for name in self._form.names()]
        if mirrored.any():
            for value, name in zip(values, self._form.names(is_mirrored=True), strict=True):
                value[mirrored] = self._read(name, index[mirrored])
        latents = values[0]
        if self._form.has_posterior:
            self._check_not_negative(values[1], index)
            for row, (_, noise) in enumerate(draws):
                if noise is not None:
                    latents[row].addcmul_(values[1][row], noise)
        return {"image": normalize(latents, self.spec), "label": self.labels[index]}

    def digest(self) -> str:
        """SHA-256 of the shards' own, which `damaged_files` compares with their content."""
        listed = "".join(f"{shard.num_samples} {shard.sha256}\n" for shard in self._shards)
        return hashlib.sha256(listed.encode()).hexdigest()

    def damaged_files(self) -> Iterator[str]:
        """A sentence for each shard whose content is not what was written; reads all of them."""
        for shard in self._shards:
            path = self._root / shard.file
            try:
                if sha256_of(path) != shard.sha256:
                    refuse(path, "is not what was written (its SHA-256 differs)")
            except OSError as error:
                yield f"{shown(path)} cannot be read ({error.strerror})"
            except DataError as error:
                yield str(error)

    def _draw(self, seed: int | None) -> tuple[bool, Float[Tensor, "c s s"] | None]:
        """(whether the mirrored image is taken, noise of the posterior) for a key's seed."""
        if seed is None:
            return False, None
        generator = torch.Generator().manual_seed(seed)
        is_mirrored = self._flips and bool(torch.rand((), generator=generator) < 0.5)
        shape = self._form.channels, self._form.image_size, self._form.image_size
        has_noise = self._form.has_posterior
        return is_mirrored, torch.randn(shape, generator=generator) if has_noise else None

    def _read(self, name: str, index: Int64[Tensor, " n"]) -> Float[Tensor, "n c s s"]:
        """These rows of a tensor, of as many shards as they lie in."""
        side = self._form.image_size
        rows = torch.empty(len(index), self._form.channels, side, side)
        shard_of = torch.tensor([bisect_right(self._ends, i) for i in index.tolist()])
        for i in shard_of.unique().tolist():
            here = shard_of == i
            first = self._ends[i] - self._shards[i].num_samples
            rows[here] = self._tensors[i][name][index[here] - first].float()
        if not bool(rows.isfinite().all()):
            bad = index[~rows.isfinite().flatten(1).all(dim=1)]
            self._refuse(name, int(bad[0]), "a number that is not finite")
        return rows

    def _check_not_negative(
        self, std: Float[Tensor, "n c s s"], index: Int64[Tensor, " n"]
    ) -> None:
        if bool((std < 0).any()):
            bad = index[(std < 0).flatten(1).any(dim=1)]
            self._refuse("std", int(bad[0]), "a number below 0")

    def _refuse(self, name: str, i: int, what: str) -> None:
        shard = bisect_right(self._ends, i)
        row = i - (self._ends[shard] - self._shards[shard].num_samples)
        refuse(self._root / self._shards[shard].file, f"has {what} in {name} of sample {row}")

    def _labels(self, i: int) -> Int64[Tensor, " n"]:
        """The labels of a shard, read and checked."""
        labels = self._tensors[i]["labels"].clone()
        wrong = (labels < 0) | (labels >= self.spec.num_classes)
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            refuse(
                self._root / self._shards[i].file,
                f"has label {int(labels[row])} for sample {row}, but there are "
                f"{self.spec.num_classes} classes",
            )
        return labels


def normalize(latents: Float[Tensor, "n c s s"], spec: LatentSpec) -> Float[Tensor, "n c s s"]:
    """Latents as the model expects them: each channel of mean 0 and standard deviation 0.5."""
    mean, std = _scale(latents, spec)
    return (latents - mean) / std


def denormalize(batch: Float[Tensor, "n c s s"], spec: LatentSpec) -> Float[Tensor, "n c s s"]:
    """The inverse of `normalize`: (raw - shift) x scaling, as diffusers' pipelines have them."""
    mean, std = _scale(batch, spec)
    return batch * std + mean


def _scale(like: Tensor, spec: LatentSpec) -> Sequence[Tensor]:
    return [like.new_tensor(values).view(-1, 1, 1) for values in (spec.mean, spec.std)]
