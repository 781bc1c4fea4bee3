"""What a run shows and writes: progress on the console, metrics.jsonl and TensorBoard.

Takes records (rank, step, scalars) that the trainer has gathered on rank 0; does not communicate.
metrics.jsonl holds each step once, ascending, also after a resume; TensorBoard the same scalars.
Tags look like train/loss/block0, perf/sync_wait_ms/rank0, val/accuracy.
"""

import json
import math
import os
import re
import resource
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress_bar import ProgressBar
from rich.table import Table

from dbdist.checkpoint import complete_folders
from dbdist.histogram import SigmaHistogram
from dbdist.noise import NoiseSchedule

Scalars = Mapping[str, float | int]
Json = dict[str, Any]

PLAIN_INTERVAL_S = 2.0  # a block's lines are at least this far apart where there is no terminal
LIVE_INTERVAL_S = 0.1
RETRY_S = 60.0  # how long TensorBoard is left alone after its files could not be written
_TITLE: Any = {"title_justify": "left", "title_style": "bold"}
_FORMS = {
    "train/loss": "loss {:.4f}",
    "train/cross_entropy": "cross-entropy {:.4f}",
    "perf/samples_per_s": "{:.0f} samples/s",
}


@dataclass(frozen=True, kw_only=True)
class Ownership:
    """What one rank holds and trains."""

    rank: int
    block: str  # None: a coordinator, which has the shared modules and no block
    replica: int
    layers: str  # "0-1", "all" or "-"
    sigma: tuple[float, float] | None
    parameters: int  # without the shared ones
    shared_parameters: int
    optimizer_bytes: int
    device: str
    owns_shared: bool


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
        self._console = console or Console(width=None if sys.stdout.isatty() else 120)
        shown = tuple(range(num_blocks)) if blocks is None else blocks
        self._display = _Display(self._console, schedule, shown, range(start_step, max_steps))
        run_dir.mkdir(parents=True, exist_ok=True)
        board = "tensorboard" if blocks is None else f"tensorboard/{blocks_name(blocks)}"
        self._files = metrics_file(blocks), board
        self._metrics = _MetricsFile(run_dir / self._files[0], start_step)
        self._tensorboard = _Board(run_dir / board, start_step)
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
            table.add_row(str(row.rank), *block, row.layers, _range(row.sigma), *counts, row.device)
        self._console.print(table, highlight=False)
        if self._schedule is not None:
            from dbdist.figures import partition_figure, pixels

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
            from dbdist.figures import histogram_figure, pixels

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
        _print(self._console, text)

    def warn(self, text: str) -> None:
        """A line on stderr; through the live display where that shares stderr's terminal."""
        is_shared = self._display.live is not None and sys.stderr.isatty()
        console = self._console if is_shared else Console(stderr=True)
        _print(console, f"warning: {text}", style="yellow")

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
        table.add_row("time", _clock(elapsed_s))
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


class _Board:
    """TensorBoard's writer, made anew some time after a failure, which ends its thread."""

    def __init__(self, folder: Path, start_step: int) -> None:
        self._folder = folder
        self._purge_step: int | None = start_step + 1
        self._writer: Any = None
        self._next_try_at = -math.inf

    @property
    def writer(self) -> Any:
        """Raises OSError where none can be made."""
        if self._writer is None:
            if time.monotonic() < self._next_try_at:
                raise OSError("it could not be written a moment ago")
            self._next_try_at = time.monotonic() + RETRY_S
            from torch.utils.tensorboard import SummaryWriter

            _quieten_writers()
            folder = str(self._folder)
            self._writer = SummaryWriter(folder, purge_step=self._purge_step, flush_secs=10)
            self._purge_step = None
        return self._writer

    def drop(self) -> None:
        """Forgets a writer that has failed; what it still held is lost."""
        self._writer = None

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _quieten_writers() -> None:
    """Keeps TensorBoard's threads from printing the OSError that ends them: the next call of their
    writer raises it, and `Monitor` tells it. Other threads' errors are printed as before."""
    from tensorboard.summary.writer import event_file_writer

    kind, before = getattr(event_file_writer, "_AsyncWriterThread", ()), threading.excepthook
    if getattr(before, "is_quiet", False):
        return

    def quiet(args: threading.ExceptHookArgs) -> None:
        if not (isinstance(args.thread, kind) and issubclass(args.exc_type, OSError)):
            before(args)

    setattr(quiet, "is_quiet", True)  # noqa: B010
    threading.excepthook = quiet


