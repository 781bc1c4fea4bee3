"""When all ranks stop: an agreement that is made through the launcher's store.

1. A rank that wants to stop writes `stop`, with its reason. The first reason counts.
2. Every rank writes the step that it has begun, and begins no other before the answer.
3. Rank 0 writes `last`, the highest of these steps. Every rank takes its steps up to `last`, so a
   rank in the middle of a step finds its partners there, and then all save together.
4. Where blocks do not need each other and are too far apart, rank 0 writes `apart` instead: each
   block stops where it is.
5. Without an answer in 5 seconds a rank is gone: any rank writes `rank_gone`, and each stops where
   it is.

`Stopping` is used by two threads: the main thread asks `may_begin` before each step, and the
thread of `guard` talks with the store.
"""

import json
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Literal

import torch.distributed as dist

AGREE_S = 5.0
"""How long rank 0 waits for the others' steps. Launchers kill a rank 30 s after its SIGTERM."""

Kind = Literal["together", "apart", "rank_gone", "fault"]


@dataclass(frozen=True)
class Stop:
    """Why this rank stops, and after which step."""

    kind: Kind
    """together: all ranks stop after `last_step`. apart: each block stops where it is, as the
    blocks are too far apart. rank_gone: each block stops where it is, as a rank does not answer.
    fault: something is wrong, on this rank or another."""
    reason: str
    last_step: int | None = None
    """The step after which all ranks stop; None where there is no such step."""
    is_mistake: bool = False
    """Whether the reason is something that the user has to mend, such as a damaged file."""


class Stopping:
    """One rank's view of the agreement."""

    def __init__(self) -> None:
        self.step = 0
        """Begun last, from 1."""
        self._changed = threading.Condition()
        self._stop: Stop | None = None
        self._is_decided = False
        self.own_fault: Stop | None = None
        """What this rank has found wrong, whatever the others stop for."""
        self.max_apart_s: float | None = None
        """Seconds that a rank may need to a common last step; more, and blocks stop apart.
        None: they need each other."""
        self._rank, self._world_size = 0, 1
        self._copies: Sequence[int] = [0]
        self._store: dist.Store | None = None
        self._is_written = False
        self._deadline = 0.0
        self._own_last = 0
        self._first: tuple[int, float] | None = None
        """Step begun first, and when."""

    def join(self, rank: int, world_size: int, copies: Sequence[int], store: dist.Store) -> None:
        """Makes stopping a matter of all ranks. copies: those that hold this rank's block."""
        self._rank, self._world_size, self._store = rank, world_size, store
        self._copies = copies

    @property
    def asked(self) -> Stop | None:
        """What this rank has asked for, or heard of."""
        return self._stop

    def may_begin(self, step: int) -> Stop | None:
        """None, or why to stop before this step (from 0).

        Waits for the answer once a stop is asked for.
        """
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
        """Waits until every rank has taken its last step, where a rank could leave without them.

        Returns why not to wait any longer: the blocks stop each where it is.
        """
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

    def ask(self, reason: str, is_fault: bool = False, is_mistake: bool = False) -> None:
        """Makes all ranks stop soon; the first reason counts. is_mistake: see `Stop`."""
        stop = Stop("fault" if is_fault else "together", reason, is_mistake=is_mistake)
        if is_fault or is_mistake:
            self.own_fault = self.own_fault or stop
        if self._store is not None:
            with suppress(RuntimeError):  # the store is gone, which `guard` notices
                told = self._store.compare_set("stop", "", json.dumps(asdict(stop)))
                stop = Stop(**json.loads(told))
        with self._changed:
            self._stop = self._stop or stop
            if self._store is None:
                self._decide("together", self.step)

    def give_up(self, reason: str) -> None:
        """Stops this rank before its next step, whatever the others do: something is wrong."""
        with self._changed:
            self._stop = Stop("fault", reason)
            self._decide("fault")

    def attend(self) -> None:
        """Takes a round of the agreement; the thread that talks with the store calls it often.

        Raises RuntimeError when the store is gone.
        """
        store = self._store
        if store is None or self._is_decided:
            return
        if self._stop is None:
            if not store.check(["stop"]):
                return
            with self._changed:
                self._stop = Stop(**json.loads(store.get("stop")))
        if not self._is_written:
            with self._changed:  # after this the main thread begins no step by itself
                begun = self.step
            store.set(f"begun/{self._rank}", json.dumps([begun, self._step_s()]))
            self._is_written, self._deadline = True, time.monotonic() + AGREE_S
        if self._rank == 0 and not store.check(["last"]):
            if begun := self._begun(range(self._world_size)):
                store.compare_set("last", "", self._answer(begun))
            elif time.monotonic() > self._deadline:
                store.compare_set("last", "", "rank_gone")
        if time.monotonic() > self._deadline + 2:  # rank 0 is gone, or has just answered
            store.compare_set("last", "", "rank_gone")
        if store.check(["last"]):
            answer = store.get("last").decode()
            if not answer.isdecimal() and (own := self._begun(self._copies)):
                self._own_last = max(step for step, _ in own)  # copies of a block go on together
            with self._changed:
                if answer.isdecimal():
                    self._decide("together", int(answer))
                else:
                    self._decide("apart" if answer == "apart" else "rank_gone")

    def _begun(self, ranks: Sequence[int]) -> list[tuple[int, float]]:
        """(step begun last, seconds for a step) of these ranks; empty until all have written."""
        assert self._store is not None
        keys = [f"begun/{rank}" for rank in ranks]
        if not self._store.check(keys):
            return []
        return [tuple(json.loads(told)) for told in self._store.multi_get(keys)]

    def _answer(self, begun: Sequence[tuple[int, float]]) -> str:
        """The last step of all ranks, or `apart`."""
        foremost = max(step for step, _ in begun)
        needed_s = max((foremost - step) * step_s for step, step_s in begun)
        if self.max_apart_s is None or needed_s <= self.max_apart_s:
            return str(foremost)
        return "apart"

    def _step_s(self) -> float:
        """Mean time of a step."""
        if self._first is None:
            return 0.0
        step, since = self._first
        return (time.monotonic() - since) / max(1, self.step - step)

    def _decide(self, kind: Kind, last_step: int | None = None) -> None:
        """Ends the agreement; a fault stays one, whatever the others can do."""
        assert self._stop is not None
        kind = "fault" if self._stop.kind == "fault" else kind
        self._stop = replace(self._stop, kind=kind, last_step=last_step)
        self._is_decided = True
        self._changed.notify_all()
