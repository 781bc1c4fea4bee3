"""What a run shows and writes: progress on the console, metrics.jsonl, TensorBoard, and meters of memory and noise.

Takes records (rank, step, scalars) that the trainer has gathered on rank 0; does not communicate. Invariants:
metrics.jsonl holds each step once, ascending, also after a resume; TensorBoard holds the same scalars.
A record's tags look like train/loss/block0, perf/sync_wait_ms/rank0, val/accuracy.
"""

import json
import math
import os
import re
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Float
from rich.console import Console
from rich.progress_bar import ProgressBar
from rich.table import Table
from torch import Tensor

from dbdist.noise import NoiseSchedule

Scalars = Mapping[str, float | int]

PLAIN_INTERVAL_S = 2.0  # a block's lines are at least this far apart where there is no terminal
LIVE_INTERVAL_S = 0.1


@dataclass(frozen=True, kw_only=True)
class Ownership:
    """What one rank holds and trains."""

    rank: int
    block: int | None
    """None: a coordinator that owns the shared modules and no block."""
    replica: int
    layers: str
    """"0-1", "all" or "-"."""
    sigma: tuple[float, float] | None
    parameters: int
    """Of its block, without the shared ones."""
    shared_parameters: int
    optimizer_bytes: int
    device: str
    owns_shared: bool


@dataclass(eq=False)
class SigmaHistogram:
    """How often a block trained each sigma, and the cross-entropy there: bins evenly spaced in ln sigma.

    A bin holds its lower edge; what lies outside [low, high] counts in the outermost bins.
    """

    block: int
    low: float
    high: float
    num_bins: int = 32
    edges: Tensor = field(init=False, repr=False)
    counts: Tensor = field(init=False, repr=False)
    cross_entropy_sums: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        assert 0 < self.low < self.high, (self.low, self.high)
        log_low, log_high = math.log(self.low), math.log(self.high)
        self.edges = torch.linspace(log_low, log_high, self.num_bins + 1, dtype=torch.float64).exp()
        self.counts = torch.zeros(self.num_bins, dtype=torch.float64)
        self.cross_entropy_sums = torch.zeros(self.num_bins, dtype=torch.float64)

    def add(self, sigma_N: Float[Tensor, " n"], cross_entropy_N: Float[Tensor, " n"]) -> None:
        """Count a batch. From an accelerator this is one small copy, which waits for the batch's forward."""
        sigma_N, cross_entropy_N = (
            torch.stack([sigma_N.detach().double(), cross_entropy_N.detach().double()])
            .cpu()
            .unbind()
        )
        bin_N = torch.bucketize(sigma_N, self.edges[1:-1], right=True)
        self.counts += torch.bincount(bin_N, minlength=self.num_bins)
        self.cross_entropy_sums += torch.bincount(bin_N, cross_entropy_N, self.num_bins)

    def reset(self) -> None:
        self.counts.zero_()
        self.cross_entropy_sums.zero_()

    @property
    def means(self) -> Tensor:
        """Mean cross-entropy of each bin; nan where nothing was trained."""
        return self.cross_entropy_sums / self.counts

    def to_dict(self) -> dict[str, Any]:
        bins = {
            "counts": self.counts.tolist(),
            "cross_entropy_sums": self.cross_entropy_sums.tolist(),
        }
        return {"block": self.block, "low": self.low, "high": self.high, **bins}

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> Self:
        histogram = cls(state["block"], state["low"], state["high"], len(state["counts"]))
        histogram.counts += torch.tensor(state["counts"], dtype=torch.float64)
        histogram.cross_entropy_sums += torch.tensor(
            state["cross_entropy_sums"], dtype=torch.float64
        )
        return histogram


