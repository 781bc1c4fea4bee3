"""Loads batches here or in worker processes, and never waits for one that cannot come.

A worker that dies, or whose batch does not fit into shared memory, ends the loading with DataError
within seconds. What a set has replaced is shown once for each sample, by the main process.
"""

import contextlib
import gc
import logging
import multiprocessing.connection
import multiprocessing.queues
import os
import shutil
import signal
import threading
import time
from collections.abc import Generator, Iterable, Sequence
from functools import partial
from typing import Any, NoReturn, Protocol, cast, runtime_checkable

import torch
from torch.utils.data import DataLoader

from dbdist.data.base import Batch, Dataset, Key
from dbdist.errors import DataError

WAIT_S = 300.0
"""How long workers that are alive may take for a batch."""
POLL_S = 1.0
"""How often it is asked whether they are."""
NO_SHARED_MEMORY, NO_FILES, UNSENT = 70, 71, 72
"""Exit codes of a worker that could not send its batch."""
ADVICE = "; `dbdist check-data` lists all such files, data.on_error skip replaces them"
_SHOWN: set[str] = set()
"""Notes that need not be shown again."""
_LOG = logging.getLogger("dbdist.data")


@runtime_checkable
class TakesNotes(Protocol):
    """A set that replaces damaged samples, and says which."""

    def take_notes(self) -> list[str]:
        """A sentence for each sample replaced since the last call."""
        ...


def load_batches(
    dataset: Dataset, keys: Iterable[Sequence[Key]], num_workers: int, pin_memory: bool = False
) -> Generator[Batch, None, None]:
    """A generator of the batches of these keys, in order; closing it ends its workers.

    Raises DataError for a damaged sample, and where workers cannot go on.
    """
    samples, notes = _Samples(dataset), _Notes()
    items = map(samples.__getitems__, keys)
    if num_workers > 0:
        items = _from_workers(samples, keys, num_workers, pin_memory)
    try:
        for batch, damage, replaced in items:
            notes.show(replaced)
            if damage is not None:
                raise DataError(f"{damage}{ADVICE if isinstance(dataset, TakesNotes) else ''}")
            if pin_memory and num_workers == 0:
                batch = {name: values.pin_memory() for name, values in batch.items()}
            yield batch
    finally:
        if isinstance(items, Generator):
            items.close()
        notes.sum_up()


Item = tuple[Batch, str | None, list[str]]
"""(batch, why there is none, a sentence for each replaced sample)"""


