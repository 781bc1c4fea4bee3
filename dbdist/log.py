"""Lines on stderr through the standard library's logging: one logger, handler and prefix.

A line begins with `[r3 b1 step 120] ` (rank, block, step, where they are known); a process that
runs by itself has no prefix. A line that cannot be shown is lost: logging never raises.
"""

import logging
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass


@dataclass
class _Place:
    """Where this process is: what the prefix says."""

    who: str = ""
    step: int | None = None
    show: Callable[[str], None] | None = None


_place = _Place()
_logger = logging.getLogger("dbdist")


def join(rank: int, block: int | None) -> None:
    """Begins to name this rank in every line: `[r3 b1]`; block: None without one."""
    _place.who, _place.step = f"r{rank}" if block is None else f"r{rank} b{block}", None


def leave() -> None:
    """Ends what `join` and `set_step` began."""
    _place.who, _place.step = "", None


def set_step(step: int) -> None:
    """Says which step this rank takes, from 1."""
    _place.step = step


def place() -> str:
    """What a line of this moment begins with: `[r3 b1 step 120] `, or nothing."""
    if not _place.who:
        return ""
    return f"[{_place.who}] " if _place.step is None else f"[{_place.who} step {_place.step}] "


def warning(text: str, at: str | None = None) -> None:
    """Shows `warning: text`. at: the `place()` of the rank that means it; None: this one's."""
    text = text.encode(errors="backslashreplace").decode()  # file names may be no text
    _logger.warning("%s", text, extra={"place": place() if at is None else at})


def share_terminal(show: Callable[[str], None] | None) -> None:
    """Shows lines through this function, such as a live display's, while it has the terminal.

    None: they go to stderr again.
    """
    _place.show = show


class _Lines(logging.Handler):
    """Writes one whole line at a time to stderr, or through the live display."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(Exception):  # a closed terminal, a full disk, an odd encoding
            line = _one_line(record)
            if _place.show is not None:
                _place.show(line)
                return
            stream = sys.stderr
            encoding = getattr(stream, "encoding", None) or "utf-8"
            stream.write(line.encode(encoding, "backslashreplace").decode(encoding) + "\n")
            stream.flush()


def _one_line(record: logging.LogRecord) -> str:
    kind = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
    text = " ".join(record.getMessage().split())
    return f"{getattr(record, 'place', place())}{kind}{text}"


_logger.addHandler(_Lines())
_logger.propagate = False