class _MetricsFile:
    """metrics.jsonl, cut after `start_step`: steps ascend, and the last line may be amended."""

    def __init__(self, path: Path, start_step: int) -> None:
        last_line, self._last = b"", {"step": -1, "time_s": 0.0}
        temporary = path.with_suffix(".jsonl.tmp")
        num_dropped = 0
        if path.exists():
            # A line at a time: the file of a long run is long.
            with path.open("rb") as found, temporary.open("wb") as kept:
                for line in found:
                    if (values := _values_until(start_step, line)) is None:
                        num_dropped += 1
                    else:
                        kept.write(line)
                        last_line, self._last = line, values
            if num_dropped:
                os.replace(temporary, path)
            else:
                temporary.unlink()
        self._file = path.open("ab", buffering=0)
        self._offset = self._file.tell() - len(last_line)  # where the last line starts
        self._is_written = True
        self._origin_s = time.monotonic() - self._last["time_s"]

    def write(self, step: int, scalars: Scalars) -> None:
        """Raises OSError, and then keeps the line for the next time."""
        if step != self._last["step"]:
            if not self._is_written:
                self._write_last()
            self._offset = self._file.seek(0, os.SEEK_END)
            self._last = {"step": step, "time_s": round(time.monotonic() - self._origin_s, 3)}
        # JSON has no nan and no inf: they become strings.
        self._last |= {k: v if math.isfinite(v) else str(float(v)) for k, v in scalars.items()}
        self._write_last()

    def close(self) -> None:
        if not self._is_written:
            self._write_last()
        self._file.close()

    def _write_last(self) -> None:
        in_order = dict.fromkeys(("step", "time_s")) | dict(sorted(self._last.items()))
        line = memoryview(json.dumps(in_order, allow_nan=False).encode() + b"\n")
        self._is_written = False
        self._file.truncate(self._offset)
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError:
            self._file.truncate(self._offset)  # no half line stays
            raise
        self._is_written = True


def _values_until(step: int, line: bytes) -> Json | None:
    """The values of a line of metrics.jsonl; None if it is torn or of a later step."""
    with suppress(ValueError):  # not JSON
        if (values := json.loads(line))["step"] <= step and line.endswith(b"\n"):
            return values
    return None


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


class _Display:
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
                    block.eta = _clock(s_per_step * max(self._max_steps - step, 0))
                if block.since == self._start:
                    block.since = step, now
        if not self._is_terminal:
            self._show_lines(now)
        elif now - self._shown_at >= LIVE_INTERVAL_S:
            self._shown_at = now
            self._show_bars()

    def stop(self) -> None:
        if self.live is not None:
            self._show_bars()
            self.live.stop()
            self.live = None

    def _show_lines(self, now: float) -> None:
        for number, block in sorted(self._blocks.items()):
            is_due = now - block.shown_at >= PLAIN_INTERVAL_S or block.step >= self._max_steps
            if block.values and block.step > block.shown_step and is_due:
                block.shown_step, block.shown_at = block.step, now
                texts = " | ".join(filter(None, block.texts()))
                _print(self._console, f"[b{number} step {block.step}/{self._max_steps}] {texts}")

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
            sigma, bar = _range(self._sigma.get(number)), ProgressBar(self._max_steps, block.step)
            loss, _, speed, eta = block.texts()
            steps = f"{block.step}/{self._max_steps}"
            table.add_row(f"block {number}", f"sigma {sigma}", bar, steps, loss, speed, eta)
        self.live.update(table, refresh=True)


def blocks_name(blocks: tuple[int, ...]) -> str:
    """In the names of a run's files: `blocks-0-2`."""
    return "-".join(("blocks", *map(str, blocks)))


def metrics_file(blocks: tuple[int, ...] | None) -> str:
    """Of RUN; a run that trains some blocks has one of its own."""
    return "metrics.jsonl" if blocks is None else f"metrics.{blocks_name(blocks)}.jsonl"


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


def _print(console: Console, text: str, style: str | None = None) -> None:
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def _range(sigma: tuple[float, float] | None) -> str:
    return "-" if sigma is None else f"{sigma[0]:.3g} .. {sigma[1]:.3g}"


def _clock(seconds: float | int) -> str:
    """31.4 -> "0:31"; 3723 -> "1:02:03"."""
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
