"""Signals ask all ranks to stop; a second one ends this process."""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable

from dbdist.parallel.health.stopping import Stopping

TOGETHER_S = 1.0
"""Signals within this time are one: whoever signals all processes at once reaches a rank directly
and again through its launcher."""


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""The last is what Slurm is told to send before a time limit."""


class Signals:
    """Hears signals until `close`: the first asks all ranks to stop, the next ends this one.

    Python runs handlers between two steps of its main thread, which may wait in a collective for
    long: so the number is read from the wakeup descriptor by a thread. Only the main thread may
    make one.
    """

    def __init__(self, stopping: Stopping, name: str, say: Callable[[str], None]) -> None:
        """name: of this rank. say: shows a line."""
        self._stopping, self._name, self._say = stopping, name, say
        self._first_at: float | None = None
        self._here, self._there = socket.socketpair()
        self._there.setblocking(False)
        self._old_fd = signal.set_wakeup_fd(self._there.fileno())
        self._old = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        self._thread = threading.Thread(target=self._listen, name="dbdist-signals", daemon=True)
        self._thread.start()

    def close(self) -> None:
        signal.set_wakeup_fd(self._old_fd)
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._there.shutdown(socket.SHUT_RDWR)  # ends the thread, whoever else has it open
        self._there.close()
        self._thread.join()
        self._here.close()

    def _listen(self) -> None:
        while numbers := self._here.recv(64):
            for number in numbers:
                if number in SIGNALS:
                    self._hear(signal.Signals(number))

    def _hear(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if self._first_at is None:
            self._first_at = now
            is_new = self._stopping.asked is None
            # Not here: the store may not answer, and the next signal has to be heard.
            ask = threading.Thread(target=self._ask, args=(number.name,), daemon=True)
            ask.start()
            if is_new:
                self._say(f"{number.name}: finishes the step and saves; again ends at once")
        elif now - self._first_at > TOGETHER_S:
            self._say(f"{number.name} again: ends at once")
            os._exit(128 + number)

    def _ask(self, name: str) -> None:
        self._stopping.ask(f"{name} on {self._name}")
