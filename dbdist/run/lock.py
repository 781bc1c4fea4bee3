"""Who trains which block in a run directory.

Two jobs that write the same files would leave a mixture of both. RUN/.lock has a record for each
block, which the block's first replica locks and signs. The kernel gives a lock back when its
process ends, however that happens; data workers do not inherit it. The file is never removed:
somebody may wait for it.
"""

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from dbdist import log
from dbdist.errors import ConfigError

NAME = ".lock"
RECORD_BYTES = 128
PATIENCE_S = 3.0
"""For a process that is just ending."""
PATIENCE_ELSEWHERE_S = 100.0
"""For one on another machine: shared file systems take that long to notice a lost machine."""


@contextmanager
def sole_trainer(run_dir: Path, blocks: Sequence[int], timeout_s: float) -> Iterator[None]:
    """Keeps others from training these blocks here; makes the folder.

    Raises ConfigError, naming who does, if they are not free soon, at the latest after timeout_s.
    Without effect where the file system has no locks.
    """
    if not blocks:
        yield
        return
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(run_dir / NAME, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise ConfigError(f"run_dir {run_dir} cannot be written ({error.strerror})") from None
    try:
        start = time.monotonic()
        for block in blocks:
            _lock(run_dir, descriptor, block, start, timeout_s)
        yield
    finally:
        os.close(descriptor)


def _lock(run_dir: Path, descriptor: int, block: int, start: float, timeout_s: float) -> None:
    offset = block * RECORD_BYTES
    own = f"process {os.getpid()} on {socket.gethostname()}"[: RECORD_BYTES - 1]
    has_told = False
    while True:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, RECORD_BYTES, offset)
            break
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return  # no locks here
        record = os.pread(descriptor, RECORD_BYTES, offset).decode(errors="replace")
        holder = " ".join(record.replace("\0", " ").split()) or "another process"
        is_here = holder.endswith(f" on {socket.gethostname()}")
        patience_s = min(PATIENCE_S if is_here else PATIENCE_ELSEWHERE_S, timeout_s)
        waited_s = time.monotonic() - start
        if not is_here and not has_told and waited_s > 0.5:  # by then it has signed
            told = f"waits up to {patience_s:.0f} s for {holder}, which trains block {block}"
            log.warning(f"{run_dir}: {told} there")
            has_told = True
        if waited_s > patience_s:
            raise ConfigError(
                f"{run_dir} is in use: {holder} trains block {block} there; wait for it, stop it, "
                "or give another run_dir"
            )
        time.sleep(0.1)
    with suppress(OSError):  # a full disk: it holds all the same
        os.pwrite(descriptor, own.encode().ljust(RECORD_BYTES, b"\n"), offset)
