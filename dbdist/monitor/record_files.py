"""The files that a run's records go to: metrics.jsonl, and TensorBoard's with the same scalars.

Each step is there once, ascending, also after a resume.
"""

import json
import math
import os
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

Scalars = Mapping[str, float | int]
Json = dict[str, Any]
RETRY_S = 60.0
"""How long TensorBoard is left alone after its files could not be written."""


def blocks_name(blocks: tuple[int, ...]) -> str:
    """In the names of a run's files: `blocks-0-2`."""
    return "-".join(("blocks", *map(str, blocks)))


def metrics_file(blocks: tuple[int, ...] | None) -> str:
    """Of RUN; a run that trains some blocks has one of its own."""
    return "metrics.jsonl" if blocks is None else f"metrics.{blocks_name(blocks)}.jsonl"


class MetricsFile:
    """metrics.jsonl, cut after `start_step`: steps ascend, and the last line may be amended. While
    a disk is full the lines after the first are lost."""

    def __init__(self, path: Path, start_step: int) -> None:
        """Raises OSError."""
        last_line, self._last = b"", {"step": -1, "time_s": 0.0}
        size, kept, has_gap = 0, 0, False
        if path.exists():
            with path.open("rb") as found:
                for line in found:  # one at a time: the file of a long run is long
                    if (values := _values_until(start_step, line)) is not None:
                        has_gap = has_gap or kept < size
                        kept = size + len(line)
                        last_line, self._last = line, values
                    size += len(line)
            if has_gap:
                _keep_lines(path, start_step)
            elif kept < size:
                os.truncate(path, kept)
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


def _keep_lines(path: Path, step: int) -> None:
    """Leaves out what is torn or of later steps, wherever it stands."""
    temporary = path.with_suffix(".jsonl.tmp")
    with path.open("rb") as found, temporary.open("wb") as kept:
        kept.writelines(line for line in found if _values_until(step, line) is not None)
    os.replace(temporary, path)


def _values_until(step: int, line: bytes) -> Json | None:
    """The values of a line of metrics.jsonl; None if it is torn or of a later step."""
    with suppress(ValueError, KeyError, TypeError, RecursionError):  # none of ours
        values = json.loads(line)
        is_ours = values["step"] <= step and values["time_s"] >= 0
        if is_ours and line.endswith(b"\n"):
            return values
    return None


class Board:
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
