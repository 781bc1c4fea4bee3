"""Opens every sample once and lists what cannot be used, and why.

    dbdist check-data CONFIG

It trains nothing and starts no process. Options of the configuration change it as for train.
"""

import dataclasses
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from dbdist.commands.command_line import OneLineParser, guarded, with_first
from dbdist.commands.progress import progress_bar
from dbdist.config.config import check_values
from dbdist.config.parse import parse_config
from dbdist.data.base import ChecksFiles, Dataset
from dbdist.data.found import describe_found
from dbdist.data.sources import load_dataset, prepare
from dbdist.data.workers import TakesNotes
from dbdist.errors import DataError

CHUNK = 32
"""Samples that one thread opens in one go."""
MAX_ROWS = 50
"""Classes that are shown one by one."""


def main(argv: list[str] | None = None) -> None:
    guarded(
        "dbdist check-data",
        lambda: run(sys.argv[1:] if argv is None else argv),
        interrupted="nothing was changed",
    )


def run(argv: list[str]) -> None:
    parser = OneLineParser(
        prog="dbdist check-data",
        usage="dbdist check-data CONFIG [--data.root FOLDER] [--section.key value …]",
        description=__doc__,
        allow_abbrev=False,
    )
    _, options = parser.parse_known_args(argv)
    options = with_first("--config", options)
    config = parse_config("dbdist check-data", "", options)
    check_values(config)
    config.data.check()
    data = dataclasses.replace(config.data, on_error="stop")  # what would be replaced is bad, too
    prepare(data)
    train, test = load_dataset(data, "train"), load_dataset(data, "test")
    _say(describe_found(train, test))
    if hasattr(train, "labels") and hasattr(train.spec, "num_classes"):
        _show_classes(train, test)
    num_files, num_bad = 0, 0
    for split, dataset in (("train", train), ("test", test)):
        for reason in dataset.damaged_files() if isinstance(dataset, ChecksFiles) else ():
            _say(f"bad: {reason}")
            num_files += 1
        for reason in find_damage(dataset, split):
            _say(f"bad: {reason}")
            num_bad += 1
    total = len(train) + len(test)
    if num_bad:
        skip = ", or train with --data.on_error skip" if isinstance(train, TakesNotes) else ""
        raise DataError(
            f"{num_bad} of {total:,} samples cannot be used; mend or remove their files{skip}"
        )
    if num_files:
        raise DataError(f"files that are damaged: {num_files}; restore them from a copy")
    _say(f"all {total:,} samples can be used")


def find_damage(dataset: Dataset, split: str) -> Iterator[str]:
    """A sentence for each sample that cannot be used, in order, while a bar shows how far it is."""
    starts = range(0, len(dataset), CHUNK)

    def check(start: int) -> list[str]:
        return _damage(dataset, list(range(len(dataset))[start : start + CHUNK]))

    pool = ThreadPoolExecutor(os.cpu_count() or 1)
    try:
        with progress_bar() as progress:
            task = progress.add_task(split, total=len(dataset))
            for start, found in zip(starts, pool.map(check, starts), strict=True):
                progress.update(task, completed=min(start + CHUNK, len(dataset)))
                yield from found
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _damage(dataset: Dataset, indices: list[int]) -> list[str]:
    try:
        dataset.__getitems__([*indices])
    except DataError as error:
        if len(indices) == 1:
            return [str(error)]
        return [text for index in indices for text in _damage(dataset, [index])]
    return []


def _show_classes(train: Any, test: Any) -> None:
    """Counts of each class. train, test: with labels and a spec of classes."""
    num_classes = train.spec.num_classes
    names = train.spec.class_names or tuple(map(str, range(num_classes)))
    counts = [torch.bincount(s.labels, minlength=num_classes).tolist() for s in (train, test)]
    if num_classes > MAX_ROWS:
        low, high = min(counts[0]), max(counts[0])
        _say(f"{low:,} to {high:,} samples to train of each class ({names[0]} … {names[-1]})")
        return
    table = Table("class", "name", "train", "test", box=None)
    for i, name in enumerate(names):
        table.add_row(str(i), _printable(name), f"{counts[0][i]:,}", f"{counts[1][i]:,}")
    Console().print(table, highlight=False)


def _say(text: str) -> None:
    print(_printable(text))


def _printable(text: str) -> str:
    """What the terminal cannot show, as an escape."""
    encoding = sys.stdout.encoding or "ascii"
    return text.encode(encoding, "backslashreplace").decode(encoding)


if __name__ == "__main__":
    main()
