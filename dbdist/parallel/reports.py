"""What torchrun says after a failure: the one line of the rank at fault, not 40 of its own.

A rank writes its line to torchelastic's error file; torchrun's agent, which imports dbdist for
`loopback`, prints it as the last line on the terminal. Reports about other programs stay as they
are.
"""

import json
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

_OURS = "dbdist"


def write_line(path: str, line: str) -> None:
    """A rank's one line, for its launcher's report."""
    _write(path, line, {_OURS: "line"})


def write_traceback(path: str, error: BaseException) -> None:
    """A rank's traceback, for its launcher's report."""
    lines = traceback.format_exception(error)
    _write(path, f"{type(error).__name__}: {error}", {"py_callstack": "".join(lines)})


def _write(path: str, message: str, extra: dict[str, str]) -> None:
    content = {"message": message, "extraInfo": {**extra, "timestamp": str(int(time.time()))}}
    with suppress(OSError):
        Path(path).write_text(json.dumps({"message": content}))


def shorten() -> None:
    """Makes this process, torchrun's agent, end with the line of the first rank that failed."""
    usual = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
        line = _line_of(error)
        if line is None:
            usual(kind, error, where)
        else:
            print(line, file=sys.stderr)

    sys.excepthook = hook


def _line_of(error: BaseException) -> str | None:
    """The line of the first rank that failed; None where that rank wrote none."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if not isinstance(error, ChildFailedError):
        return None
    message: Any = error.get_first_failure()[1].message  # a str to torch's type hints
    is_ours = isinstance(message, dict) and _OURS in message.get("extraInfo", {})
    return str(message["message"]) if is_ours else None
