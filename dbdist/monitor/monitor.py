"""What a run shows and writes: progress on the console, metrics.jsonl and TensorBoard.

Takes records (rank, step, scalars) that the trainer has gathered on rank 0; does not communicate.
Tags look like train/loss/block0, perf/sync_wait_ms/rank0, val/accuracy. `display` draws the
progress, `record_files` writes the files.
"""

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dbdist.checkpoint.manifest import complete_folders
from dbdist.monitor.display import Display, SteadyConsole, clock_text, print_line, range_text
from dbdist.monitor.histogram import SigmaHistogram
from dbdist.monitor.ownership import Ownership, human_bytes
from dbdist.monitor.record_files import Board, Json, MetricsFile, Scalars, blocks_name, metrics_file
from dbdist.processes.gaussian import NoiseSchedule

_TITLE: Any = {"title_justify": "left", "title_style": "bold"}


class Monitor(AbstractContextManager["Monitor"]):
    """Rank 0's console and files of one run; `with Monitor(...)` closes them."""

    def __init__(
        self,
        run_dir: Path,
        schedule: NoiseSchedule | None,
        num_blocks: int,
        reporters: set[int],
        start_step: int,
        max_steps: int,
        console: Console | None = None,
        blocks: tuple[int, ...] | None = None,
    ) -> None:
        """reporters: the ranks that record. start_step: steps done before; later metrics go.
        blocks: those that this run trains by themselves, with files of their own; None: all."""
        self._run_dir, self._schedule, self._start_step = run_dir, schedule, start_step
        self._console = console or SteadyConsole(width=None if sys.stdout.isatty() else 120)
        shown = tuple(range(num_blocks)) if blocks is None else blocks
        self._display = Display(self._console, schedule, shown, range(start_step, max_steps))
        run_dir.mkdir(parents=True, exist_ok=True)
        board = "tensorboard" if blocks is None else f"tensorboard/{blocks_name(blocks)}"
        self._files = metrics_file(blocks), board
        self._metrics = MetricsFile(run_dir / self._files[0], start_step)
        self._tensorboard = Board(run_dir / board, start_step)
        self._has_warned = False
        self._last_step_of_rank = dict.fromkeys(reporters, start_step - 1)
        self._pending: dict[int, dict[str, float | int]] = {}

    def ownership(self, rows: list[Ownership]) -> None:
        """Print who owns what; draw how the blocks share the noise levels."""
        table = Table(title="Who owns what (*: owner of the shared modules)", **_TITLE)
        for header in "rank block replica layers sigma parameters shared optimizer device".split():
            table.add_column(header, justify="right", overflow="fold")
        for row in sorted(rows, key=lambda row: row.rank):
            block = (row.block, "-" if row.block == "-" else str(row.replica))
            shared = f"{row.shared_parameters:,} " + ("*" if row.owns_shared else " ")
            counts = f"{row.parameters:,}", shared, human_bytes(row.optimizer_bytes)
            table.add_row(
                str(row.rank), *block, row.layers, range_text(row.sigma), *counts, row.device
            )
        self._console.print(table, highlight=False)
        if self._schedule is not None:
            from dbdist.monitor.figures import partition_figure, pixels

            image = pixels(partition_figure(self._schedule))
            self._draw("noise/partition", image, self._start_step)

    def record(self, rank: int, step: int, scalars: Scalars, histogram: Json | None = None) -> None:
        """Take what `rank` measured at `step`; a rank never goes back. A step is written once all
        reporters have come as far; what they add later amends its line. histogram: to_dict()'s."""
        last = self._last_step_of_rank[rank]
        assert step >= last, f"rank {rank} recorded step {step} after step {last}"
        self._last_step_of_rank[rank] = step
        self._pending.setdefault(step, {}).update(scalars)
        self._write_through(min(self._last_step_of_rank.values()))
        self._display.update(step, scalars)
        if "val/accuracy" in scalars:
            self.message(f"[step {step}] val/accuracy {scalars['val/accuracy']:.4f}")
        if histogram is not None:
            from dbdist.monitor.figures import histogram_figure, pixels

            image = pixels(histogram_figure(SigmaHistogram.from_dict(histogram)))
            tag = f"noise/sigma_cross_entropy/block{histogram['block']}"
            self._draw(tag, image, step)

    def has_recorded(self, step: int) -> bool:
        """Whether all reporters have come as far; then what they recorded is in the files."""
        if min(self._last_step_of_rank.values()) < step:
            return False
        with self._surviving("tensorboard"):
            self._tensorboard.writer.flush()
        return True

    def message(self, text: str) -> None:
        print_line(self._console, text)

    def warn(self, text: str) -> None:
        """A line on stderr; through the live display where that shares stderr's terminal."""
        is_shared = self._display.live is not None and sys.stderr.isatty()
        console = self._console if is_shared else SteadyConsole(stderr=True)
        print_line(console, f"warning: {text}", style="yellow")

    def summary(
        self,
        accuracy: float | None,
        accuracy_after_block: list[float],
        elapsed_s: float,
        peak_mb: dict[int, float],
    ) -> None:
        """Print how the run ended and where its files are. Ends the live display."""
        after = (f"{block}: {value:.4f}" for block, value in enumerate(accuracy_after_block))
        rows = {
            "accuracy": "-" if accuracy is None else f"{accuracy:.4f}",
            "accuracy after block": "  ".join(after) or "-",
        }
        complete = complete_folders(self._run_dir / "checkpoints")
        newest = [f"checkpoints/{path.name}" for path in complete[-1:]]
        self._end(rows, elapsed_s, peak_mb, [*newest, "evaluation.json"])

    def summary_of_blocks(
        self,
        step_of_block: list[int | None],
        complete_step: int | None,
        elapsed_s: float,
        peak_mb: dict[int, float],
    ) -> None:
        """As `summary`, of a run that trained some blocks: the newest step of each block, and what
        to type once the model is complete."""
        rows = {
            f"block {block}": "not trained" if step is None else f"step {step}"
            for block, step in enumerate(step_of_block)
        }
        rows["all blocks"] = "no common step" if complete_step is None else f"step {complete_step}"
        self._end(rows, elapsed_s, peak_mb, [])
        if complete_step is not None:
            self.message(f"to evaluate step {complete_step}, which all blocks have:")
            self.message(f"  dbdist evaluate --run_dir {self._run_dir}")

    def _end(
        self,
        rows: dict[str, str],
        elapsed_s: float,
        peak_mb: dict[int, float],
        files: list[str],
    ) -> None:
        self._display.stop()
        table = Table(title="Summary", show_header=False, **_TITLE)
        peaks = (f"{rank}: {human_bytes(mb * 2**20)}" for rank, mb in sorted(peak_mb.items()))
        for name, text in rows.items():
            table.add_row(name, text)
        table.add_row("time", clock_text(elapsed_s))
        table.add_row("peak memory of rank", "  ".join(peaks) or "-")
        self._console.print(table, highlight=False)
        for name in ("", *self._files, *files):
            if (path := self._run_dir / name).exists():
                self.message(f"  {path}")

    def close(self) -> None:
        """Write what is pending, complete or not (a rank may have died), and close the files."""
        self._write_through(max(self._pending, default=0))
        self._display.stop()
        with self._surviving("tensorboard"):
            self._tensorboard.close()
        with self._surviving(self._files[0]):
            self._metrics.close()

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _write_through(self, last_step: int) -> None:
        for step in sorted(step for step in self._pending if step <= last_step):
            scalars = self._pending.pop(step)
            with self._surviving(self._files[0]):
                self._metrics.write(step, scalars)
            with self._surviving("tensorboard"):
                for tag, value in scalars.items():
                    self._tensorboard.writer.add_scalar(tag, value, step)

    def _draw(self, tag: str, image: Any, step: int) -> None:
        with self._surviving("tensorboard"):
            self._tensorboard.writer.add_image(tag, image, step)

    @contextmanager
    def _surviving(self, name: str) -> Iterator[None]:
        """A full disk costs records, not the run; the first loss is told."""
        try:
            yield
        except OSError as error:
            if name == "tensorboard":
                self._tensorboard.drop()
            if not self._has_warned:
                self._has_warned = True
                self.warn(
                    f"{self._run_dir / name} cannot be written ({error.strerror or error}); "
                    "training goes on"
                )
