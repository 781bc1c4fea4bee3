"""What a run shows and writes: progress on the console, metrics.jsonl and TensorBoard.

Takes records (rank, step, scalars) that the trainer has gathered on rank 0; does not communicate.
Tags look like train/loss/block0, perf/sync_wait_ms/rank0, val/accuracy; names of losses and figures
are the task's. `display` shows the progress, `record_files` and `board` write the files, `painter`
has the pictures drawn.
"""

import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor

from dbdist import log
from dbdist.checkpoint.manifest import complete_folders
from dbdist.data.pictures import png_of
from dbdist.monitor.board import Board
from dbdist.monitor.display import Display, SteadyConsole, clock_text, print_line
from dbdist.monitor.levels import Levels
from dbdist.monitor.ownership import Ownership, human_bytes, ownership_table
from dbdist.monitor.painter import Painter
from dbdist.monitor.record_files import Json, MetricsFile, Scalars, blocks_name, metrics_file

PATIENCE_S = 20.0
"""How long the end of a run waits for the last pictures; a run that is stopped waits for none."""


class Monitor(AbstractContextManager["Monitor"]):
    """Rank 0's console and files of one run; `with Monitor(...)` closes them."""

    def __init__(
        self,
        run_dir: Path,
        levels: Levels | None,
        num_blocks: int,
        reporters: set[int],
        start_step: int,
        max_steps: int,
        console: Console | None = None,
        blocks: tuple[int, ...] | None = None,
        *,
        is_in_step: bool = False,
        config: Mapping[str, Any] | None = None,
        form: str = "{:.4f}",
    ) -> None:
        """reporters: the ranks that record. start_step: steps done before; later metrics go.

        blocks: those that this run trains by themselves, with files of their own; None: all.
        is_in_step: all blocks take each step together. config: to show. form: of final figures.
        """
        self._run_dir, self._levels, self._start_step = run_dir, levels, start_step
        self._console = console or SteadyConsole(width=None if sys.stdout.isatty() else 120)
        shown = tuple(range(num_blocks)) if blocks is None else blocks
        steps = range(start_step, max_steps)
        self._display = Display(self._console, levels, shown, steps, is_in_step=is_in_step)
        self._form = form
        run_dir.mkdir(parents=True, exist_ok=True)
        self._metrics_name = metrics_file(blocks)
        self._metrics = MetricsFile(run_dir / self._metrics_name, start_step)
        self._board = Board(_board_folder(run_dir, blocks), start_step, config)
        self._painter = Painter()
        self._warned: set[str] = set()
        self._last_step_of_rank = dict.fromkeys(reporters, start_step - 1)
        self._pending: dict[int, dict[str, float | int]] = {}
        if count := self._metrics.num_unreadable:
            lines = "a line that was" if count == 1 else f"{count} lines that were"
            self.warn(f"{run_dir / self._metrics_name} had {lines} torn or not ours; left out")
        if levels is not None:
            self._painter.ask("train/levels", start_step, {"levels": asdict(levels)})

    def ownership(self, rows: list[Ownership]) -> None:
        """Prints who owns what."""
        name = self._levels.name if self._levels else ""
        self._console.print(ownership_table(rows, name, self._console.width), highlight=False)

    def record(self, rank: int, step: int, scalars: Scalars, histogram: Json | None = None) -> None:
        """Takes what `rank` measured at `step`; a rank never goes back.

        A step is written once all reporters have come as far; what they add later amends its line.
        histogram: to_dict()'s.
        """
        last = self._last_step_of_rank[rank]
        assert step >= last, f"rank {rank} recorded step {step} after step {last}"
        self._last_step_of_rank[rank] = step
        self._pending.setdefault(step, {}).update(scalars)
        self._display.update(step, scalars)
        self._write_through(min(self._last_step_of_rank.values()))
        if histogram is not None:
            for name in histogram["sums"]:
                tag = f"train/{histogram['level']}_{name}/block{histogram['block']}"
                self._painter.ask(tag, step, {"histogram": histogram, "name": name})
        self._hang_pictures()

    def preview(self, step: int, shown: Tensor | str) -> None:
        """Puts some answers of an evaluation where TensorBoard finds them: a picture or a text."""
        with self._surviving(self._board.folder):
            if isinstance(shown, str):
                self._board.text(step, "val/samples", shown)
            else:
                self._board.picture(step, "val/samples", png_of(shown))

    def has_recorded(self, step: int) -> bool:
        """Whether all reporters have come as far; then what they recorded is in the files."""
        return min(self._last_step_of_rank.values()) >= step

    def message(self, text: str) -> None:
        print_line(self._console, text)

    def warn(self, text: str) -> None:
        """A line on stderr; through the live display where that shares stderr's terminal."""
        log.warning(text)

    def summary(
        self,
        figures: Mapping[str, float | Sequence[float] | None],
        elapsed_s: float,
        peak_mb: Mapping[int, float],
    ) -> None:
        """Prints how the run ended and where its files are. Ends the live display.

        figures: the task's, by name; of a list there is one for each block.
        """
        rows: dict[str, str] = {}
        for name, value in figures.items():
            if isinstance(value, Sequence):
                of_blocks = (f"{b}: {self._form.format(v)}" for b, v in enumerate(value))
                text = "  ".join(of_blocks)
            else:
                text = "" if value is None else self._form.format(value)
            rows[name.replace("_", " ")] = text or "-"
        complete = complete_folders(self._run_dir / "checkpoints")
        newest = [f"checkpoints/{path.name}" for path in complete[-1:]]
        with self._surviving(self._board.folder):
            last = {k: v for k, v in figures.items() if isinstance(v, int | float)}
            self._board.final(max(self._last_step_of_rank.values()), last)
        self._end(rows, elapsed_s, peak_mb, [*newest, "evaluation.json"])

    def summary_of_blocks(
        self,
        step_of_block: Sequence[int | None],
        complete_step: int | None,
        elapsed_s: float,
        peak_mb: Mapping[int, float],
    ) -> None:
        """As `summary`, of a run that trained some blocks: the newest step of each block.

        Says what to type once the model is complete.
        """
        rows = {
            f"block {block}": "not trained" if step is None else f"step {step}"
            for block, step in enumerate(step_of_block)
        }
        rows["all blocks"] = "no common step" if complete_step is None else f"step {complete_step}"
        self._end(rows, elapsed_s, peak_mb, [])
        if complete_step is not None:
            self.message(f"to evaluate step {complete_step}, which all blocks have:")
            self.message(f"  dbdist evaluate {shlex.quote(str(self._run_dir))}")

    def _end(
        self,
        rows: Mapping[str, str],
        elapsed_s: float,
        peak_mb: Mapping[int, float],
        files: Sequence[str],
    ) -> None:
        self._display.stop()
        table = Table(title="Summary", show_header=False, title_justify="left", title_style="bold")
        peaks = (f"{rank}: {human_bytes(mb * 2**20)}" for rank, mb in sorted(peak_mb.items()))
        for name, text in rows.items():
            table.add_row(name, text)
        table.add_row("time", clock_text(elapsed_s))
        table.add_row("peak memory of rank", "  ".join(peaks) or "-")
        self._console.print(table, highlight=False)
        for name in ("", self._metrics_name, *files):
            if (path := self._run_dir / name).exists():
                self.message(f"  {path}")
        self._hang_pictures(PATIENCE_S)

    def close(self) -> None:
        """Writes what is pending, complete or not (a rank may have died), and closes the files."""
        self._write_through(max(self._pending, default=0))
        self._display.stop()
        self._hang_pictures()
        self._painter.close()
        with self._surviving(self._run_dir / self._metrics_name):
            self._metrics.close()

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _write_through(self, last_step: int) -> None:
        for step in sorted(step for step in self._pending if step <= last_step):
            scalars = self._pending.pop(step)
            with self._surviving(self._run_dir / self._metrics_name):
                self._metrics.write(step, scalars)
            with self._surviving(self._board.folder):
                self._board.scalars(step, scalars)
            if figures := _final_figures(scalars):
                texts = (f"val/{name} {self._form.format(v)}" for name, v in figures.items())
                self.message(f"[step {step}] {' | '.join(texts)}")

    def _hang_pictures(self, patience_s: float = 0.0) -> None:
        """Puts the pictures that are drawn where TensorBoard finds them."""
        try:
            pictures = self._painter.collect(patience_s)
        except OSError as error:
            self._warn_once("pictures", f"pictures for TensorBoard are not drawn ({error})")
            return
        with self._surviving(self._board.folder):
            for tag, step, png in pictures:
                self._board.picture(step, tag, png)

    @contextmanager
    def _surviving(self, path: Path) -> Iterator[None]:
        """A full disk costs records, not the run; the first loss is a warning."""
        try:
            yield
        except OSError as error:
            reason = error.strerror or error
            self._warn_once("files", f"{path} cannot be written ({reason}); training goes on")

    def _warn_once(self, kind: str, text: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            self.warn(text)


def _final_figures(scalars: Scalars) -> dict[str, float | int]:
    """Those of val/ that are of the whole model, by name."""
    names = {tag: tag.removeprefix("val/") for tag in scalars if tag.startswith("val/")}
    return {name: scalars[tag] for tag, name in names.items() if "/" not in name}


def _board_folder(run_dir: Path, blocks: tuple[int, ...] | None) -> Path:
    """Where TensorBoard's file goes: it names a run after the folder.

    A run that has a folder `tensorboard` from before continues there.
    """
    old = run_dir / "tensorboard"
    folder = old if old.is_dir() else run_dir
    return folder if blocks is None else folder / blocks_name(blocks)
