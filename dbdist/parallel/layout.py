"""The arithmetic of placing blocks and replicas on ranks, without any process."""

from collections import deque
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Literal

from dbdist.config.config import Config
from dbdist.errors import ConfigError, TopologyError


@dataclass(frozen=True)
class Layout:
    """The arithmetic of the placement, without any process.

    One block with R replicas also describes data parallelism of a whole model, and one block
    without replicas a single process. Block after block takes its ranks on the first node that has
    enough free ones; blocks that fit on none share what is left, node after node. On one node that
    is block by block. Rank 0 is the coordinator: alone, or as the first copy of block 0.
    """

    num_blocks: int
    num_replicas: int = 1
    coordinator: Literal["colocated", "dedicated", "sharded"] = "colocated"
    nodes: tuple[int, ...] | None = None
    """The node of each rank; None: all are on one."""

    @property
    def offset(self) -> int:
        """Ranks before the first block's: 1 with a dedicated coordinator."""
        return int(self.coordinator == "dedicated")

    @property
    def world_size(self) -> int:
        return self.num_blocks * self.num_replicas + self.offset

    @property
    def needs_coordinator(self) -> bool:
        """Whether shared modules travel: there are several blocks, or a rank without a block."""
        return self.num_blocks > 1 or self.offset > 0

    def rank_of(self, block: int, replica: int) -> int:
        return self._ranks[block][replica]

    def place_of(self, rank: int) -> tuple[int, int] | None:
        """(block, replica) of a rank; None for a dedicated coordinator."""
        return self._places[rank]

    def chain(self, replica: int) -> list[int]:
        """The ranks that hold blocks 0, 1, … of one replica."""
        return [ranks[replica] for ranks in self._ranks]

    def replicas(self, block: int) -> list[int]:
        """The ranks that hold copies of one block, ascending; the first is its leader."""
        return list(self._ranks[block])

    def nodes_of(self, block: int) -> list[int]:
        """The nodes that hold copies of one block."""
        return sorted({self.nodes[rank] if self.nodes else 0 for rank in self._ranks[block]})

    @property
    def straddling(self) -> list[int]:
        """The blocks whose copies are on several nodes."""
        return [block for block in range(self.num_blocks) if len(self.nodes_of(block)) > 1]

    @cached_property
    def _ranks(self) -> tuple[tuple[int, ...], ...]:
        """The ranks of each block."""
        nodes = self.nodes or (0,) * self.world_size
        assert len(nodes) == self.world_size, f"{len(nodes)} nodes of {self.world_size} ranks"
        free: dict[int, list[int]] = {node: [] for node in nodes}  # rank 0's node first
        for rank in range(self.offset, self.world_size):
            free[nodes[rank]].append(rank)
        # Rank 0 has to hold block 0: where its node is too small for that, block 0 straddles.
        is_too_small = not self.offset and len(free[nodes[0]]) < self.num_replicas
        whole = deque(range(int(is_too_small), self.num_blocks))
        ranks_of: dict[int, tuple[int, ...]] = {}
        for ranks in free.values():
            while whole and len(ranks) >= self.num_replicas:
                ranks_of[whole.popleft()] = tuple(ranks[: self.num_replicas])
                del ranks[: self.num_replicas]
        rest = iter([rank for ranks in free.values() for rank in ranks])
        return tuple(
            ranks_of.get(block) or tuple(sorted(islice(rest, self.num_replicas)))
            for block in range(self.num_blocks)
        )

    @cached_property
    def _places(self) -> tuple[tuple[int, int] | None, ...]:
        """(block, replica) of each rank."""
        places: list[tuple[int, int] | None] = [None] * self.world_size
        for block, ranks in enumerate(self._ranks):
            for replica, rank in enumerate(ranks):
                places[rank] = block, replica
        return tuple(places)

    def check(self, world_size: int) -> None:
        """Raises TopologyError, naming the number that fits, for a world of another size."""
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


def layout_of(config: Config, world_size: int) -> Layout:
    """Returns the layout that this configuration wants.

    end_to_end takes every process as a replica. Raises TopologyError or ConfigError when the mode
    cannot use this many.
    """
    if config.mode == "block_parallel":
        num_blocks = len(config.trained_blocks or range(config.num_blocks))
        return Layout(num_blocks, config.parallel.replicas, config.parallel.coordinator)
    if config.mode == "sequential" and world_size > 1:
        raise TopologyError(
            f"mode sequential trains in one process, {world_size} were started; "
            "start it without torchrun, or use mode block_parallel"
        )
    parts = world_size * config.train.accumulation_steps
    if config.train.batch_size % parts:
        raise ConfigError(
            f"train.batch_size {config.train.batch_size} is not a multiple of processes x "
            f"train.accumulation_steps = {parts}"
        )
    return Layout(1, world_size)
