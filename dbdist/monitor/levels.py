"""A process's levels as the monitor shows them; does not import torch."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dbdist.processes.gaussian import NoiseSchedule

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

    def on_axis(self, level: float) -> float:
        """Where a level stands on the axis that shows it."""
        return math.log(level) if self.is_log else level


def levels_of(schedule: "NoiseSchedule | None") -> Levels | None:
    """How the monitor shows these levels; None without levels.

    Every block has the same share of training, so the density is the slope of the share of levels
    below a level.
    """
    if schedule is None:
        return None
    import torch

    shares = torch.linspace(0, 1, CURVE_POINTS, dtype=torch.float64)
    low, high = math.log(schedule.sigma_min), math.log(schedule.sigma_max)
    edges = (low + (high - low) * shares).exp().tolist()
    below = [schedule.level_of(edge) for edge in edges]
    return Levels(
        name="sigma",
        is_log=True,
        boundaries=tuple(schedule.boundaries.tolist()),
        ranges=tuple(schedule.block_range(b) for b in range(schedule.num_blocks)),
        curve=_slopes([math.log(edge) for edge in edges], edges, below),
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
