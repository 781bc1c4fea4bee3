"""How far each block is, on the console: live bars on a terminal, now and then a line elsewhere."""

import math
import re
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress_bar import ProgressBar
from rich.table import Table

from dbdist.monitor.record_files import Scalars
from dbdist.processes.gaussian import NoiseSchedule

PLAIN_INTERVAL_S = 2.0
"""A block's lines are at least this far apart where there is no terminal."""
LIVE_INTERVAL_S = 0.1
_FORMS = {
    "train/loss": "loss {:.4f}",
    "train/cross_entropy": "cross-entropy {:.4f}",
    "perf/samples_per_s": "{:.0f} samples/s",
}


@dataclass
class _Block:
    """Where one block stands and when that was last shown."""

    step: int
    since: tuple[int, float]  # speed counts from this step and time: the first record's, once known
    values: dict[str, float | int] = field(default_factory=dict)  # latest by tag, less /block{b}
    eta: str = "-"
    shown_step: int = -1
    shown_at: float = -math.inf

    def texts(self) -> list[str]:
        """Loss, cross-entropy, speed and time left; an empty text for what is not known."""
        known = [f.format(self.values[t]) if t in self.values else "" for t, f in _FORMS.items()]
        return [*known, f"ETA {self.eta}"]


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
        schedule: NoiseSchedule | None,
        blocks: tuple[int, ...],
        steps: range,
    ) -> None:
        self._console, self._max_steps = console, steps.stop
        self._start = steps.start, time.monotonic()
        self._blocks = {b: _Block(steps.start, self._start) for b in blocks}
        self._sigma = {b: schedule.block_range(b) for b in blocks} if schedule else {}
        self.live: Any = None
        self._shown_at = -math.inf
        self._is_terminal = console.is_terminal and not console.is_dumb_terminal

    def update(self, step: int, scalars: Scalars) -> None:
        now = time.monotonic()
        for tag, value in scalars.items():
            if match := re.fullmatch(r"(.+)/block(\d+)", tag):
                block = self._blocks.setdefault(int(match[2]), _Block(step, self._start))
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

    def stop(self) -> None:
        if self.live is not None:
            with suppress(OSError):
                self._show_bars()
                self.live.stop()
            self.live = None

    def _show_lines(self, now: float) -> None:
        for number, block in sorted(self._blocks.items()):
            is_due = now - block.shown_at >= PLAIN_INTERVAL_S or block.step >= self._max_steps
            if block.values and block.step > block.shown_step and is_due:
                block.shown_step, block.shown_at = block.step, now
                texts = " | ".join(filter(None, block.texts()))
                print_line(
                    self._console, f"[b{number} step {block.step}/{self._max_steps}] {texts}"
                )

    def _show_bars(self) -> None:
        if self.live is None:
            from rich.live import Live

            # No refresh thread: data loaders fork this process, and a held lock would stay held.
            self.live = Live(console=self._console, auto_refresh=False)
            self.live.start()
        table = Table.grid(padding=(0, 2), expand=True)
        for column in range(7):
            table.add_column(no_wrap=True, ratio=1 if column == 2 else None)
        for number, block in sorted(self._blocks.items()):
            sigma, bar = (
                range_text(self._sigma.get(number)),
                ProgressBar(self._max_steps, block.step),
            )
            loss, _, speed, eta = block.texts()
            steps = f"{block.step}/{self._max_steps}"
            table.add_row(f"block {number}", f"sigma {sigma}", bar, steps, loss, speed, eta)
        self.live.update(table, refresh=True)


def print_line(console: Console, text: str, style: str | None = None) -> None:
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def range_text(sigma: tuple[float, float] | None) -> str:
    return "-" if sigma is None else f"{sigma[0]:.3g} .. {sigma[1]:.3g}"


def clock_text(seconds: float | int) -> str:
    """31.4 -> "0:31"; 3723 -> "1:02:03"."""
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
