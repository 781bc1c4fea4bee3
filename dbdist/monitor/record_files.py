"""metrics.jsonl, the truth about a run: each step once, ascending, also after a resume."""

import json
import math
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

Scalars = Mapping[str, float | int]
Json = dict[str, Any]


def blocks_name(blocks: tuple[int, ...]) -> str:
    """How files of a run of some blocks are called: `blocks-0-2`."""
    return "-".join(("blocks", *map(str, blocks)))


def metrics_file(blocks: tuple[int, ...] | None) -> str:
    """Of RUN; a run that trains some blocks has one of its own."""
    return "metrics.jsonl" if blocks is None else f"metrics.{blocks_name(blocks)}.jsonl"


class MetricsFile:
    """metrics.jsonl, cut after `start_step`: steps ascend, and the last line may be amended.

    While a disk is full, the lines after the first are lost.
    """

    def __init__(self, path: Path, start_step: int) -> None:
        """Raises OSError."""
        last_line, self._last = b"", {"step": -1, "time_s": 0.0}
        self.num_unreadable = 0
        """Lines that were torn or not ours, and are left out."""
        size, kept, has_gap = 0, 0, False
        if path.exists():
            with path.open("rb") as found:
                for line in found:  # one at a time: the file of a long run is long
                    values = _values_of(line)
                    self.num_unreadable += values is None
                    if values is not None and values["step"] <= start_step:
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
    """Leaves out what is unreadable or of later steps, wherever it stands."""
    temporary = path.with_suffix(".jsonl.tmp")
    with path.open("rb") as found, temporary.open("wb") as kept:
        kept.writelines(
            line for line in found if (v := _values_of(line)) is not None and v["step"] <= step
        )
    os.replace(temporary, path)


def _values_of(line: bytes) -> Json | None:
    """The values of a line of metrics.jsonl; None if it is torn or not ours."""
    with suppress(ValueError, KeyError, TypeError, RecursionError):
        values = json.loads(line)
        is_ours = math.isfinite(values["step"]) and values["time_s"] >= 0
        if is_ours and line.endswith(b"\n"):
            return values
    return None