class Monitor:
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
    ) -> None:
        """reporters: the ranks that record. start_step: steps done before, whose metrics are kept."""
        from torch.utils.tensorboard import SummaryWriter

        assert reporters, "no rank reports"
        self._run_dir, self._schedule, self._start_step = run_dir, schedule, start_step
        width = None if sys.stdout.isatty() else 120
        self._console = console or Console(width=width)
        self._display = _Display(self._console, schedule, num_blocks, start_step, max_steps)
        run_dir.mkdir(parents=True, exist_ok=True)
        self._metrics = _MetricsFile(run_dir / "metrics.jsonl", start_step)
        if self._metrics.num_damaged:
            self.warn(
                f"{run_dir / 'metrics.jsonl'}: left out {self._metrics.num_damaged} damaged lines"
            )
        self._tensorboard = SummaryWriter(
            str(run_dir / "tensorboard"), purge_step=start_step + 1, flush_secs=10
        )
        self._last_step_of_rank = dict.fromkeys(reporters, start_step - 1)
        self._pending: dict[int, dict[str, float | int]] = {}
        self._pending_histograms: dict[int, list[dict[str, Any]]] = {}
        self._is_closed = False

    def ownership(self, rows: list[Ownership]) -> None:
        """Print who owns what; draw how the blocks share the noise levels."""
        has_replicas = any(row.replica for row in rows)
        table = Table(title="Who owns what", title_justify="left", title_style="bold")
        for header in ("rank", "block", *(["replica"] if has_replicas else []), "layers", "sigma"):
            table.add_column(header, justify="right", no_wrap=True)
        for header in ("parameters", "+ shared", "optimizer"):
            table.add_column(header, justify="right", no_wrap=True)
        table.add_column("device", no_wrap=True)
        for row in sorted(rows, key=lambda row: row.rank):
            table.add_row(
                str(row.rank),
                "coordinator" if row.block is None else str(row.block),
                *([str(row.replica)] if has_replicas else []),
                row.layers,
                _range(row.sigma),
                f"{row.parameters:,}",
                f"{row.shared_parameters:,}" + (" *" if row.owns_shared else "  "),
                human_bytes(row.optimizer_bytes),
                row.device,
                style="bold" if row.owns_shared else None,
            )
        self._console.print(table)
        if any(row.owns_shared for row in rows):
            self.message("* owner of the shared modules")
        if self._schedule is not None:
            from dbdist.figures import partition_figure, pixels

            image = pixels(partition_figure(self._schedule))
            self._tensorboard.add_image(
                "noise/partition", image, self._start_step, dataformats="HWC"
            )

    def record(
        self, rank: int, step: int, scalars: Scalars, histogram: dict[str, Any] | None = None
    ) -> None:
        """Take what `rank` measured at `step`; a rank's steps never go back, but one may come in parts.

        A step is written once every reporter has come as far; parts that follow amend its line.
        histogram: SigmaHistogram.to_dict(), drawn under noise/sigma_cross_entropy/block{b}.
        """
        last = self._last_step_of_rank.get(rank)
        assert last is not None, (
            f"rank {rank} is none of the reporters {list(self._last_step_of_rank)}"
        )
        assert step >= last, f"rank {rank} recorded step {step} after step {last}"
        self._last_step_of_rank[rank] = step
        self._pending.setdefault(step, {}).update(scalars)
        if histogram is not None:
            self._pending_histograms.setdefault(step, []).append(histogram)
        self._write_through(min(self._last_step_of_rank.values()))
        self._display.update(step, scalars)

    def message(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """A line on stderr; through the live display where that shares stderr's terminal."""
        is_shared = self._display.is_live and sys.stderr.isatty()
        console = self._console if is_shared else Console(stderr=True)
        console.print(
            f"warning: {text}", style="yellow", markup=False, highlight=False, soft_wrap=True
        )

    def summary(
        self,
        accuracy: float | None,
        accuracy_after_block: list[float],
        elapsed_s: float,
        peak_mb: dict[int, float],
    ) -> None:
        """Print how the run ended and where its files are. Ends the live display."""
        self._display.stop()
        table = Table(title="Summary", title_justify="left", title_style="bold", show_header=False)
        table.add_row("accuracy", "-" if accuracy is None else f"{accuracy:.4f}")
        if accuracy_after_block:
            after = (f"{b}: {value:.4f}" for b, value in enumerate(accuracy_after_block))
            table.add_row("accuracy after block", "  ".join(after))
        table.add_row("time", _clock(elapsed_s))
        peaks = (f"{rank}: {human_bytes(mb * 2**20)}" for rank, mb in sorted(peak_mb.items()))
        table.add_row("peak memory of rank", "  ".join(peaks) or "-")
        self._console.print(table, highlight=False)
        manifests = sorted(self._run_dir.glob("checkpoints/step-*/manifest.json"))
        files = [
            self._run_dir / name for name in ("metrics.jsonl", "tensorboard", "evaluation.json")
        ]
        for path in (self._run_dir, *files, *(m.parent for m in manifests[-1:])):
            if path.exists():
                self.message(f"  {path}")

    def close(self) -> None:
        """Write what is pending, complete or not (a rank may have died), and let go of all files."""
        if self._is_closed:
            return
        self._is_closed = True
        self._display.stop()
        self._write_through(max(self._pending, default=0))
        self._tensorboard.close()
        self._metrics.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _write_through(self, last_step: int) -> None:
        for step in sorted(step for step in self._pending if step <= last_step):
            scalars = self._pending.pop(step)
            self._metrics.write(step, scalars)
            for tag, value in scalars.items():
                self._tensorboard.add_scalar(tag, value, step)
            for state in self._pending_histograms.pop(step, []):
                from dbdist.figures import histogram_figure, pixels

                image = pixels(histogram_figure(SigmaHistogram.from_dict(state)))
                tag = f"noise/sigma_cross_entropy/block{state['block']}"
                self._tensorboard.add_image(tag, image, step, dataformats="HWC")


class _MetricsFile:
    """metrics.jsonl from `start_step` on: steps ascend, and the last one's line may still be amended."""

    def __init__(self, path: Path, start_step: int) -> None:
        found = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        whole = [line for line in found if line.endswith(b"\n")]  # the last one may be torn
        parsed = [(line, _parse(line)) for line in whole]
        self.num_damaged = sum(values is None for _, values in parsed)
        kept = [
            (line, values) for line, values in parsed if values and values["step"] <= start_step
        ]
        if len(kept) < len(found):
            temporary = path.with_suffix(".jsonl.tmp")
            temporary.write_bytes(b"".join(line for line, _ in kept))
            os.replace(temporary, path)
        last_line, self._last = kept[-1] if kept else (b"", {"step": -1, "time_s": 0.0})
        self._file = path.open("ab")
        self._offset = self._file.tell() - len(last_line)  # where the last line starts
        self._origin_s = time.monotonic() - self._last["time_s"]

    def write(self, step: int, scalars: Scalars) -> None:
        if step == self._last["step"]:
            self._file.truncate(self._offset)
        else:
            self._offset = self._file.tell()
            self._last = {"step": step, "time_s": round(time.monotonic() - self._origin_s, 3)}
        # JSON has no nan and no inf: they become strings.
        self._last |= {tag: v if math.isfinite(v) else str(float(v)) for tag, v in scalars.items()}
        head = {key: self._last[key] for key in ("step", "time_s")}
        line = head | {key: self._last[key] for key in sorted(self._last) if key not in head}
        self._file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        values = json.loads(line)
    except ValueError:
        return None
    return values if isinstance(values, dict) and {"step", "time_s"} <= values.keys() else None


@dataclass
class _Progress:
    """Where one block stands."""

    step: int
    since: tuple[int, float]
    """A step and its time, from which speed is measured: the first record, as what precedes it is start-up."""
    values: dict[str, float | int] = field(default_factory=dict)
    """Latest value by tag, without /block{b}."""
    eta: str = "-"
    shown_step: int = -1
    shown_at: float = -math.inf


class _Display:
    """One line per block: a live table on a terminal, now and then a plain line elsewhere."""

    def __init__(
        self,
        console: Console,
        schedule: NoiseSchedule | None,
        num_blocks: int,
        start_step: int,
        max_steps: int,
    ) -> None:
        self._console, self._schedule = console, schedule
        self._start, self._max_steps = (start_step, time.monotonic()), max_steps
        self._blocks = {block: _Progress(start_step, self._start) for block in range(num_blocks)}
        self._validation = ""
        self._live: Any = None
        self._refreshed_at = -math.inf
        self.is_terminal = console.is_terminal and not console.is_dumb_terminal

    @property
    def is_live(self) -> bool:
        return self._live is not None

    def update(self, step: int, scalars: Scalars) -> None:
        now, changed = time.monotonic(), set[int]()
        for tag, value in scalars.items():
            if match := re.fullmatch(r"(.+)/block(\d+)", tag):
                block = int(match[2])
                self._blocks.setdefault(block, _Progress(step, self._start)).values[match[1]] = (
                    value
                )
                changed.add(block)
        for block in changed:
            progress = self._blocks[block]
            progress.step = step
            if (steps := step - progress.since[0]) > 0:
                left_s = (now - progress.since[1]) / steps * (self._max_steps - step)
                progress.eta = _clock(max(left_s, 0))
            if progress.since == self._start:
                progress.since = step, now
        if "val/accuracy" in scalars:
            self._validation = (
                f"[step {step}/{self._max_steps}] val/accuracy {scalars['val/accuracy']:.4f}"
            )
        if self.is_terminal:
            self._show_live(now)
        else:
            for block in sorted(changed):
                self._show_plain(block, self._blocks[block], now)
            if "val/accuracy" in scalars:
                self._print(self._validation)

    def stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __rich__(self) -> Table:
        table = Table.grid(padding=(0, 2), expand=True)
        for column in range(7):
            table.add_column(no_wrap=True, ratio=1 if column == 2 else None)
        for block, progress in sorted(self._blocks.items()):
            table.add_row(
                f"block {block}",
                f"sigma {_range(self._sigma(block))}",
                ProgressBar(total=self._max_steps, completed=progress.step),
                f"{progress.step}/{self._max_steps}",
                _value(progress, "loss {:.4g}", "train/loss"),
                _value(progress, "{:.0f} samples/s", "perf/samples_per_s"),
                f"ETA {progress.eta}",
            )
        outer = Table.grid(expand=True)
        outer.add_row(table)
        if self._validation:
            outer.add_row(self._validation.replace("[", r"\["))
        return outer

    def _show_live(self, now: float) -> None:
        if self._live is None:
            from rich.live import Live

            # No refresh thread: data loaders fork this process, and a lock held then stays held there.
            self._live = Live(self, console=self._console, auto_refresh=False)
            self._live.start()
        if now - self._refreshed_at >= LIVE_INTERVAL_S:
            self._live.refresh()
            self._refreshed_at = now

    def _show_plain(self, block: int, progress: _Progress, now: float) -> None:
        is_due = now - progress.shown_at >= PLAIN_INTERVAL_S or progress.step >= self._max_steps
        if not is_due or progress.step <= progress.shown_step:
            return
        progress.shown_step, progress.shown_at = progress.step, now
        parts = [
            _value(progress, "loss {:.4g}", "train/loss"),
            _value(progress, "cross-entropy {:.4g}", "train/cross_entropy"),
            _value(progress, "{:.0f} samples/s", "perf/samples_per_s"),
            f"ETA {progress.eta}",
        ]
        head = f"[b{block} step {progress.step}/{self._max_steps}] "
        self._print(head + " | ".join(part for part in parts if part))

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _sigma(self, block: int) -> tuple[float, float] | None:
        is_known = self._schedule is not None and block < self._schedule.num_blocks
        return (
            self._schedule.block_range(block) if self._schedule is not None and is_known else None
        )


def human_bytes(num_bytes: float | int) -> str:
    """1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(num_bytes) < 1024:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def peak_memory_mb(device: torch.device) -> float:
    """Most memory so far in MiB: of tensors on a CUDA device, of the whole process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def _range(sigma: tuple[float, float] | None) -> str:
    return "-" if sigma is None else f"{sigma[0]:.3g} .. {sigma[1]:.3g}"


def _value(progress: _Progress, form: str, tag: str) -> str:
    return form.format(progress.values[tag]) if tag in progress.values else ""


def _clock(seconds: float) -> str:
    """31.4 -> "0:31"; 3723 -> "1:02:03"."""
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{s:02d}" if hours else f"{minutes}:{s:02d}"
