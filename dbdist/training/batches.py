"""A block's training batches, also where a file of the data set is damaged."""

from collections.abc import Iterator

from dbdist.data.base import Batch
from dbdist.data.loader import BatchStream
from dbdist.errors import DataError
from dbdist.parallel.health.stopping import Stopping


class LastBatch:
    """The batch that this rank has loaded last, of whichever block."""

    batch: Batch | None = None


class StoppingBatches(Iterator[Batch]):
    """A stream that asks all ranks to stop and save when a batch of it cannot be loaded.

    The others may be in the middle of the same step and need this rank there. So it takes that one
    step with the last good batch again; without one it raises DataError, as nothing is trained yet.
    """

    def __init__(self, stream: BatchStream, stopping: Stopping, who: str, last: LastBatch) -> None:
        """who: names this rank in the message."""
        self.stream = stream
        self._stopping, self._who, self._last = stopping, who, last
        self._is_broken = False

    def __next__(self) -> Batch:
        if not self._is_broken:
            try:
                self._last.batch = next(self.stream)
            except DataError as error:
                self._is_broken = True
                if self._last.batch is None:
                    raise
                self._stopping.ask(f"{self._who}: {error}", is_mistake=True)
        assert self._last.batch is not None
        return self._last.batch

    def close(self) -> None:
        """Ends the stream and its workers."""
        self.stream.close()

    def indices_of_step(self, step: int) -> list[int]:
        """This replica's samples of a step."""
        return self.stream.indices_of_step(step)
