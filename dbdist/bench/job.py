"""A launcher on this machine with all processes that descend from it, and signals to them."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from dbdist.bench.processes import parent_of, writers_to

Kind = Literal["kill", "hang"]
SIGNALS: dict[Kind, signal.Signals] = {"kill": signal.SIGKILL, "hang": signal.SIGSTOP}


@runtime_checkable
class Process(Protocol):
    """The methods of subprocess.Popen that a job needs."""

    pid: int

    @property
    def returncode(self) -> int | None: ...
    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def terminate(self) -> None: ...


def torchrun(
    num_ranks: int, *words: object, restarts: int = 0, rendezvous: str = "--rdzv-backend=loopback"
) -> list[str]:
    """The command that starts `words` (`-m MODULE` or a script, and options) on every rank."""
    launcher = [sys.executable, "-m", "torch.distributed.run", rendezvous]
    counts = [f"--nproc_per_node={num_ranks}", f"--max-restarts={restarts}"]
    return [*launcher, *counts, *map(str, words)]


class Job:
    """A command whose output goes to a file.

    The processes that descend from it are those that write to this file: torchrun gives its ranks
    sessions of their own, so no process group has them all.
    """

    def __init__(self, process: Process, log: Path) -> None:
        self.process = process
        self.log = log

    def printed(self) -> str:
        """Everything so far."""
        return self.log.read_text(errors="replace")

    def processes(self) -> set[int]:
        """Those that run now."""
        return set(writers_to(self.log))

    def ranks(self, start: int | None = None) -> dict[int, int]:
        """{rank: pid} of those that run now, without the processes that they have started.

        start: only those that the launcher started for this time, from 0.
        """
        ranks = {pid: v for pid, v in writers_to(self.log).items() if "RANK" in v}
        return {
            int(variables["RANK"]): pid
            for pid, variables in ranks.items()
            if parent_of(pid) not in ranks
            if start is None or variables.get("TORCHELASTIC_RESTART_COUNT") == str(start)
        }

    def strike(self, rank: int, kind: Kind = "kill") -> None:
        """Kills or stops this rank."""
        send(self.ranks()[rank], SIGNALS[kind])

    def stop(self, timeout_s: float) -> int | None:
        """Ends the launcher as `kill` does. Returns its exit code; None if it is still there."""
        for pid in self.processes():
            send(pid, signal.SIGCONT)
        self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout_s)
        return self.process.poll()

    def end(self, patience_s: float = 0.0) -> int:
        """Waits for the processes to end, then kills the rest. Returns how many those were."""
        deadline = time.monotonic() + patience_s
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.02)
            self.process.poll()
        while found := self.processes():
            for pid in found:
                send(pid, signal.SIGKILL)
            time.sleep(0.02)
            self.process.poll()  # no zombie of ours stays
        return len(left)


def send(pid: int, number: signal.Signals) -> None:
    """Sends a signal to a process, if it is still there."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)
