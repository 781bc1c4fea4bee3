"""TensorBoard's file of a run: scalars, pictures, the configuration, the final figures.

Written without TensorBoard's own thread, so a full disk is an OSError where it happens. TensorBoard
is imported with the first event, after the first step.
"""

import os
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from dbdist.monitor.record_files import Scalars

FIRST = ("train/", "val/")
"""Tags that a person looks at first; the others get a prefix that TensorBoard sorts behind them."""
OTHERS = "work/"


class Board:
    """One events file in a folder; TensorBoard names a run after the folder."""

    def __init__(self, folder: Path, start_step: int, config: Mapping[str, Any] | None) -> None:
        """start_step: TensorBoard forgets later steps of older files. config: to show as text."""
        self.folder, self._start_step, self._config = folder, start_step, config
        self._path: Path | None = None

    def scalars(self, step: int, scalars: Scalars) -> None:
        """Raises OSError, as all methods do; what was to be written is lost then."""
        proto = _messages().Summary
        values = [proto.Value(tag=_tag(tag), simple_value=v) for tag, v in scalars.items()]
        self._write(step, proto(value=values))

    def picture(self, step: int, tag: str, png: bytes) -> None:
        proto = _messages().Summary
        width, height = struct.unpack(">II", png[16:24])
        size = {"height": height, "width": width, "colorspace": 3}
        image = proto.Image(**size, encoded_image_string=png)
        self._write(step, proto(value=[proto.Value(tag=_tag(tag), image=image)]))

    def text(self, step: int, tag: str, text: str) -> None:
        from torch.utils.tensorboard.summary import text as summary_of

        indented = "\n".join(f"    {line}" for line in text.splitlines())
        self._write(step, summary_of(_tag(tag), indented))

    def final(self, step: int, figures: Scalars) -> None:
        """The configuration and the run's last figures, for the table of hyperparameters."""
        from torch.utils.tensorboard.summary import hparams

        options = dict(_flat(self._config or {}))
        for summary in hparams(options, {f"val/{name}": value for name, value in figures.items()}):
            self._write(step, summary)

    def _write(self, step: int, summary: Any) -> None:
        if self._path is None:
            self._begin()
        self._append(_messages().Event(wall_time=time.time(), step=step, summary=summary))

    def _begin(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        proto, now, step = _messages(), time.time(), self._start_step
        # TensorBoard reads files in the order of their names.
        name = f"events.out.tfevents.{now:017.6f}.{socket.gethostname()}.{os.getpid()}"
        self._path = self.folder / name
        start = proto.SessionLog(status=proto.SessionLog.START)
        events = [
            proto.Event(wall_time=now, file_version="brain.Event:2"),
            proto.Event(wall_time=now, step=step + 1, session_log=start),
        ]
        if self._config:
            from torch.utils.tensorboard.summary import text

            lines = (f"    {key}: {value}" for key, value in _flat(self._config))
            shown = text("config", "\n".join(lines))
            events.append(proto.Event(wall_time=now, step=step, summary=shown))
        try:
            for event in events:
                self._append(event)
        except OSError:
            path, self._path = self._path, None  # begun anew with the next event
            path.unlink(missing_ok=True)
            raise

    def _append(self, event: Any) -> None:
        """Adds an event, whole or not at all."""
        from tensorboard.summary.writer.record_writer import RecordWriter

        assert self._path is not None
        with self._path.open("ab", buffering=0) as file:
            size = file.tell()
            try:
                RecordWriter(_Whole(file)).write(event.SerializeToString())
            except OSError:
                file.truncate(size)
                raise


@cache
def _messages() -> Any:
    """TensorBoard's messages; they are imported when the first is written."""
    from tensorboard.compat.proto import event_pb2, summary_pb2

    event, summary = cast(Any, event_pb2), cast(Any, summary_pb2)
    kinds = {"Event": event.Event, "SessionLog": event.SessionLog, "Summary": summary.Summary}
    return SimpleNamespace(**kinds)


class _Whole:
    """An unbuffered file that writes all that it is given, or raises OSError."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, content: bytes) -> None:
        rest = memoryview(content)
        while rest:
            rest = rest[self._file.write(rest) :]


def _tag(tag: str) -> str:
    return tag if tag.startswith(FIRST) else f"{OTHERS}{tag}"


def _flat(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(section.key, value) of a nested configuration, as TensorBoard can show them."""
    for key, value in options.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            is_number = isinstance(value, bool | int | float)
            # A file's name may be no UTF-8.
            shown = value if is_number else str(value).encode(errors="backslashreplace").decode()
            yield f"{prefix}{key}", shown
