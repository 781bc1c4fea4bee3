"""When all ranks stop, and the signals that ask for it.

Whoever wants to stop asks through the store. Every rank then tells which step it has begun, begins
no other before the answer, and rank 0 answers with the foremost: up to there all go on, so whoever
is in the middle of a step finds its partners there. Where a rank is gone there is no answer, and
each stops where it is.

`Stopping` is shared by the main thread, which asks `may_begin` before each step, and the thread of
`watch`, which talks with the store.
"""

import json
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace

import torch.distributed as dist

AGREE_S = 5.0
"""How long rank 0 waits for the others' steps. Launchers kill a rank 30 s after its SIGTERM."""
GONE = "a rank is gone"


@dataclass(frozen=True)
class Stop:
    """Why all ranks stop, and after which step."""

    reason: str
    is_fault: bool
    """Something is wrong; else somebody asked."""
    last_step: int | None = None
    """Common to all ranks; None where there is none."""
    apart: str | None = None
    """Why there is none."""


class Stopping:
    """One rank's view of it."""

    def __init__(self) -> None:
        self.step = 0
        """Begun last, from 1."""
        self._changed = threading.Condition()
        self._stop: Stop | None = None
        self._is_decided = False
        self.own_fault: Stop | None = None
        """What this rank has found wrong, whatever the others stop for."""
        self.max_apart_s: float | None = None
        """Time that a rank may need to a common last step; more, and each block stops by itself.
        None: they need each other."""
        self._rank, self._world_size = 0, 1
        self._copies: Sequence[int] = [0]
        self._store: dist.Store | None = None
        self._is_told = False
        self._deadline = 0.0
        self._own_last = 0
        self._first: tuple[int, float] | None = None
        """Step begun first, and when."""

    def join(self, rank: int, world_size: int, copies: Sequence[int], store: dist.Store) -> None:
        """Makes it a matter of all ranks. copies: those that hold this rank's block."""
        self._rank, self._world_size, self._store = rank, world_size, store
        self._copies = copies

    @property
    def asked(self) -> Stop | None:
        """What this rank has asked for, or heard of."""
        return self._stop

    def may_begin(self, step: int) -> Stop | None:
        """None, or why to stop before this step (from 0). Waits for the answer once a stop is asked
        for."""
        with self._changed:
            while self._stop is not None and not self._is_decided:
                self._changed.wait()
            stop = self._stop
            if stop is not None:
                if step >= (self._own_last if stop.last_step is None else stop.last_step):
                    return stop
            self.step = step + 1
            self._first = self._first or (self.step, time.monotonic())
            return None

    def wait_for_all(self) -> Stop | None:
        """For a rank that has taken its last step and can leave without the others: waits until all
        have. Returns why not to wait any longer: the blocks stop each by itself."""
        if self._store is None:
            return None
        num_done = self._store.add("done", 1)
        while num_done < self._world_size:
            with self._changed:
                if self._is_decided and self._stop and self._stop.last_step is None:
                    return self._stop
            time.sleep(0.1)
            num_done = self._store.add("done", 0)
        return None

    def ask(self, reason: str, is_fault: bool = False) -> None:
        """Makes all ranks stop soon. The first reason counts."""
        stop = Stop(reason, is_fault)
        if is_fault:
            self.own_fault = self.own_fault or stop
        if self._store is not None:
            with suppress(RuntimeError):  # the store is gone, which `watch` notices
                told = self._store.compare_set("stop", "", json.dumps(asdict(stop)))
                stop = Stop(**json.loads(told))
        with self._changed:
            self._stop = self._stop or stop
            if self._store is None:
                self._decide(self.step)

    def give_up(self, reason: str) -> None:
        """This rank stops before its next step, whatever the others do: something is wrong."""
        with self._changed:
            self._stop = Stop(reason, is_fault=True)
            self._decide(None, "a rank is stuck")

    def attend(self) -> None:
        """A round of the agreement; called again and again by the thread that talks with the store.
        Raises RuntimeError when the store is gone."""
        store = self._store
        if store is None or self._is_decided:
            return
        if self._stop is None:
            if not store.check(["stop"]):
                return
            with self._changed:
                self._stop = Stop(**json.loads(store.get("stop")))
        if not self._is_told:
            with self._changed:  # after this the main thread begins no step by itself
                begun = self.step
            store.set(f"begun/{self._rank}", json.dumps([begun, self._step_s()]))
            self._is_told, self._deadline = True, time.monotonic() + AGREE_S
        if self._rank == 0 and not store.check(["last"]):
            if begun := self._begun(range(self._world_size)):
                store.compare_set("last", "", self._answer(begun))
            elif time.monotonic() > self._deadline:
                store.compare_set("last", "", GONE)
        if time.monotonic() > self._deadline + 2:  # rank 0 is gone, or has just answered
            store.compare_set("last", "", GONE)
        if store.check(["last"]):
            last = store.get("last").decode()
            if not last.isdecimal() and (own := self._begun(self._copies)):
                self._own_last = max(step for step, _ in own)  # copies of a block go on together
            with self._changed:
                self._decide(*((int(last), None) if last.isdecimal() else (None, last)))

    def _begun(self, ranks: Sequence[int]) -> list[tuple[int, float]]:
        """(step begun last, seconds for a step) of these ranks; empty before all have told."""
        assert self._store is not None
        keys = [f"begun/{rank}" for rank in ranks]
        if not self._store.check(keys):
            return []
        return [tuple(json.loads(told)) for told in self._store.multi_get(keys)]

    def _answer(self, begun: Sequence[tuple[int, float]]) -> str:
        """The last step, or why there is none."""
        foremost = max(step for step, _ in begun)
        needed_s = max((foremost - step) * step_s for step, step_s in begun)
        if self.max_apart_s is None or needed_s <= self.max_apart_s:
            return str(foremost)
        gap = foremost - min(step for step, _ in begun)
        return f"the blocks are {gap} steps apart, or {needed_s:.0f} s"

    def _step_s(self) -> float:
        """Mean time of a step."""
        if self._first is None:
            return 0.0
        step, since = self._first
        return (time.monotonic() - since) / max(1, self.step - step)

    def _decide(self, last_step: int | None, apart: str | None = None) -> None:
        assert self._stop is not None
        self._stop = replace(self._stop, last_step=last_step, apart=apart)
        self._is_decided = True
        self._changed.notify_all()
