"""Which rank does what: the map rank <-> (block, replica, coordinator), the process groups.

Built once from what the launcher said (`launch`), and passed around. World = blocks x replicas,
plus one with a dedicated coordinator; rank 0 is always the coordinator. The copies of a block,
which talk most, are on one node where they fit.
"""

# What torch leaves untyped:
# pyright: reportDeprecated=false, reportPrivateImportUsage=false, reportUnknownMemberType=false

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist

from dbdist.errors import ConfigError, UserError
from dbdist.parallel.agreement import Facts, check_agreement
from dbdist.parallel.health.neighbours import own_address
from dbdist.parallel.health.watch import Company, Watch
from dbdist.parallel.launch import Launch
from dbdist.parallel.layout import Layout
from dbdist.parallel.meter import Meter

T = TypeVar("T")


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
    watch: Watch = field(default_factory=Watch)

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
    def copies(self) -> list[int]:
        """The ranks that hold this rank's block; itself for a dedicated coordinator."""
        return [self.rank] if self.block is None else self.layout.replicas(self.block)

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

    def barrier(self) -> None:
        """Waits for all ranks. A sum over host memory: no GPU has to be idle for it."""
        if self.store is not None:
            with self.watch.waiting():
                dist.all_reduce(torch.zeros(1))

    @contextmanager
    def agree(self, what: str | None = None) -> Iterator[None]:
        """Makes all ranks leave a step of set-up with the same UserError if some fail. Collective.

        what: named in the error together with the rank, where only some ranks fail; None for what
        one rank does for all.
        """
        error: UserError | None = None
        self.watch.at(what or "set-up")
        try:
            yield
        except UserError as caught:
            error = caught
        if self.store is None:
            if error is not None:
                raise error
            return
        told: list[Any] = self.gather(None if error is None else (type(error), str(error)))
        self.watch.at("set-up")
        failures = {rank: failure for rank, failure in enumerate(told) if failure is not None}
        if failures:
            rank, (kind, message) = next(iter(failures.items()))
            same = (
                len(failures) == self.world_size
                and len({text for _, text in failures.values()}) == 1
            )
            raise kind(message if same or what is None else f"rank {rank}, {what}: {message}")

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in rank order, on every rank. For small control data only."""
        if self.store is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        with self.watch.waiting():
            dist.all_gather_object(values, value)
        return values

    def check_agreement(self, facts: Facts) -> None:
        """Raises TopologyError, on all ranks, where facts of several of them differ. Collective."""
        if self.store is not None:
            with self.watch.waiting():
                check_agreement(facts, self.world_size)

    def own_group(self) -> dist.ProcessGroup:
        """The copies of this rank's block, even if it is the only one."""
        return self.replica_group or self.group_of_one()

    def group_of_one(self) -> dist.ProcessGroup:
        """A new group of this rank alone, for engines that know nothing but groups."""
        backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
        if not dist.is_initialized():
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        if not self.uses_nccl and self.store is not None:
            backend = "gloo"
        group = dist.new_group([self.rank], backend=backend, use_local_synchronization=True)
        assert isinstance(group, dist.ProcessGroup)
        return group

    def tell_environment(self) -> None:
        """For DeepSpeed, which reads device and local rank there, launcher or not."""
        os.environ.setdefault("DS_ACCELERATOR", self.device.type)
        os.environ.setdefault("LOCAL_RANK", str(self.local_rank))

    def start_watch(
        self,
        timeout_s: float,
        say: Callable[[str], None],
        blocks: Sequence[int] | None = None,
        stack_folder: Path | None = None,
    ) -> None:
        """Begins to look after the other ranks. Collective.

        say: shows a line, from any thread. blocks: what the layout's blocks are called; None: by
        their number. stack_folder: where a stuck rank leaves its stack.
        """
        names = [self._name_of(rank, blocks) for rank in range(self.world_size)]
        company = Company(self.rank, names, self.gather(own_address()), self.copies)
        stack = stack_folder and stack_folder / f"rank-{self.rank}.txt"
        self.watch.start(company, self.store, timeout_s, say, stack)

    def _name_of(self, rank: int, blocks: Sequence[int] | None) -> str:
        """`rank 3 (block 1, replica 0)`."""
        place, what = self.layout.place_of(rank), "coordinator"
        if place is not None:
            what = f"block {blocks[place[0]] if blocks else place[0]}"
            what += f", replica {place[1]}" * (self.layout.num_replicas > 1)
        return f"rank {rank} ({what})"

    def close(self) -> None:
        self.watch.close()
        if dist.is_initialized():
            dist.destroy_process_group()


