"""Who is alive, where, and who is stuck: a thread on every rank, beside its work.

Each rank leaves signs of life in the launcher's store, with the step and phase it is at. Rank 0
looks after all others, they look after rank 0. A rank that gives no sign, or stands still though it
waits for nobody, for almost `parallel.timeout_s` is named by every other one; then they end. Its
thread also carries the agreement on stopping (`stopping`). Who was named does not outlive them on
their machine, unless it is the one that holds the store.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass

import torch.distributed as dist

from dbdist.parallel.health.neighbours import Address, Neighbours
from dbdist.parallel.health.stopping import Stopping

BEAT_S = 0.5
"""Between two signs of life."""
LOST = "ended: lost a connection"
"""How a rank leaves that misses another: not the cause of what others miss."""
LEAVE_S = 5.0
"""How long rank 0 stays for the others to finish."""


@dataclass(frozen=True)
class Place:
    """Where a rank is."""

    phase: str
    waits: bool
    """For other ranks."""
    step: int
    """That it is taking, or has taken last, from 1."""
    for_s: float = 0.0
    """How long so far, at the sign of life."""
    beat: int = 0
    """Number of the sign of life."""

    def __str__(self) -> str:
        return f"step {self.step}, {self.phase}"


class Watch:
    """One rank's part. Does nothing until `start`."""

    def __init__(self) -> None:
        self.stopping = Stopping()
        self.names: list[str] = []
        """Of all ranks: `rank 1 (block 1)`."""
        self.grace_s = 0.0
        """What this rank gets to save its own work once another is stuck."""
        self._rank = 0
        self._store: dist.Store | None = None
        self._phase, self._waits = "starting", False
        self._since = time.monotonic()
        self._beat = 0
        self._is_closing = threading.Event()
        self._thread: threading.Thread | None = None

    def start(
        self,
        rank: int,
        names: list[str],
        addresses: Sequence[Address | None],
        copies: Sequence[int],
        store: dist.Store | None,
        timeout_s: float,
        say: Callable[[str], None],
    ) -> None:
        """names, addresses: of all ranks. copies: the ranks that hold this one's block. store: None
        for a process alone. say: shows a line, from any thread."""
        self.names, self._rank, self._say = names, rank, say
        self._neighbours = Neighbours(addresses)
        self.at("set-up")
        if store is None:
            return
        # A connection of its own: the main thread may be waiting in the other one.
        self._store = dist.PrefixStore("watch", store.clone())
        own = dist.PrefixStore("stopping", self._store)
        self.stopping.join(rank, len(names), copies, own)
        self._beat_s = min(BEAT_S, timeout_s / 20)
        self._limit_s = timeout_s - 5 * self._beat_s
        self._launcher = os.getppid()
        self._tell()
        self._thread = threading.Thread(target=self._run, name="dbdist-watch", daemon=True)
        self._thread.start()
        self._talked = time.monotonic()
        threading.Thread(target=self._guard, name="dbdist-guard", daemon=True).start()

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

    def close(self, end: str = "finished") -> None:
        """end: how this rank leaves, for those who miss it."""
        if self._thread is None or self._is_closing.is_set():
            return
        self.at(end, waits=True)
        self._is_closing.set()
        self._thread.join(4 * self._beat_s)
        with suppress(RuntimeError):
            self._tell()
            # Rank 0 may hold the store, which the others want until they have finished too.
            deadline = time.monotonic() + LEAVE_S
            while end == "finished" and self._rank == 0 and time.monotonic() < deadline:
                places = self._places(range(len(self.names)))
                if all(p.phase.startswith(("finished", "ended")) for p in places.values()):
                    break
                time.sleep(0.02)
        self._neighbours.close()

    def missing(self) -> str:
        """After an error of a connection: the ranks that ended or give no more signs of life, and
        where they were. Empty if there is none."""
        if self._store is None:
            return ""
        others = [rank for rank in range(len(self.names)) if rank != self._rank]
        with suppress(RuntimeError):
            before = self._places(others)
            time.sleep(2.5 * self._beat_s)
            now = self._places(others)
            quiet = {r: p for r, p in now.items() if r not in before or before[r].beat == p.beat}
            ended = {r: p for r, p in now.items() if p.phase.startswith("ended")}
            causes = {r: p for r, p in ended.items() if p.phase != LOST}
            gone = {r: p for r, p in quiet.items() if r not in ended and p.phase != "finished"}
            found = causes or gone or ended
            return "; ".join(f"{self.names[r]} is gone, it was at {p}" for r, p in found.items())
        return "the launcher's store is gone too"

    def here(self) -> str:
        """`rank 0 (block 0) at step 37, backward`."""
        return f"{self.names[self._rank] if self.names else 'rank 0'} at {self._place()}"

    # The thread

    def _run(self) -> None:
        heard: dict[int, tuple[int, float]] = {}
        assert self._store is not None
        try:
            while not self._is_closing.wait(self._beat_s):
                self._tell()
                self.stopping.attend()
                if self._store.check(["verdict"]) or self._look(heard):
                    self._end(**json.loads(self._store.get("verdict")))
                self._talked = time.monotonic()
        except RuntimeError as error:
            if not self._is_closing.is_set():
                self._end(f"the launcher's store is gone ({str(error).splitlines()[0]})")

    def _guard(self) -> None:
        """Ends this rank when the launcher is gone, or the store, which may be in rank 0's process,
        does not answer."""
        while not self._is_closing.wait(self._beat_s):
            if os.getppid() != self._launcher:
                self._end("the launcher is gone")
            if time.monotonic() - self._talked > self._limit_s:
                self._end(
                    f"{self.names[0]} or the launcher did not arrive: the store that it holds has "
                    f"not answered for {self._limit_s:.0f} s"
                )

    def _place(self) -> Place:
        since = time.monotonic() - self._since
        return Place(self._phase, self._waits, self.stopping.step, round(since, 1), self._beat)

    def _tell(self) -> None:
        assert self._store is not None
        self._beat += 1
        self._store.set(f"place/{self._rank}", json.dumps(asdict(self._place())))

    def _places(self, ranks: Iterable[int]) -> dict[int, Place]:
        """Of those among these ranks that have given a sign of life at all."""
        assert self._store is not None
        key = "place/{}".format
        ranks = list(ranks)
        if not self._store.check([key(rank) for rank in ranks]):
            ranks = [rank for rank in ranks if self._store.check([key(rank)])]
        found = self._store.multi_get([key(rank) for rank in ranks]) if ranks else []
        return {r: Place(**json.loads(text)) for r, text in zip(ranks, found, strict=True)}

    def _look(self, heard: dict[int, tuple[int, float]]) -> bool:
        """Whether a rank that is this one's to look after is stuck; then the verdict is told."""
        assert self._store is not None
        now = time.monotonic()
        ranks = range(len(self.names)) if self._rank == 0 else [0]
        places = self._places(ranks)
        silent: dict[int, str] = {}
        still: dict[int, str] = {}
        for rank in ranks:
            place = places.get(rank, Place("starting", False, 0))
            if heard.setdefault(rank, (place.beat, now))[0] != place.beat:
                heard[rank] = place.beat, now
            silence = now - heard[rank][1]
            if silence > self._limit_s and place.phase != "finished":
                silent[rank] = (
                    f"{self.names[rank]} did not arrive: no sign of life for {silence:.0f} s, it "
                    f"was at {place}"
                )
            elif place.for_s > self._limit_s and not place.waits:
                still[rank] = (
                    f"{self.names[rank]} did not arrive: for {place.for_s:.0f} s at {place}"
                )
        if guilty := silent or still:
            verdict = {"text": "; ".join(guilty.values()), "ranks": list(guilty)}
            self._store.compare_set("verdict", "", json.dumps(verdict))
        return bool(guilty)

    def _end(self, text: str, ranks: Iterable[int] = ()) -> None:
        """ranks: those to blame."""
        self._say(f"error: {text}; this is {self.here()}")
        self.stopping.give_up(text)
        # The others have to read it before the launcher, or the store's owner, ends them.
        time.sleep(3 * self._beat_s)
        self._neighbours.kill(ranks)
        self._is_closing.wait(self.grace_s)
        time.sleep(self.grace_s / 4)  # the main thread leaves by itself
        os._exit(1)
