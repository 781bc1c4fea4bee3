"""Writes a folder of latents shard by shard, and continues one that was interrupted.

1. unfinished.json says what the folder is to hold and which shards are there.
2. Each shard is on disk as a whole before unfinished.json names it.
3. index.json comes last, with the statistics of the training set, and unfinished.json goes.

A folder of anything else is never touched.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from dbdist.data.latent_files import (
    DTYPES,
    INDEX,
    UNFINISHED,
    Contents,
    Shard,
    Split,
    is_partial,
    read_listing,
    sha256_of,
    shard_files,
    shard_number,
    shards_of,
    to_json,
)
from dbdist.data.paths import shown
from dbdist.errors import ConfigError, DataError
from dbdist.whole_files import is_held, locked, sync_folder, write_json, write_whole


class LatentWriter:
    """The shards of one folder that are there, and those that are still to come."""

    def __init__(self, out: Path, contents: Contents, num_samples: Mapping[str, int]) -> None:
        """As `opened_writer`, which see."""
        self.out, self.contents, self.num_samples = out, contents, num_samples
        self._shards: dict[str, dict[int, Shard]] = {"train": {}, "test": {}}

    @property
    def num_kept(self) -> int:
        """Shards that are there."""
        return sum(map(len, self._shards.values()))

    def missing(self, split: Split) -> list[tuple[int, range]]:
        """(number, its samples) of each shard that is still to come."""
        total, size = self.num_samples[split], self.contents.shard_size
        ranges = [range(i, min(i + size, total)) for i in range(0, total, size)]
        return [(i, samples) for i, samples in enumerate(ranges) if i not in self._shards[split]]

    def add(
        self,
        split: Split,
        number: int,
        latents: Mapping[str, Float[Tensor, "n c s s"]],
        labels: Int64[Tensor, " n"],
    ) -> Shard:
        """Writes a shard. latents: every tensor that the folder's form names, as float32.

        Raises DataError for numbers that the form cannot hold, and OSError.
        """
        form, file = self.contents.form, shard_files(split, number + 1)[-1]
        assert {*latents} == {*form.all_names(split)}, sorted(latents)
        stored = {n: values.to(DTYPES[form.dtype]).contiguous() for n, values in latents.items()}
        for name, values in stored.items():
            if not bool(values.isfinite().all()):
                is_whole = bool(latents[name].isfinite().all())
                raise DataError(
                    f"{file} would hold numbers beyond float16; store float32 (--dtype float32)"
                    if is_whole
                    else f"{file} would hold numbers that are not finite: the autoencoder fails on "
                    f"some of these {len(values)} images"
                )
        content = safetensors.torch.save({**stored, "labels": labels.contiguous()})
        values = [stored[name].double() for name in form.names()]
        squares = sum(value.square() for value in values)
        assert isinstance(squares, Tensor)
        shard = Shard(
            file,
            len(labels),
            len(content),
            hashlib.sha256(content).hexdigest(),
            *(tuple(x.sum(dim=(0, 2, 3)).tolist()) for x in (values[0], squares)),
        )
        with _written(self.out):
            write_whole(self.out / file, content)
            self._shards[split][number] = shard
            self._list()
        return shard

    def finish(self) -> None:
        """Writes index.json once every shard is there. Raises DataError and OSError."""
        assert not self.missing("train") + self.missing("test")
        mean, std = self._statistics()
        values = to_json(self.contents, self._listed())
        with _written(self.out):
            sync_folder(self.out)
            write_json(self.out / INDEX, {**values, "mean": mean, "std": std})
            sync_folder(self.out)
            (self.out / UNFINISHED).unlink(missing_ok=True)

    def _statistics(self) -> tuple[list[float], list[float]]:
        """(mean, standard deviation) per channel, over the training set as it is drawn."""
        shards, side = self._listed()["train"], self.contents.form.image_size
        count = side**2 * sum(shard.num_samples for shard in shards)
        mean, square = (
            torch.tensor([getattr(shard, name) for shard in shards], dtype=torch.float64).sum(0)
            / count
            for name in ("sums", "squares")
        )
        variance = square - mean.square()
        if not bool((variance > 1e-12 * square).all()):
            channel = int(variance.argmin())
            raise DataError(
                f"channel {channel} of the latents is the same everywhere, so it has no scale; use "
                "another autoencoder"
            )
        return mean.tolist(), variance.sqrt().tolist()

    def _listed(self) -> dict[str, Sequence[Shard]]:
        return {split: [of[i] for i in sorted(of)] for split, of in self._shards.items()}

    def _list(self) -> None:
        """Says in unfinished.json which shards are there."""
        write_json(self.out / UNFINISHED, to_json(self.contents, self._listed()))

    def keep(self, listed: Mapping[str, Sequence[Shard]]) -> None:
        """Keeps those of these shards that are there as they were written.

        If that is not all of them, there is no index any more but unfinished.json.
        """
        for split, shards in listed.items():
            for shard in shards:
                path, channels = self.out / shard.file, self.contents.form.channels
                is_whole = path.is_file() and sha256_of(path) == shard.sha256
                if is_whole and len(shard.sums) == len(shard.squares) == channels:
                    self._shards[split][shard_number(split, shard.file)] = shard
        if self.missing("train") or self.missing("test"):
            with _written(self.out):
                self._list()
                (self.out / INDEX).unlink(missing_ok=True)


@contextmanager
def opened_writer(
    out: Path, contents: Contents, num_samples: Mapping[str, int]
) -> Iterator[LatentWriter]:
    """The writer of a folder, which is new, empty or of the same contents.

    num_samples: of "train" and of "test". Raises ConfigError for any other folder, or one that
    another process writes just now.
    """
    with _written(out):
        out.mkdir(parents=True, exist_ok=True)
    if is_held(out):
        raise ConfigError(f"another process is writing into {shown(out)}")
    with locked(out):
        writer = LatentWriter(out, contents, num_samples)
        _continue(writer)
        yield writer


def _continue(writer: LatentWriter) -> None:
    """Keeps what is there of the same contents, and removes what an interrupted writer left."""
    out = writer.out
    found = sorted(path.name for path in out.iterdir())
    partial = [name for name in found if is_partial(name)]
    listings = [name for name in (INDEX, UNFINISHED) if name in found]
    if not listings and found != partial:
        other = next(name for name in found if name not in partial)
        raise ConfigError(
            f"{shown(out)} holds {shown(other)} and no latents of ours; name a new folder"
        )
    shards: Mapping[str, Sequence[Shard]] = {}
    for path in (out / name for name in listings[:1]):
        listing = read_listing(path)
        try:
            shards, stored = shards_of(listing), flat(listing["contents"])
        except (LookupError, TypeError, ValueError, OverflowError) as error:
            reason = " ".join(shown(str(error)).split())[:200]
            raise ConfigError(f"{shown(path)} is damaged ({reason}); name a new folder") from None
        wanted = to_json(writer.contents, {"train": (), "test": ()})
        _check_same(out, stored, flat(wanted["contents"]))
    writer.keep(shards)
    with _written(out):
        for name in partial:
            (out / name).unlink()


def _check_same(out: Path, stored: Mapping[str, object], wanted: Mapping[str, object]) -> None:
    """Raises ConfigError, naming the first difference, for a folder of other contents."""
    for key in sorted((stored.keys() | wanted.keys()) - {"vae.name"}):
        if stored.get(key) != wanted.get(key):
            old, new = (str(values.get(key))[:100] for values in (stored, wanted))
            raise ConfigError(
                f"{shown(out)} holds latents with {key} {old}, but {new} is asked for; name a new "
                "folder, or remove that one"
            )


def flat(values: object, key: str = "") -> dict[str, object]:
    """Dotted key -> value of nested plain values."""
    if not isinstance(values, Mapping):
        return {key: values}
    inner = (flat(value, f"{key}.{name}" if key else str(name)) for name, value in values.items())
    return {name: value for found in inner for name, value in found.items()}


@contextmanager
def _written(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"{shown(path)} cannot be written ({reason})") from None
