"""Tables that fit the terminal: columns give way whole, the least important first."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len
from rich.text import Text


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    header: str
    cells: Sequence[Any]
    """Texts, or what rich can draw in `min_width` columns."""
    importance: int
    """Columns with the lowest give way first."""
    min_width: int = 0
    justify: Any = "right"

    @property
    def width(self) -> int:
        """Of the widest cell."""
        texts = [cell for cell in self.cells if isinstance(cell, str | Text)]
        widths = (cell_len(text if isinstance(text, str) else text.plain) for text in texts)
        return max(self.min_width, cell_len(self.header), *widths)


def fitting(columns: Sequence[Column], width: int, gap: int, edge: int = 0) -> list[Column]:
    """The columns that fit into the width beside each other, in their order; one at least.

    gap: characters between two columns. edge: those at both ends together.
    """
    kept = list(columns)
    while len(kept) > 1 and edge + sum(c.width for c in kept) + gap * (len(kept) - 1) > width:
        kept.remove(min(kept, key=lambda column: column.importance))
    return kept
