"""Where this rank is, for its own messages and for the ranks that look after it.

`Watch` belongs to the main thread: it says which step and phase this rank is at. `start` adds a
`Guard`, whose threads tell the other ranks and hear of them.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from dbdist.parallel.health.guard import Guard, Place
from dbdist.parallel.health.neighbours import Address
from dbdist.parallel.health.stopping import Stopping


@dataclass(frozen=True)
class Company:
    """The ranks of a run, as one of them knows them."""

    rank: int
    """This one."""
    names: list[str]
    """Of all ranks: `rank 1 (block 1)`."""
    addresses: Sequence[Address | None]
    """Of the processes of all ranks."""
    copies: Sequence[int]
    """The ranks that hold this rank's block."""


class Watch:
    """Where this rank is. Other ranks know of it after `start`."""

    def __init__(self) -> None:
        self.stopping = Stopping()
        self.names: list[str] = []
        """Of all ranks: `rank 1 (block 1)`."""
        self.grace_s = 0.0
        """What this rank gets to save its own work once another is stuck."""
        self._name = "rank 0"
        self._phase, self._waits = "starting", False
        self._since = time.monotonic()
        self._guard: Guard | None = None

    def start(
        self,
        company: Company,
        store: dist.Store | None,
        timeout_s: float,
        say: Callable[[str], None],
        stack_file: Path | None = None,
    ) -> None:
        """Begins to look after the other ranks. store: None for a process without any.

        say: shows a line, from any thread. stack_file: where this rank's stack goes if it is stuck.
        """
        self.names, self._name = company.names, company.names[company.rank]
        self.at("set-up")
        if store is not None:
            # A connection of its own: the main thread may be waiting in the other one.
            own = dist.PrefixStore("watch", store.clone())
            stops = dist.PrefixStore("stopping", own)
            self.stopping.join(company.rank, len(company.names), company.copies, stops)
            self._guard = Guard(
                company.rank,
                company.names,
                company.addresses,
                own,
                timeout_s,
                self.place,
                self.stopping,
                say,
                lambda: self.grace_s,
                stack_file,
            )

    def at(self, phase: str, waits: bool = False) -> None:
        """Says where this rank is; said again, it is a sign of progress. waits: for others."""
        self._phase, self._waits, self._since = phase, waits, time.monotonic()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around a collective, in whatever phase."""
        phase, waits = self._phase, self._waits
        self.at(f"{phase} (done)", waits=True)
        yield
        self.at(phase, waits)

    def place(self) -> Place:
        """Where this rank is now."""
        since = time.monotonic() - self._since
        return Place(self._phase, self._waits, self.stopping.step, round(since, 1))

    def here(self) -> str:
        """`rank 0 (block 0) at step 37, backward`."""
        return f"{self._name} at {self.place()}"

    def missing(self) -> str:
        """The ranks that are gone after an error of a connection, and where they were, if any."""
        return self._guard.missing() if self._guard is not None else ""

    def close(self, end: str = "finished") -> None:
        """Ends the watch. end: how this rank leaves, for those who miss it."""
        if self._guard is not None:
            self.at(end, waits=True)
            self._guard.close()
            self._guard = None
