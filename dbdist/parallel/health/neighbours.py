"""The processes of the other ranks on this machine, which can be ended from here.

One that is stuck cannot end itself, and its launcher, if it has one, gives it half a minute.
"""

import os
import signal
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

Address = tuple[str, int]
"""Where a process is: a name of what numbers it, and its number there."""


def own_address() -> Address | None:
    """Returns this process's address; None where it cannot be known.

    Containers number processes each for themselves, whatever their host is called.
    """
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}", os.getpid()
    return None


class Neighbours:
    """Handles of the ranks here, which stay theirs when a number is given to another process."""

    def __init__(self, addresses: Sequence[Address | None] = ()) -> None:
        """addresses: of all ranks, while they live."""
        here = own_address()
        self._handles: dict[int, int] = {}
        for rank, address in enumerate(addresses):
            if here and address and address[0] == here[0] and address != here:
                with suppress(OSError):  # an old kernel
                    self._handles[rank] = os.pidfd_open(address[1])

    def kill(self, ranks: Iterable[int]) -> None:
        """Ends those of these ranks that are here, even if they are stopped."""
        for rank in ranks:
            if (handle := self._handles.get(rank)) is not None:
                with suppress(OSError):  # it has ended
                    signal.pidfd_send_signal(handle, signal.SIGKILL)

    def close(self) -> None:
        while self._handles:
            os.close(self._handles.popitem()[1])
