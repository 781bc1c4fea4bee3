"""Compares the pairs of neighbouring symbols of sampled text with those of the corpus.

    dbdist sample runs/kjv-mdm --num 100
    python -m dbdist.bench.bigrams runs/kjv-mdm runs/kjv-mdm/samples-…/samples.safetensors

Prints one line of JSON: total variation distances (0: the same frequencies, 1: no pair in common)
from the pairs of the training text. `samples` is to be read beside `train` and `held_out`, as many
windows spread over either text, and `independent`, symbols that are as frequent but know no
neighbour.
"""

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dbdist.commands.command_line import OneLineParser, guarded
from dbdist.data.base import Dataset
from dbdist.data.sources import load_dataset, prepare
from dbdist.data.text import TextSpec
from dbdist.errors import ConfigError
from dbdist.run.folder import config_of_run

MAX_SYMBOLS = 4096
CHUNK = 4096
"""Windows that are counted at a time."""


def main(argv: list[str] | None = None) -> None:
    guarded("dbdist.bench.bigrams", lambda: run(sys.argv[1:] if argv is None else argv))


def run(argv: list[str]) -> None:
    parser = OneLineParser(prog="dbdist.bench.bigrams", description=__doc__)
    parser.add_argument("run_dir", metavar="RUN", help="folder of a run of a text")
    parser.add_argument("samples", type=Path, help="samples.safetensors of `dbdist sample`")
    given, rest = parser.parse_known_args(argv)
    config = config_of_run("dbdist.bench.bigrams", "", ["--run_dir", given.run_dir, *rest])
    prepare(config.data)
    train_set, test_set = (load_dataset(config.data, split) for split in ("train", "test"))
    spec = train_set.spec
    if not isinstance(spec, TextSpec):
        raise ConfigError(f"{given.run_dir} was trained on {config.data.name}, which is no text")
    samples = ids_of(given.samples, spec)
    size = spec.vocabulary_size
    if size > MAX_SYMBOLS:
        raise ConfigError(f"the text has {size:,} symbols; pairs are counted of {MAX_SYMBOLS:,}")
    pairs, single = frequencies(windows_of(train_set, len(train_set)), size)
    result = {
        "num_samples": len(samples),
        "samples": distance(frequencies([samples], size)[0], pairs),
        "train": distance(frequencies(windows_of(train_set, len(samples)), size)[0], pairs),
        "held_out": distance(frequencies(windows_of(test_set, len(samples)), size)[0], pairs),
        "independent": distance(torch.outer(single, single).flatten(), pairs),
    }
    print(json.dumps({k: round(v, 4) for k, v in result.items()}))


def ids_of(path: Path, spec: TextSpec) -> Tensor:
    """The ids (n, T) in a file of samples. Raises ConfigError if they are not of this text."""
    try:
        ids = load_file(path)["samples"]
    except (OSError, SafetensorError, KeyError) as error:
        raise ConfigError(
            f"{path} holds no samples ({error}); give a samples.safetensors"
        ) from None
    is_text = ids.dtype == torch.int64 and ids.ndim == 2 and ids.numel() and ids.shape[1] > 1
    if not is_text or (ids < 0).any():
        raise ConfigError(f"{path} holds no text, but {list(ids.shape)} of {ids.dtype}")
    if (ids >= spec.vocabulary_size).any():
        raise ConfigError(
            f"{path} has the id {int(ids.max())}, but the text has {spec.vocabulary_size} symbols; "
            "give samples of a run of the same text"
        )
    return ids


def windows_of(dataset: Dataset, num: int) -> Iterator[Tensor]:
    """The ids (n, T) of `num` windows at equal distances, or of all; some at a time."""
    count = min(num, len(dataset))
    keys = [i * len(dataset) // count for i in range(count)]
    for first in range(0, count, CHUNK):
        yield dataset.__getitems__(keys[first : first + CHUNK])["tokens"]


def frequencies(windows: Iterable[Tensor], size: int) -> tuple[Tensor, Tensor]:
    """Shares of each of size ** 2 pairs, and of each symbol, in windows (n, T)."""
    pairs, single = torch.zeros(size**2), torch.zeros(size)
    for ids in windows:
        both = (ids[:, :-1] * size + ids[:, 1:]).flatten()
        pairs = pairs.double() + torch.bincount(both, minlength=size**2)
        single = single.double() + torch.bincount(ids.flatten(), minlength=size)
    return pairs / pairs.sum(), single / single.sum()


def distance(one: Tensor, other: Tensor) -> float:
    """Half of the sum of the differences: the total variation distance."""
    return float((one - other).abs().sum() / 2)


if __name__ == "__main__":
    main()
