"""How far each block is, on the console: live bars on a terminal, else a line now and then."""

import math
import re
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress_bar import ProgressBar
from rich.table import Table

from dbdist import log
from dbdist.monitor.levels import Levels
from dbdist.monitor.record_files import Scalars
from dbdist.monitor.tables import Column, fitting

PLAIN_INTERVAL_S = 2.0
"""A block's lines are at least this far apart where there is no terminal."""
LIVE_INTERVAL_S = 0.1
NOT_LOSSES = ("loss", "grad_norm", "lr", "skipped")
"""Names under train/ that the trainer gives; others are the task's, and shown."""


@dataclass
class _Block:
    """Where one block stands and when that was last shown."""

    step: int
    since: tuple[int, float]  # speed counts from this step and time: the first record's, once known
    shown_step: int
    values: dict[str, float | int] = field(default_factory=dict)  # latest by tag, less /block{b}
    eta: str = "-"
    shown_at: float = -math.inf

    def losses(self) -> list[str]:
        """The loss, then what the task records under its own names where that is another number."""
        loss = self.values.get("train/loss", math.nan)
        others = {
            tag.removeprefix("train/"): value
            for tag, value in self.values.items()
            if tag.startswith("train/") and tag.removeprefix("train/") not in NOT_LOSSES
        }
        texts = [f"loss {loss:.4f}"] if "train/loss" in self.values else []
        return texts + [
            f"{name.replace('_', '-')} {value:.4f}"
            for name, value in sorted(others.items())
            if not math.isclose(value, loss, rel_tol=1e-6)
        ]

    def speed(self) -> str:
        speed = self.values.get("perf/samples_per_s")
        return "" if speed is None else f"{speed:.0f} samples/s"


class SteadyConsole(Console):
    """A console that may be lost, or lie on a full disk, without an error for who writes to it."""

    def print(self, *objects: Any, **options: Any) -> None:
        with suppress(OSError):
            super().print(*objects, **options)

    def on_broken_pipe(self) -> None:
        self.quiet = True


class Display:
    """One line per block: live bars on a terminal, now and then a plain line elsewhere."""

    def __init__(
        self,
        console: Console,
        levels: Levels | None,
        blocks: tuple[int, ...],
        steps: range,
        *,
        is_in_step: bool = False,
    ) -> None:
        """is_in_step: all blocks take each step together, so lines show them at the same step."""
        self._console, self._max_steps = console, steps.stop
        self._start = steps.start, time.monotonic()
        self._blocks = {b: self._new_block() for b in blocks}
        self._levels, self._is_in_step = levels, is_in_step
        self._shown = steps.start, -math.inf
        """Last step and time of lines, where all blocks are shown at one step."""
        self._lines: dict[int, dict[int, str]] = {}
        """Step -> block -> its line, of the steps since."""
        self.live: Any = None
        self._shown_at = -math.inf
        self._is_terminal = console.is_terminal and not console.is_dumb_terminal

    def update(self, step: int, scalars: Scalars) -> None:
        now = time.monotonic()
        for tag, value in scalars.items():
            if match := re.fullmatch(r"(.+)/block(\d+)", tag):
                number = int(match[2])
                if number not in self._blocks:
                    self._blocks[number] = self._new_block()
                block = self._blocks[number]
                block.step, block.values[match[1]] = step, value
                if (steps := step - block.since[0]) > 0:
                    s_per_step = (now - block.since[1]) / steps
                    block.eta = clock_text(s_per_step * max(self._max_steps - step, 0))
                if block.since == self._start:
                    block.since = step, now
        if not self._is_terminal:
            self._show_lines(now)
        elif now - self._shown_at >= LIVE_INTERVAL_S:
            self._shown_at = now
            with suppress(OSError):
                self._show_bars()

    def _new_block(self) -> _Block:
        return _Block(self._start[0], self._start, shown_step=self._start[0])

    def stop(self) -> None:
        if self.live is not None:
            with suppress(OSError):
                self._show_bars()
                self.live.stop()
            self.live = None
            log.share_terminal(None)

    def _show_lines(self, now: float) -> None:
        """Shows a line of each block that has news and was last shown some time ago.

        Blocks that take each step together have lines of one step, which all have recorded.
        """
        if self._is_in_step:
            for number, block in self._blocks.items():
                self._lines.setdefault(block.step, {})[number] = self._line(number)
            whole = [step for step, lines in self._lines.items() if len(lines) == len(self._blocks)]
            step = max(whole, default=-1)
            if self._is_due(step, now, *self._shown):
                self._shown = step, now
                for _, line in sorted(self._lines[step].items()):
                    print_line(self._console, line)
            self._lines = {s: lines for s, lines in self._lines.items() if s > step}
            return
        for number, block in sorted(self._blocks.items()):
            if self._is_due(block.step, now, block.shown_step, block.shown_at):
                block.shown_step, block.shown_at = block.step, now
                print_line(self._console, self._line(number))

    def _line(self, number: int) -> str:
        block = self._blocks[number]
        texts = " | ".join(filter(None, [*block.losses(), block.speed(), f"ETA {block.eta}"]))
        return f"[b{number} step {block.step}/{self._max_steps}] {texts}"

    def _is_due(self, step: int, now: float, shown_step: int, shown_at: float) -> bool:
        is_last = step >= self._max_steps
        return step > shown_step and (is_last or now - shown_at >= PLAIN_INTERVAL_S)

    def _show_bars(self) -> None:
        if self.live is None:
            from rich.live import Live

            # No refresh thread: data loaders fork this process, and a held lock would stay held.
            self.live = Live(console=self._console, auto_refresh=False)
            self.live.start()
            if sys.stderr.isatty():
                log.share_terminal(lambda line: print_line(self._console, line, style="yellow"))
        columns = fitting(self._columns(), self._console.width, gap=2)
        table = Table.grid(padding=(0, 2), expand=True)
        for column in columns:
            is_bar = column.min_width > 0
            table.add_column(no_wrap=True, justify=column.justify, ratio=1 if is_bar else None)
        for row in zip(*(column.cells for column in columns), strict=True):
            table.add_row(*row)
        self.live.update(table, refresh=True)

    def _columns(self) -> list[Column]:
        numbers = sorted(self._blocks)
        blocks = [self._blocks[number] for number in numbers]
        losses = [block.losses() for block in blocks]
        bars = [ProgressBar(self._max_steps, block.step) for block in blocks]
        columns = [
            Column("", [f"block {number}" for number in numbers], 8, justify="left"),
            Column("", [self._range(number) for number in numbers], 4, justify="left"),
            Column("", bars, 3, min_width=10),
            Column("", [f"{block.step}/{self._max_steps}" for block in blocks], 10),
            Column("", [" ".join(texts[:1]) for texts in losses], 9, justify="left"),
            Column("", [" ".join(texts[1:]) for texts in losses], 1, justify="left"),
            Column("", [block.speed() for block in blocks], 2),
            Column("", [f"ETA {block.eta}" for block in blocks], 7, justify="left"),
        ]
        return [column for column in columns if column.width > 0]

    def _range(self, number: int) -> str:
        levels = self._levels
        if levels is None or number >= levels.num_blocks:
            return ""
        return f"{levels.name} {range_text(levels.ranges[number])}"


def print_line(console: Console, text: str, style: str | None = None) -> None:
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def range_text(levels: tuple[float, float] | None) -> str:
    return "-" if levels is None else f"{levels[0]:.3g} .. {levels[1]:.3g}"


def clock_text(seconds: float | int) -> str:
    """31.4 -> "0:31"; 3723 -> "1:02:03"."""
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
