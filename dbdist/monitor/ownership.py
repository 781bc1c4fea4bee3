"""What each rank holds, and the table of it."""

import math
import resource
import sys
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from dbdist.monitor.display import range_text
from dbdist.monitor.tables import Column, fitting

NARROW = 60
"""Terminals with fewer columns get a table without lines between its columns."""


@dataclass(frozen=True, kw_only=True)
class Ownership:
    """What one rank holds and trains."""

    rank: int
    block: str  # "-": a coordinator, which has the shared modules and no block
    replica: int
    layers: str  # "0-1", "all" or "-"
    levels: tuple[float, float] | None
    """That its blocks train on."""
    parameters: int  # without the shared ones
    shared_parameters: int
    optimizer_bytes: int
    device: str
    owns_shared: bool


def ownership_table(rows: Iterable[Ownership], level: str, width: int) -> Table:
    """Who owns what, as wide as the terminal.

    level: what the levels are called, if there are any. The columns that matter least give way
    where it is narrow.
    """
    rows = sorted(rows, key=lambda row: row.rank)
    marks = ["*" if row.owns_shared else " " for row in rows]
    counts = [f"{row.shared_parameters:,} {mark}" for row, mark in zip(rows, marks, strict=True)]
    columns = [
        Column("rank", [str(row.rank) for row in rows], 9),
        Column("block", [row.block for row in rows], 8),
        Column("replica", ["-" if r.block == "-" else str(r.replica) for r in rows], 1),
        Column("layers", [row.layers for row in rows], 7),
        Column(level, [range_text(row.levels) for row in rows], 6),
        Column("parameters", [f"{row.parameters:,}" for row in rows], 5),
        Column("shared", counts, 4),
        Column("optimizer", [human_bytes(row.optimizer_bytes) for row in rows], 2),
        Column("device", [row.device for row in rows], 3),
    ]
    if not level:
        del columns[4]
    is_narrow = width < NARROW
    shown = fitting(columns, width, gap=3, edge=0 if is_narrow else 4)
    note = " (*: owner of the shared modules)" * any(c.header == "shared" for c in shown)
    title = f"Who owns what{note}"
    table = Table(title=title, title_justify="left", title_style="bold")
    if is_narrow:
        table.box, table.show_edge, table.pad_edge = SIMPLE_HEAD, False, False
    for column in shown:
        table.add_column(column.header, justify=column.justify, no_wrap=True)
    for cells in zip(*(column.cells for column in shown), strict=True):
        table.add_row(*cells)
    return table


def human_bytes(num_bytes: float | int) -> str:
    """1536 -> "1.5 KiB"."""
    power = min(int(math.log2(max(num_bytes, 1))) // 10, 4)
    unit = ("B", "KiB", "MiB", "GiB", "TiB")[power]
    return f"{num_bytes / 1024**power:.{1 if power else 0}f} {unit}"


def peak_memory_mb(device: torch.device) -> float:
    """Most memory so far in MiB: of tensors on a CUDA device, of the whole process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    units_per_mb = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / units_per_mb
