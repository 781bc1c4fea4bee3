"""A process's levels as the monitor shows them; does not import torch."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dbdist.processes.partition import Partition

CURVE_POINTS = 300


@dataclass(frozen=True, kw_only=True)
class Levels:
    """The levels that blocks train on: their name, who has which, how often each is drawn."""

    name: str
    """What the task's process calls a level, such as `sigma`."""
    is_log: bool
    """Whether they are shown on a logarithmic axis."""
    boundaries: tuple[float, ...]
    """Ascending; block b of B has what lies between entries B-1-b and B-b."""
    ranges: tuple[tuple[float, float], ...]
    """(lowest, highest) that each block trains on, its overlap with its neighbours included."""
    curve: tuple[tuple[float, float], ...]
    """(level, density along the axis) from the lowest level to the highest."""

    @property
    def num_blocks(self) -> int:
        return len(self.ranges)


def levels_of(partition: "Partition | None") -> Levels | None:
    """How the monitor shows these levels; None without levels.

    Every block has the same share of training, so the density is the slope of the share of levels
    below a level.
    """
    if partition is None:
        return None
    import torch

    is_log = partition.is_log
    low, high = (math.log(x) if is_log else x for x in (partition.lowest, partition.highest))
    places = torch.linspace(low, high, CURVE_POINTS, dtype=torch.float64)
    edges = (places.exp() if is_log else places).tolist()
    below = [partition.fraction_of(edge) for edge in edges]
    return Levels(
        name=partition.level_name,
        is_log=is_log,
        boundaries=tuple(partition.boundaries.tolist()),
        ranges=tuple(partition.block_range(b) for b in range(partition.num_blocks)),
        curve=_slopes(places.tolist(), edges, below),
    )


def _slopes(
    places: list[float], levels: list[float], below: list[float]
) -> tuple[tuple[float, float], ...]:
    """(level, slope of `below` there), by differences between neighbours."""
    last = len(places) - 1
    found: list[tuple[float, float]] = []
    for i, level in enumerate(levels):
        a, b = max(i - 1, 0), min(i + 1, last)
        found.append((level, (below[b] - below[a]) / (places[b] - places[a])))
    return tuple(found)
