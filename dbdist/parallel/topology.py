"""Which rank does what: the map rank <-> (block, replica, coordinator) and the process groups.

Built once from the launcher's environment and passed around; nothing else reads RANK or WORLD_SIZE.
World = blocks x replicas, plus one with a dedicated coordinator; rank 0 is always the coordinator.
Ranks are laid out block by block, so that the copies of a block, which talk most, are neighbours.
"""

import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist

from dbdist.errors import ConfigError, TopologyError, UserError
from dbdist.parallel.meter import Meter


@dataclass(frozen=True)
class Launch:
    """What the launcher told this process; one process of one when there is no launcher."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    attempt: int = 0

    @staticmethod
    def from_environment() -> "Launch":
        """Raises TopologyError for a launcher whose variables are incomplete."""
        environment = os.environ
        if "RANK" not in environment and "WORLD_SIZE" not in environment:
            return Launch(0, 1, 0, 1)
        try:
            world_size = int(environment["WORLD_SIZE"])
            return Launch(
                int(environment["RANK"]),
                world_size,
                int(environment.get("LOCAL_RANK", "0")),
                int(environment.get("LOCAL_WORLD_SIZE", environment.get("LOCAL_SIZE", world_size))),
                int(environment.get("TORCHELASTIC_RESTART_COUNT", "0")),
            )
        except (KeyError, ValueError) as error:
            raise TopologyError(
                f"the launcher's environment is incomplete ({error}); start with torchrun, or "
                "unset RANK and WORLD_SIZE"
            ) from None

    def store(self, timeout_s: float) -> dist.Store:
        """The launcher's key-value store, under a prefix of this attempt: a restarted world must
        not read the addresses of the one before."""
        store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout_s)))
        return dist.PrefixStore(f"attempt{self.attempt}", store)

    def leave_together(self, seconds: float = 5.0) -> None:
        """Waits until every rank is about to leave because of a user's mistake; gives up after
        `seconds`. The launcher would end the others when the first has left: instead they all leave
        by themselves, each with its message and exit code."""
        if self.world_size == 1:
            return
        with suppress(ValueError):  # only a main thread may
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        deadline = time.monotonic() + seconds
        with suppress(RuntimeError, ValueError, OSError):  # the store is gone: so are the others
            store = self.store(seconds)
            store.add("leaving", 1)
            while store.add("leaving", 0) < self.world_size and time.monotonic() < deadline:
                time.sleep(0.02)


@dataclass(frozen=True)
class Layout:
    """The arithmetic of the placement, without any process.

    One block with R replicas also describes data parallelism of a whole model, and one block
    without replicas a single process.
    """

    num_blocks: int
    num_replicas: int = 1
    coordinator: Literal["colocated", "dedicated"] = "colocated"

    @property
    def offset(self) -> int:
        """Ranks before the first block's: 1 with a dedicated coordinator."""
        return int(self.coordinator == "dedicated")

    @property
    def world_size(self) -> int:
        return self.num_blocks * self.num_replicas + self.offset

    def rank_of(self, block: int, replica: int) -> int:
        return self.offset + block * self.num_replicas + replica

    def place_of(self, rank: int) -> tuple[int, int] | None:
        """(block, replica) of a rank; None for a dedicated coordinator."""
        return None if rank < self.offset else divmod(rank - self.offset, self.num_replicas)

    def chain(self, replica: int) -> list[int]:
        """The ranks that hold blocks 0, 1, … of one replica."""
        return [self.rank_of(block, replica) for block in range(self.num_blocks)]

    def replicas(self, block: int) -> list[int]:
        """The ranks that hold copies of one block; the first is its leader."""
        return [self.rank_of(block, replica) for replica in range(self.num_replicas)]

    def check(self, world_size: int) -> None:
        """Raises TopologyError, saying which number of processes fits, for a world of another
        size."""
        if world_size == self.world_size:
            return
        blocks, replicas = self.num_blocks, self.num_replicas
        extra = " + 1 dedicated coordinator" if self.offset else ""
        fits, rest = divmod(world_size - self.offset, blocks)
        other = f", or set parallel.replicas {fits}" if fits > 0 and rest == 0 else ""
        raise TopologyError(
            f"{blocks} blocks x {replicas} replica{'s'[: replicas > 1]}{extra} need "
            f"{self.world_size} processes, "
            f"{world_size} {'was' if world_size == 1 else 'were'} started; start {self.world_size} "
            f"(torchrun --nproc_per_node={self.world_size}){other}"
        )


