"""Who is alive, where, and who is stuck: threads on every rank, beside its work.

1. Each rank writes signs of life into the launcher's store, with the step and phase it is at.
2. Rank 0 watches all others, and all others watch rank 0.
3. A rank that gives no sign, or makes no progress though it waits for no other, for almost
   `parallel.timeout_s` is stuck. Whoever finds that writes a verdict, which names the rank.
4. Every rank that reads the verdict reports it and ends. A stuck rank leaves its stack, and is
   killed by the ranks on its machine, unless it holds the store.

The same thread takes the rounds of the agreement on stopping (`stopping`).
"""

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

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


class Guard:
    """Looks after the other ranks from its first moment to `close`."""

    def __init__(
        self,
        rank: int,
        names: Sequence[str],
        addresses: Sequence[Address | None],
        store: dist.Store,
        timeout_s: float,
        place: Callable[[], Place],
        stopping: Stopping,
        say: Callable[[str], None],
        grace_s: Callable[[], float],
        stack_file: Path | None = None,
    ) -> None:
        """names, addresses: of all ranks. store: its own connection. place: where this rank is.

        say: shows a line. grace_s: how long this rank may take to save its work once another is
        stuck. stack_file: where this rank's stack goes if it is stuck.
        """
        self._rank, self._names, self._store = rank, names, store
        self._place, self._stopping, self._say = place, stopping, say
        self._grace_s, self._stack_file = grace_s, stack_file
        self._neighbours = Neighbours(addresses)
        self._beat_s = min(BEAT_S, timeout_s / 20)
        self._limit_s = timeout_s - 5 * self._beat_s
        self._launcher = os.getppid()
        self._beat = 0
        self._is_closing = threading.Event()
        self._talked = time.monotonic()
        self._write_place()
        self._thread = threading.Thread(target=self._run, name="dbdist-watch", daemon=True)
        self._thread.start()
        threading.Thread(target=self._watch_store, name="dbdist-guard", daemon=True).start()

    def close(self) -> None:
        """Writes how this rank leaves; rank 0, which may hold the store, stays for the others."""
        if self._is_closing.is_set():
            return
        self._is_closing.set()
        self._thread.join(4 * self._beat_s)
        with suppress(RuntimeError):
            self._write_place()
            has_finished = self._place().phase == "finished"
            deadline = time.monotonic() + LEAVE_S
            while has_finished and self._rank == 0 and time.monotonic() < deadline:
                places = self._places(range(len(self._names)))
                if all(p.phase.startswith(("finished", "ended")) for p in places.values()):
                    break
                time.sleep(0.02)
        self._neighbours.close()

    def missing(self) -> str:
        """The ranks that ended or give no more signs of life, and where they were, if any."""
        others = [rank for rank in range(len(self._names)) if rank != self._rank]
        with suppress(RuntimeError):
            before = self._places(others)
            time.sleep(2.5 * self._beat_s)
            now = self._places(others)
            quiet = {r: p for r, p in now.items() if r not in before or before[r].beat == p.beat}
            ended = {r: p for r, p in now.items() if p.phase.startswith("ended")}
            causes = {r: p for r, p in ended.items() if p.phase != LOST}
            gone = {r: p for r, p in quiet.items() if r not in ended and p.phase != "finished"}
            found = causes or gone or ended
            return "; ".join(f"{self._names[r]} is gone, it was at {p}" for r, p in found.items())
        return "the launcher's store is gone too"

    # The threads

    def _run(self) -> None:
        heard: dict[int, tuple[int, float]] = {}
        try:
            while not self._is_closing.wait(self._beat_s):
                self._write_place()
                self._stopping.attend()
                if self._store.check(["verdict"]) or self._look(heard):
                    self._end(**json.loads(self._store.get("verdict")))
                self._talked = time.monotonic()
        except RuntimeError as error:
            if not self._is_closing.is_set():
                self._end(f"the launcher's store is gone ({str(error).splitlines()[0]})")

    def _watch_store(self) -> None:
        """Ends this rank when the launcher is gone, or the store does not answer.

        The store may be in rank 0's process, which may be stopped.
        """
        while not self._is_closing.wait(self._beat_s):
            if os.getppid() != self._launcher:
                self._end("the launcher is gone")
            if time.monotonic() - self._talked > self._limit_s:
                self._end(
                    f"{self._names[0]} or the launcher did not arrive: the store that it holds has "
                    f"not answered for {self._limit_s:.0f} s"
                )

    def _write_place(self) -> None:
        self._beat += 1
        place = replace(self._place(), beat=self._beat)
        self._store.set(f"place/{self._rank}", json.dumps(asdict(place)))

    def _places(self, ranks: Iterable[int]) -> dict[int, Place]:
        """Where these ranks are, of those that have given a sign of life at all."""
        key = "place/{}".format
        ranks = list(ranks)
        if not self._store.check([key(rank) for rank in ranks]):
            ranks = [rank for rank in ranks if self._store.check([key(rank)])]
        found = self._store.multi_get([key(rank) for rank in ranks]) if ranks else []
        return {r: Place(**json.loads(text)) for r, text in zip(ranks, found, strict=True)}

    def _look(self, heard: dict[int, tuple[int, float]]) -> bool:
        """Whether a rank that this one watches is stuck; then the verdict is written."""
        now = time.monotonic()
        ranks = range(len(self._names)) if self._rank == 0 else [0]
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
                    f"{self._names[rank]} did not arrive: no sign of life for {silence:.0f} s, it "
                    f"was at {place}"
                )
            elif place.for_s > self._limit_s and not place.waits:
                still[rank] = (
                    f"{self._names[rank]} did not arrive: for {place.for_s:.0f} s at {place}"
                )
        if guilty := silent or still:
            verdict = {"text": "; ".join(guilty.values()), "ranks": list(guilty)}
            self._store.compare_set("verdict", "", json.dumps(verdict))
        return bool(guilty)

    def _end(self, text: str, ranks: Sequence[int] = ()) -> None:
        """Reports and ends this rank. ranks: those that are stuck."""
        stack = self._leave_stack() if self._rank in ranks else ""
        here = f"{self._names[self._rank]} at {self._place()}"
        self._say(f"error: {text}; this is {here}{stack}")
        self._stopping.give_up(text)
        # The others have to read it before the launcher, or the store's owner, ends them.
        time.sleep(3 * self._beat_s)
        self._neighbours.kill(ranks)
        self._is_closing.wait(self._grace_s())
        time.sleep(self._grace_s() / 4)  # the main thread leaves by itself
        os._exit(1)

    def _leave_stack(self) -> str:
        """Writes what all threads of this process are at; where, for a message."""
        try:
            if self._stack_file is not None:
                self._stack_file.parent.mkdir(exist_ok=True)
                with self._stack_file.open("w") as file:
                    faulthandler.dump_traceback(file, all_threads=True)
                return f"; its stack is in {self._stack_file}"
        except OSError:
            pass
        with suppress(OSError, ValueError, AttributeError):  # no terminal any more
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
        return ""
