"""The arithmetic of `dbdist plan`: where blocks go on a cluster, and what their ranks hold."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from math import ceil
from typing import Any

import torch

from dbdist.build import Setup, build_setup
from dbdist.config.config import Config
from dbdist.data.sources import dataset_spec
from dbdist.errors import ConfigError, TopologyError
from dbdist.models.base import build_shared, count_parameters
from dbdist.parallel.engines import split
from dbdist.parallel.engines.zero_settings import settings
from dbdist.parallel.layout import Layout, layout_of
from dbdist.parallel.shared_sync import copies_held

FLOAT_BYTES = 4  # of weights, gradients and optimizer, with train.precision bf16 too


@dataclass(frozen=True)
class Cluster:
    """N nodes of G GPUs. Raises ConfigError when there are none."""

    num_nodes: int
    gpus_per_node: int

    def __post_init__(self) -> None:
        for option, value in (("nodes", self.num_nodes), ("gpus-per-node", self.gpus_per_node)):
            if value < 1:
                raise ConfigError(f"--{option} is {value}; it must be at least 1")

    @property
    def num_gpus(self) -> int:
        return self.num_nodes * self.gpus_per_node

    def __str__(self) -> str:
        return f"{counted(self.num_nodes, 'node')} x {counted(self.gpus_per_node, 'GPU')}"


def place(config: Config, cluster: Cluster) -> Layout:
    """Returns the layout on these nodes that has as few straddling blocks as possible.

    Among the ways to that, as many ranks on every node where possible, and on few nodes. Raises
    TopologyError or ConfigError when there are too few GPUs or the mode has no layout.
    """
    if config.mode == "sequential":
        raise TopologyError(
            "mode sequential trains in one process: there is nothing to place; use block_parallel"
        )
    layout = layout_of(config, cluster.num_gpus)
    if layout.world_size > cluster.num_gpus:
        ways = [f"use --nodes {ceil(layout.world_size / cluster.gpus_per_node)}"]
        if replicas := fewer_replicas(config, cluster):
            ways.append(f"set parallel.replicas {replicas}")
        raise TopologyError(
            f"{who(layout)} need {layout.world_size} GPUs, {cluster} are {cluster.num_gpus}; "
            + " or ".join(ways)
        )
    return min(
        (_on_nodes(layout, counts) for counts in _spreads(layout, cluster)),
        key=lambda layout: (
            len(layout.straddling),
            len(set(ranks_per_node(layout))) > 1,
            len(ranks_per_node(layout)),
        ),
    )


def _spreads(layout: Layout, cluster: Cluster) -> Iterator[list[int]]:
    """Yields numbers of ranks for each node.

    Either whole blocks on each, as many as fit, and what is left over wherever there is room; or
    equal numbers.
    """
    size, gpus, left = layout.num_replicas, cluster.gpus_per_node, layout.world_size
    counts = []
    for node in range(cluster.num_nodes):
        alone = layout.offset if node == 0 else 0
        counts.append(min(left, alone + (gpus - alone) // size * size))
        left -= counts[-1]
    for node, count in enumerate(counts):
        counts[node] += min(left, gpus - count)
        left -= counts[node] - count
    yield [count for count in counts if count]
    for num_nodes in range(1, cluster.num_nodes + 1):
        count, rest = divmod(layout.world_size, num_nodes)
        if rest == 0 and count <= gpus:
            yield [count] * num_nodes


def _on_nodes(layout: Layout, counts: list[int]) -> Layout:
    nodes = (node for node, count in enumerate(counts) for _ in range(count))
    return replace(layout, nodes=tuple(nodes))


def ranks_per_node(layout: Layout) -> list[int]:
    return [len(list(ranks)) for _, ranks in groupby(layout.nodes or ())]


def fewer_replicas(config: Config, cluster: Cluster, *, whole: bool = False) -> int | None:
    """The largest smaller number of replicas that fits these GPUs; whole: and straddles nowhere."""
    for replicas in range(config.parallel.replicas - 1, 0, -1):
        fewer = with_replicas(config, replicas)
        if fewer is not None and layout_of(fewer, 1).world_size <= cluster.num_gpus:
            if not whole or not place(fewer, cluster).straddling:
                return replicas
    return None


def with_replicas(config: Config, replicas: int) -> Config | None:
    """None where the batch cannot be cut that way."""
    if replicas < 1 or config.train.batch_size % (replicas * config.train.accumulation_steps):
        return None
    return replace(config, parallel=replace(config.parallel, replicas=replicas))


@dataclass(frozen=True)
class Plan:
    """A configuration placed on a cluster, and what follows from that."""

    config: Config
    cluster: Cluster
    layout: Layout

    @cached_property
    def setup(self) -> Setup:
        """Task, model and process; no weights are made."""
        return build_setup(self.config, dataset_spec(self.config.data))

    @cached_property
    def block_parameters(self) -> list[int]:
        """Of each block, without the shared modules."""
        config, meta = self.config, torch.device("meta")
        blocks = range(config.num_blocks)
        return [count_parameters(self.setup.block(block, None, meta)) for block in blocks]

    @cached_property
    def shared_parameters(self) -> int:
        return count_parameters(build_shared(self.setup.model))

    @cached_property
    def zero(self) -> dict[str, Any]:
        """DeepSpeed's own settings; empty with another engine."""
        is_used = self.config.parallel.replica_engine == "deepspeed"
        return (
            settings(self.config, self.layout.num_replicas)["zero_optimization"] if is_used else {}
        )

    def state_bytes(self, rank: int) -> int:
        """Returns the bytes of a rank's weights, gradients, AdamW's moments and averaged weights.

        Shared modules are included. Activations and messages come on top.
        """
        return ceil(FLOAT_BYTES * (self._block_values(rank) + self._shared_values(rank)))

    def wire_bytes(self, block: int) -> int:
        """Returns the bytes that a step moves into, and out of, each node with a straddling block.

        That is as much as a ring of its replicas passes on.
        """
        size, num_weights = self.layout.num_replicas, self.block_parameters[block]
        passes = self.config.train.accumulation_steps if self._split.gradients else 1
        values = passes * self._split.wire_values(num_weights, num_weights)
        return FLOAT_BYTES * (values + 2 * self.shared_parameters) * (size - 1) // size

    @cached_property
    def _split(self) -> split.Split:
        engine = self.config.parallel.replica_engine
        if engine == "deepspeed":
            return split.ZERO[self.zero["stage"]]
        return split.FSDP if engine == "fsdp" else split.DDP

    def _block_values(self, rank: int) -> float:
        """Numbers that a rank holds of its block."""
        place, averages = self.layout.place_of(rank), int(self.config.train.ema_decay > 0)
        if place is None:
            return 0.0
        num_weights = self.block_parameters[place[0]]
        return self._split.values(num_weights, self.layout.num_replicas, averages)

    def _shared_values(self, rank: int) -> float:
        """Numbers that a rank holds of the shared modules."""
        return copies_held(self.config, self.layout, rank) * self.shared_parameters


def who(layout: Layout) -> str:
    extra = " + 1 dedicated coordinator" if layout.offset else ""
    blocks, replicas = counted(layout.num_blocks, "block"), counted(layout.num_replicas, "replica")
    return f"{blocks} x {replicas}{extra}"


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s'[: number != 1]}"
