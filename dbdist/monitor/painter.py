"""Pictures drawn in a process of their own, so that training waits for none of them."""

import base64
import json
import os
import subprocess
import sys
import time
from collections import deque
from contextlib import suppress
from multiprocessing.connection import wait
from typing import Any, NamedTuple

MOST_WAITING = 200
"""Pictures that may wait to be drawn; the oldest give way."""


class Picture(NamedTuple):
    tag: str
    step: int
    png: bytes


class Painter:
    """Hands requests one at a time to `drawing`, and collects the pictures that are done.

    There is never more than one request in the pipe, so sending does not wait.
    """

    def __init__(self) -> None:
        self._waiting: deque[tuple[str, int, dict[str, Any]]] = deque(maxlen=MOST_WAITING)
        self._drawing: tuple[str, int] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._answer = bytearray()

    def ask(self, tag: str, step: int, request: dict[str, Any]) -> None:
        """Asks for a picture; see `figures.draw`."""
        self._waiting.append((tag, step, request))

    def collect(self, patience_s: float = 0.0) -> list[Picture]:
        """The pictures that are done since the last call; sends the next request.

        patience_s: how long to wait for all of them. Raises OSError where drawing fails, and then
        forgets what was to be drawn.
        """
        until, done = time.monotonic() + patience_s, []
        try:
            while self._drawing is not None or self._waiting:
                if self._drawing is None:
                    self._send()
                elif (line := self._read(max(0.0, until - time.monotonic()))) is None:
                    break
                else:
                    done.append(self._picture(line))
        except OSError:
            self.close()
            raise
        return done

    def close(self) -> None:
        """Ends the process at once."""
        self._waiting.clear()
        self._drawing = None
        if self._process is not None:
            for pipe in (self._process.stdin, self._process.stdout):
                with suppress(OSError):
                    pipe.close()  # type: ignore[union-attr]
            self._process.kill()
            self._process.wait()
            self._process = None
        self._answer.clear()

    def _send(self) -> None:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "dbdist.monitor.drawing"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
            )
        tag, step, request = self._waiting.popleft()
        self._drawing = tag, step
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")

    def _read(self, patience_s: float) -> bytes | None:
        """The answer's line; None while it has not come."""
        assert self._process is not None
        assert self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        until = time.monotonic() + patience_s
        while wait([pipe], max(0.0, until - time.monotonic())):
            found = os.read(pipe, 2**16)
            if not found:
                raise OSError(f"the drawing process ended with code {self._process.wait()}")
            self._answer += found
            if found.endswith(b"\n"):
                line = bytes(self._answer)
                self._answer.clear()
                return line
        return None

    def _picture(self, line: bytes) -> Picture:
        answer = json.loads(line)
        if "error" in answer:
            raise OSError(answer["error"])
        assert self._drawing is not None
        tag, step = self._drawing
        self._drawing = None
        return Picture(tag, step, base64.b64decode(answer["png"]))
