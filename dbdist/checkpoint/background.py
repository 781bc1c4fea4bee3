"""Jobs beside the training thread."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any, TypeVar

T = TypeVar("T")


class Background:
    """Runs jobs one after the other, beside the caller. Leaving the process waits for none."""

    def __init__(self) -> None:
        self._last: Future[Any] | None = None

    def start(self, job: Callable[[], T]) -> Future[T]:
        before, future = self._last, Future[T]()
        self._last = future

        def run() -> None:
            if before is not None:
                wait([before])
            try:
                future.set_result(job())
            except BaseException as error:  # for whoever asks for the result
                future.set_exception(error)

        threading.Thread(target=run, name="dbdist-checkpoint", daemon=True).start()
        return future