class _Samples:
    """A set whose batches come with what is to be said of them."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitems__(self, keys: Sequence[Key]) -> Item:
        batch, damage = {}, None
        try:
            batch = self._dataset.__getitems__(keys)
        except DataError as error:  # as text: a worker's exceptions come with their tracebacks
            damage = str(error)
        notes = self._dataset.take_notes() if isinstance(self._dataset, TakesNotes) else []
        return batch, damage, notes


class _Notes:
    """Shows each note once in this process, and counts those of one stream."""

    def __init__(self) -> None:
        self._seen: set[str] = set()
        self._count = 0

    def show(self, notes: list[str]) -> None:
        self._count += len(notes)
        self._seen.update(notes)
        for note in notes:
            if note not in _SHOWN:
                _SHOWN.add(note)
                _LOG.warning(note)

    def sum_up(self) -> None:
        if self._count:
            files = "1 file is" if len(self._seen) == 1 else f"{len(self._seen)} files are"
            _LOG.warning(f"samples replaced: {self._count}, because {files} damaged")
        self._count = 0


def _from_workers(
    samples: _Samples, keys: Iterable[Sequence[Key]], num_workers: int, pin_memory: bool
) -> Generator[Item, None, None]:
    loader = DataLoader(
        cast(Any, samples),
        batch_sampler=cast(Any, keys),
        num_workers=num_workers,
        prefetch_factor=2,
        collate_fn=_as_it_is,
        worker_init_fn=_start_worker,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # else it draws a number from the global one
    )
    on_death = signal.getsignal(signal.SIGCHLD)
    gc.collect()
    try:
        workers: Any = iter(loader)
    except OSError as error:
        raise DataError(
            f"{num_workers} data workers cannot be started ({error}); lower data.num_workers"
        ) from error
    finally:  # torch's handler would raise anywhere in the training step, not here
        if threading.current_thread() is threading.main_thread() and on_death is not None:
            signal.signal(signal.SIGCHLD, on_death)
    workers._get_data = partial(_wait, workers)
    try:
        yield from _guarded(workers)
    finally:
        with contextlib.suppress(RuntimeError):  # a worker that dies while it is ended
            workers._shutdown_workers()


def _guarded(workers: Any) -> Generator[Item, None, None]:
    """What the workers give; DataError where the reason for an end lies in the machine."""
    while True:
        try:
            item = next(workers)
        except StopIteration:
            return
        except (RuntimeError, OSError, EOFError) as error:
            processes = workers._workers
            ended = _ended(processes)
            if not ended and str(error).startswith("Caught "):  # a mistake in the set's own code
                raise
            for process in processes:  # one that is stopped or waits for a disk ends no other way
                process.kill()
            said = str(error) or type(error).__name__
            reason = _why(ended[0].pid, ended[0].exitcode) if ended else f"failed: {said}"
            text = " ".join(reason.split())
            raise DataError(f"a data worker {text}; data.num_workers 0 needs no worker") from error
        yield item


def _ended(processes: list[Any]) -> list[Any]:
    """The workers that have failed; the connection to one breaks just before it ends."""
    dying = multiprocessing.connection.wait([p.sentinel for p in processes], timeout=1.0)
    for process in processes:
        if process.sentinel in dying:
            process.join()
    return [process for process in processes if process.exitcode]


def _wait(workers: Any) -> Any:
    """The next batch that has come, in place of the loader's wait without end."""
    end = time.monotonic() + WAIT_S
    while time.monotonic() < end:
        has_come, item = workers._try_get_data(POLL_S)
        if has_come:
            return item
        pinning = getattr(workers, "_pin_memory_thread", None)
        if pinning is not None and not pinning.is_alive():
            raise RuntimeError("the thread that pins memory has ended")
    raise RuntimeError(f"no batch has come for {WAIT_S:.0f} s")


def _why(pid: int, exitcode: int) -> str:
    """How a worker's exit code goes on after "a data worker"."""
    memory = "give it more room (docker: --shm-size 1g or --ipc host), or lower train.batch_size"
    if exitcode in (NO_SHARED_MEMORY, -signal.SIGBUS):
        with contextlib.suppress(OSError):
            total = shutil.disk_usage("/dev/shm").total
            memory = f"which has {total / 2**20:,.0f} MiB in all: {memory}"
        return f"found no room for its batch in /dev/shm, {memory}"
    if exitcode == NO_FILES:
        return "has too many open files: raise `ulimit -n` or lower data.num_workers"
    if exitcode == -signal.SIGKILL:
        return f"(pid {pid}) was killed, as when memory runs out: lower data.num_workers"
    if exitcode < 0:
        return f"(pid {pid}) was ended by signal {-exitcode} ({signal.strsignal(-exitcode)})"
    return f"(pid {pid}) ended with exit code {exitcode}"


def _as_it_is(batch: Any) -> Any:
    return batch


def _start_worker(worker_id: int) -> None:
    gc.freeze()  # garbage of the parent's may hold memory of a GPU, which a fork cannot give back
    os.setpgid(0, 0)  # launchers signal a rank's whole group, which means its main process
    signal.set_wakeup_fd(-1)  # signals of this process are not the main one's
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends its workers
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # … with this one
    torch.set_num_threads(1)
    # a batch that cannot be sent is dropped with a traceback, and waited for without end
    cast(Any, multiprocessing.queues.Queue)._on_queue_feeder_error = staticmethod(_leave)


def _leave(error: Exception, item: Any) -> NoReturn:
    text = str(error)
    if "shared memory" in text or "</torch_" in text:
        os._exit(NO_SHARED_MEMORY)
    if getattr(error, "errno", None) == 24 or "open files" in text or "(24)" in text:
        os._exit(NO_FILES)
    os.write(2, f"data worker: {' '.join(text.split())}\n".encode(errors="backslashreplace"))
    os._exit(UNSENT)
