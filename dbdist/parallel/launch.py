"""What the launcher says to this process: its rank, its node, where all ranks meet.

torchrun, accelerate (it runs torchrun's agent) and the DeepSpeed launcher say the same under
different names: this is the one place that reads them. torch is imported where ranks meet, so that
a command that needs none starts at once.
"""

import os
import shlex
import signal
import sys
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from dbdist.errors import TopologyError

if TYPE_CHECKING:
    import torch.distributed as dist


@dataclass(frozen=True)
class Launch:
    """What the launcher told this process; one process of one when there is no launcher."""

    rank: int
    world_size: int
    local_rank: int
    """Place among the ranks of this node; it picks the GPU."""
    local_world_size: int
    attempt: int = 0
    """Restarts so far, as this node counts them: torchrun's agents count their own ranks' failures
    alone."""
    node: int = 0
    fills_its_node: bool = False
    """Whether the launcher said that all ranks are here."""

    @staticmethod
    def from_environment() -> "Launch":
        """Reads the launcher's variables.

        Raises TopologyError for variables that are incomplete or contradict each other, and for
        many processes of a launcher that numbers none.
        """
        if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
            for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
                if (count := os.environ.get(name, "1")) != "1":
                    raise TopologyError(
                        f"{count} processes were started without RANK and WORLD_SIZE ({name}); let "
                        "srun or mpirun start one torchrun on each node, see launch/README.md"
                    )
            return Launch(0, 1, 0, 1)
        rank, world_size = _number("RANK"), _number("WORLD_SIZE")
        local_rank = _number("LOCAL_RANK", default=-1)
        # LOCAL_SIZE and CROSS_RANK are the DeepSpeed launcher's; without either there is one node.
        local_world_size = _number("LOCAL_WORLD_SIZE", "LOCAL_SIZE", default=-1)
        fills_its_node = local_world_size == world_size
        if local_world_size < 0:
            if local_rank not in (-1, rank):
                raise TopologyError(
                    f"rank {rank} is local rank {local_rank}, but the environment does not say how "
                    "many ranks its node has; set LOCAL_WORLD_SIZE, or start with torchrun"
                )
            local_world_size = world_size
        if local_rank < 0:
            local_rank = rank % max(local_world_size, 1)
        if not (rank < world_size and local_rank < local_world_size <= world_size):
            raise TopologyError(
                f"the launcher's environment contradicts itself: rank {rank} of {world_size}, "
                f"{local_rank} of {local_world_size} on its node; start with torchrun"
            )
        if world_size > 1:
            _variable("MASTER_ADDR")
            _number("MASTER_PORT")
        return Launch(
            rank,
            world_size,
            local_rank,
            local_world_size,
            _number("TORCHELASTIC_RESTART_COUNT", default=0),
            _number("GROUP_RANK", "CROSS_RANK", default=rank // local_world_size),
            fills_its_node,
        )

    def store(self, timeout_s: float) -> "dist.Store":
        """Returns the launcher's key-value store, under a prefix that only this start has.

        A restarted world must not read the addresses of the one before. Raises TopologyError when
        the ranks have not met in time; rank 0 says who is missing.
        """
        import torch.distributed as dist

        try:
            store = self._launchers_store(timeout_s)
            return dist.PrefixStore(self._meet(store, timeout_s), store)
        except dist.DistError as error:
            address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise TopologyError(
                f"rank {self.rank} does not meet the other ranks at {address}: "
                f"{str(error).splitlines()[0]}"
            ) from None

    def _launchers_store(self, timeout_s: float) -> "dist.Store":
        import torch.distributed as dist

        store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout_s)))
        return store

    def _meet(self, store: "dist.Store", timeout_s: float) -> str:
        """Returns a name for this start, the same on every rank.

        Rank 0 invents it and sends it in answer to each rank's own new name; what an earlier start
        has left in the store answers nobody.
        """
        name = uuid.uuid4().hex
        if self.rank > 0:
            store.set(f"arrived/{self.rank}", name)
            start = store.get(f"answer/{name}").decode()
            store.set(f"{start}/{self.rank}", "here")
            return start
        deadline = time.monotonic() + timeout_s
        missing = set(range(1, self.world_size))
        while missing:
            for rank in sorted(missing):
                if store.check([f"{name}/{rank}"]):
                    missing.remove(rank)
                elif store.check([f"arrived/{rank}"]):
                    arrived = store.get(f"arrived/{rank}").decode()
                    store.set(f"answer/{arrived}", name)
            if time.monotonic() > deadline:
                raise TopologyError(
                    f"rank{'s'[: len(missing) > 1]} {', '.join(map(str, sorted(missing)))} of "
                    f"{self.world_size} did not come within {timeout_s:g} s (parallel.timeout_s)"
                )
            time.sleep(0.01)
        return name

    @staticmethod
    def command(module: str) -> str:
        """What to type to start this process, or its launcher where that is known, once more.

        module: run by `python -m` where this process is not the `dbdist` command.
        """
        with suppress(OSError):
            parent = Path(f"/proc/{os.getppid()}/cmdline").read_text(errors="surrogateescape")
            if launcher := _launcher(parent.split("\0")[:-1]):
                return shlex.join(launcher)
        script, *options = sys.argv
        name = Path(script).name
        if name == "dbdist":
            own = [name]
        elif name in (f"{module.rpartition('.')[2]}.py", "-m"):
            own = ["python", "-m", module]
        else:  # Python code of a user, which calls dbdist.train(…)
            own = ["python", script]
        others = "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"
        return ("the launcher's command with: " if others else "") + shlex.join([*own, *options])

    def leave_together(self, seconds: float = 5.0) -> None:
        """Waits until every rank is about to leave after a user's mistake, or `seconds` are over.

        The launcher would end the others when the first has left: instead they all leave by
        themselves, each with its message and exit code.
        """
        if self.world_size == 1:
            return
        import torch.distributed as dist

        with suppress(ValueError):  # only a main thread may
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        deadline = time.monotonic() + seconds
        with suppress(RuntimeError, ValueError, OSError):  # the store is gone: so are the others
            store = dist.PrefixStore(f"leaving{self.attempt}", self._launchers_store(seconds))
            # Rank 0 goes last: without torchrun's agent it holds the store.
            for key, waits in (("leaving", True), ("left", self.rank == 0)):
                store.add(key, 1)
                while waits and store.add(key, 0) < self.world_size and time.monotonic() < deadline:
                    time.sleep(0.02)