@dataclass(frozen=True)
class Topology:
    """This process's place in the layout, its device and its process groups."""

    layout: Layout
    rank: int = 0
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    store: dist.Store | None = None
    p2p_group: dist.ProcessGroup | None = None
    """All ranks, for point-to-point messages alone: torch's collective checks count calls by
    group."""
    replica_group: dist.ProcessGroup | None = None
    """The copies of this rank's block; None when there is one copy."""
    uses_nccl: bool = False
    meter: Meter = field(default_factory=Meter)

    @property
    def place(self) -> tuple[int, int] | None:
        return self.layout.place_of(self.rank)

    @property
    def block(self) -> int | None:
        """The block this rank owns; None for a dedicated coordinator."""
        return self.place[0] if self.place else None

    @property
    def replica(self) -> int:
        return self.place[1] if self.place else 0

    @property
    def is_coordinator(self) -> bool:
        return self.rank == 0

    @property
    def is_leader(self) -> bool:
        """Whether this rank speaks for its block (its first replica)."""
        return self.place is not None and self.replica == 0

    @property
    def world_size(self) -> int:
        return self.layout.world_size

    @property
    def wire_device(self) -> torch.device:
        """Where tensors must lie to be sent: on the GPU for NCCL, in host memory for gloo."""
        return self.device if self.uses_nccl or self.store is None else torch.device("cpu")

    @property
    def name(self) -> str:
        """For log lines: `r3 b1`."""
        return f"r{self.rank} " + ("coordinator" if self.block is None else f"b{self.block}")

    def barrier(self) -> None:
        """Waits for all ranks. A sum over host memory: no GPU has to be idle for it."""
        if self.store is not None:
            dist.all_reduce(torch.zeros(1))

    @contextmanager
    def agree(self, what: str | None = None) -> Iterator[None]:
        """A step of set-up that may fail on some ranks: if it does, all leave it with the same
        UserError. Collective.

        what: named in the error together with the rank, where only some ranks fail; None for what
        one rank does for all."""
        error: UserError | None = None
        try:
            yield
        except UserError as caught:
            error = caught
        if self.store is None:
            if error is not None:
                raise error
            return
        told: list[tuple[type[UserError], str] | None] = [None] * self.world_size
        dist.all_gather_object(told, None if error is None else (type(error), str(error)))
        failures = {rank: failure for rank, failure in enumerate(told) if failure is not None}
        if failures:
            rank, (kind, message) = next(iter(failures.items()))
            same = (
                len(failures) == self.world_size
                and len({text for _, text in failures.values()}) == 1
            )
            raise kind(message if same or what is None else f"rank {rank}, {what}: {message}")

    def gather(self, value: object) -> list[object]:
        """Every rank's value, in rank order, on every rank. For small control data only."""
        if self.store is None:
            return [value]
        values: list[object] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def close(self) -> None:
        if self.store is not None and dist.is_initialized():
            dist.destroy_process_group()


def choose_device(wanted: Literal["auto", "cpu", "cuda"], local_rank: int) -> torch.device:
    """This rank's device: its own GPU among the visible ones, shared where there are fewer.
    Raises ConfigError for cuda without a GPU."""
    has_gpu = torch.cuda.is_available()
    if wanted == "cuda" and not has_gpu:
        raise ConfigError("device is cuda, but torch finds no GPU here; use device auto or cpu")
    if wanted == "cpu" or not has_gpu:
        return torch.device("cpu")
    return torch.device("cuda", local_rank % torch.cuda.device_count())


def build_topology(
    layout: Layout,
    launch: Launch,
    wanted: Literal["auto", "cpu", "cuda"] = "auto",
    timeout_s: float = 600.0,
    store: dist.Store | None = None,
) -> Topology:
    """Joins the process group and makes every subgroup. Collective.

    store: where the ranks meet; the launcher's when None. Raises TopologyError when the number of
    processes does not fit the layout, before anything is joined.
    """
    layout.check(launch.world_size)
    device = choose_device(wanted, launch.local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if launch.world_size == 1:
        return Topology(layout, device=device)
    store = store or launch.store(timeout_s)
    has_nccl = device.type == "cuda" and dist.is_nccl_available()
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if has_nccl else "gloo",
        store=dist.PrefixStore("group", store),
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=timedelta(seconds=timeout_s),
    )
    uses_nccl = _every_rank_has_its_own_gpu(device if has_nccl else None, launch.world_size)
    backend = None if uses_nccl else "gloo"
    p2p_group = _group(list(range(launch.world_size)), launch.rank, backend)
    replica_group = None
    if layout.num_replicas > 1:
        # Every rank makes every group, in the same order.
        for block in range(layout.num_blocks):
            group = _group(layout.replicas(block), launch.rank, backend)
            replica_group = group or replica_group
    return Topology(
        layout,
        launch.rank,
        launch.local_rank,
        device,
        store,
        p2p_group,
        replica_group,
        uses_nccl,
    )


def _every_rank_has_its_own_gpu(device: torch.device | None, world_size: int) -> bool:
    """Whether NCCL can connect all ranks: it refuses two on one GPU. The GPUs' own names tell, not
    their number: one launcher shows each process its GPU, another all of them. Collective."""
    own = None
    if device is not None:
        own = f"{socket.gethostname()}/{torch.cuda.get_device_properties(device).uuid}"
    gpus: list[str | None] = [None] * world_size
    dist.all_gather_object(gpus, own)
    return None not in gpus and len(set(gpus)) == world_size


def _group(ranks: list[int], rank: int, backend: str | None) -> dist.ProcessGroup | None:
    """A process group of these ranks, None on others; every rank makes it. Collective."""
    group = dist.new_group(ranks, backend=backend)
    return group if rank in ranks and isinstance(group, dist.ProcessGroup) else None