def choose_device(wanted: Literal["auto", "cpu", "cuda"], local_rank: int) -> torch.device:
    """Returns this rank's device.

    That is its own GPU among the visible ones, shared where there are fewer. Raises ConfigError for
    cuda without a GPU.
    """
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
    facts: Facts | None = None,
) -> Topology:
    """Joins the process group, learns every rank's node and makes every subgroup. Collective.

    timeout_s: to meet; collectives fail after twice as long. store: where the ranks meet; the
    launcher's when None. facts: what all ranks must have alike.
    Raises TopologyError when they have not, or when the number of processes does not fit the
    layout.
    """
    if facts is None or launch.world_size == 1:
        layout.check(launch.world_size)
    device = choose_device(wanted, launch.local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if launch.world_size == 1:
        return Topology(layout, device=device)
    # Twice the watch's timeout, so the watch names the stuck rank before a collective fails.
    timeout = timedelta(seconds=2 * timeout_s)
    has_nccl = device.type == "cuda" and dist.is_nccl_available()
    store = _meet(launch, store or launch.store(timeout_s), has_nccl, timeout)
    if facts is not None:
        check_agreement(facts, launch.world_size)  # first: else ranks may go different ways
        layout.check(launch.world_size)
    layout = replace(layout, nodes=_nodes(launch))
    uses_nccl = _every_rank_has_its_own_gpu(device if has_nccl else None, launch.world_size)
    backend = None if uses_nccl else "gloo"
    everybody, copies = _groups(layout, launch.rank, backend, timeout)
    local = launch.local_rank
    return Topology(layout, launch.rank, local, device, store, everybody, copies, uses_nccl)


def _meet(launch: Launch, store: dist.Store, has_nccl: bool, timeout: timedelta) -> dist.Store:
    """Joins the process group of all ranks, which meet in the store. Collective."""
    if launch.fills_its_node:
        _keep_to_the_loopback_interface()
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if has_nccl else "gloo",
        store=dist.PrefixStore("group", store),
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=timeout,
    )
    return store


def _nodes(launch: Launch) -> tuple[int, ...]:
    """The node of every rank. Collective."""
    nodes = [launch.node] * launch.world_size
    dist.all_gather_object(nodes, launch.node)
    return tuple(nodes)


def _groups(
    layout: Layout, rank: int, backend: str | None, timeout: timedelta
) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
    """(all ranks for point-to-point messages, the copies of this rank's block). Collective."""
    everybody = _group(list(range(layout.world_size)), rank, backend, timeout)
    copies = None
    if layout.num_replicas > 1:
        # Every rank makes every group, in the same order.
        for block in range(layout.num_blocks):
            group = _group(layout.replicas(block), rank, backend, timeout)
            copies = group or copies
    return everybody, copies


def _keep_to_the_loopback_interface() -> None:
    """For gloo, which else listens on the host's own address, unless the user names another."""
    names = {name for _, name in socket.if_nameindex()} & {"lo", "lo0"}  # Linux; macOS and BSD
    if names:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", names.pop())


def _every_rank_has_its_own_gpu(device: torch.device | None, world_size: int) -> bool:
    """Says whether NCCL can connect all ranks, as it refuses two on one GPU. Collective.

    The GPUs' own names decide, not their number: one launcher shows each process its GPU, another
    all of them.
    """
    own = None
    if device is not None:
        own = f"{socket.gethostname()}/{torch.cuda.get_device_properties(device).uuid}"
    gpus: list[str | None] = [None] * world_size
    dist.all_gather_object(gpus, own)
    return None not in gpus and len(set(gpus)) == world_size


def _group(
    ranks: list[int], rank: int, backend: str | None, timeout: timedelta
) -> dist.ProcessGroup | None:
    """A process group of these ranks, None on others; every rank makes it. Collective."""
    group = dist.new_group(ranks, timeout=timeout, backend=backend)
    return group if rank in ranks and isinstance(group, dist.ProcessGroup) else None