def current_launch() -> Launch:
    """This process among those of its launcher; a process alone where that cannot be known."""
    try:
        return Launch.from_environment()
    except TopologyError:
        return Launch(0, 1, 0, 1)


def error_file() -> str | None:
    """Where the launcher wants to read why this process failed, if it does."""
    return os.environ.get("TORCHELASTIC_ERROR_FILE") or None


LAUNCHERS = {
    "torchrun": ["torchrun"],
    "torch.distributed.run": ["torchrun"],
    "accelerate": ["accelerate"],
    "accelerate.commands.launch": ["accelerate", "launch"],
}


def _launcher(words: list[str]) -> list[str]:
    """The command of a launcher among the first words of a process; nothing for another program."""
    for start, word in enumerate(words[:3]):
        if (command := LAUNCHERS.get(Path(word).name)) is not None:
            return [*command, *words[start + 1 :]]
    return []


def _variable(*names: str) -> str:
    """The first of these environment variables that is set. Raises TopologyError without any."""
    for name in names:
        if value := os.environ.get(name):
            return value
    raise TopologyError(
        f"the launcher's environment is incomplete: {names[0]} is missing; start with torchrun, or "
        "unset RANK and WORLD_SIZE"
    )


def _number(*names: str, default: int | None = None) -> int:
    """The same as a number, 0 or more; the default where none is set."""
    if default is not None and not any(os.environ.get(name) for name in names):
        return default
    value = _variable(*names)
    if not value.isdecimal():
        raise TopologyError(
            f"the launcher's environment says {names[0]} is {value!r}, which is no number of ranks"
        )
    return int(value)
