"""Shows where every block would go, what its ranks would hold, and what to type.

    dbdist plan CONFIG --nodes N --gpus-per-node G

This is arithmetic only: it starts no process, joins no group and makes no weights.
Options of the configuration change it as for train.
"""

import shlex
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby, pairwise
from math import ceil
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from dbdist.build import Setup, build_setup
from dbdist.commands.command_line import OneLineParser, guarded
from dbdist.config.config import Config
from dbdist.config.parse import parse_config
from dbdist.data.sources import dataset_spec
from dbdist.errors import ConfigError, TopologyError
from dbdist.models.base import build_shared, count_parameters
from dbdist.monitor.ownership import human_bytes
from dbdist.parallel.engines.zero_settings import settings
from dbdist.parallel.layout import Layout, layout_of
from dbdist.parallel.shared_sync import has_outer_step

FLOAT_BYTES = 4  # of weights, gradients and optimizer, with train.precision bf16 too


def main(argv: list[str] | None = None) -> None:
    guarded("dbdist plan", lambda: run(sys.argv[1:] if argv is None else argv))


def run(argv: list[str]) -> None:
    parser = OneLineParser(
        prog="dbdist plan",
        usage="dbdist plan CONFIG [--nodes N] --gpus-per-node G [--section.key value …]",
        description=__doc__,
        allow_abbrev=False,
    )
    parser.add_argument("--nodes", metavar="N", type=int, default=1, help="machines; default: 1")
    parser.add_argument(
        "--gpus-per-node", metavar="G", type=int, required=True, help="GPUs of each machine"
    )
    given, options = parser.parse_known_args(argv)
    if options and not options[0].startswith("-"):
        options.insert(0, "--config")
    cluster = Cluster(given.nodes, given.gpus_per_node)
    config = parse_config("dbdist plan", "", options).validate()
    if not config.is_joint:
        raise ConfigError(
            "parallel.blocks trains some blocks by themselves; plan places all, leave it out"
        )
    report(Plan(config, cluster, place(config, cluster)), options)


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
        return f"{_count(self.num_nodes, 'node')} x {_count(self.gpus_per_node, 'GPU')}"


def place(config: Config, cluster: Cluster) -> Layout:
    """The configuration's layout on these nodes, as few blocks straddling as can be; among the ways
    to that, as many ranks on every node where possible, and on few nodes. Raises TopologyError or
    ConfigError when there are too few GPUs or the mode has no layout."""
    if config.mode == "sequential":
        raise TopologyError(
            "mode sequential trains in one process: there is nothing to place; use block_parallel"
        )
    layout = layout_of(config, cluster.num_gpus)
    if layout.world_size > cluster.num_gpus:
        ways = [f"use --nodes {ceil(layout.world_size / cluster.gpus_per_node)}"]
        if replicas := _fewer_replicas(config, cluster):
            ways.append(f"set parallel.replicas {replicas}")
        raise TopologyError(
            f"{_who(layout)} need {layout.world_size} GPUs, {cluster} are {cluster.num_gpus}; "
            + " or ".join(ways)
        )
    return min(
        (_on_nodes(layout, counts) for counts in _spreads(layout, cluster)),
        key=lambda layout: (
            len(layout.straddling),
            len(set(_ranks_per_node(layout))) > 1,
            len(_ranks_per_node(layout)),
        ),
    )


def _spreads(layout: Layout, cluster: Cluster) -> Iterator[list[int]]:
    """Numbers of ranks on each node: whole blocks on each, as many as fit, and what is left over
    wherever there is room; or equal numbers."""
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


def _ranks_per_node(layout: Layout) -> list[int]:
    return [len(list(ranks)) for _, ranks in groupby(layout.nodes or ())]


def _fewer_replicas(config: Config, cluster: Cluster, *, whole: bool = False) -> int | None:
    """The largest smaller number of replicas that fits these GPUs; whole: and straddles nowhere."""
    for replicas in range(config.parallel.replicas - 1, 0, -1):
        fewer = _with_replicas(config, replicas)
        if fewer is not None and layout_of(fewer, 1).world_size <= cluster.num_gpus:
            if not whole or not place(fewer, cluster).straddling:
                return replicas
    return None


def _with_replicas(config: Config, replicas: int) -> Config | None:
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
        setup = self.setup
        counts: dict[int, int] = {}  # by number of layers: they are all alike
        for block, layers in enumerate(config.layers_of_block):
            if len(layers) not in counts:
                counts[len(layers)] = count_parameters(setup.block(block, None, meta))
        return [counts[len(layers)] for layers in config.layers_of_block]

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
        """Weights, gradients, AdamW's moments and averaged weights that a rank holds, shared
        modules included. Activations and messages come on top."""
        return ceil(FLOAT_BYTES * (self._block_values(rank) + self._shared_values(rank)))

    def wire_bytes(self, block: int) -> int:
        """What a step moves into, and out of, each node that has a part of a straddling block: as
        much as a ring of its replicas passes on."""
        split, size = self._split, self.layout.num_replicas
        passes = 3 if split.weights else 2  # weights twice and gradients once, or gradients twice
        passes *= self.config.train.accumulation_steps if split.gradients else 1
        values = passes * self.block_parameters[block] + 2 * self.shared_parameters
        return FLOAT_BYTES * values * (size - 1) // size

    @cached_property
    def _split(self) -> "_Split":
        if self.config.parallel.replica_engine == "ddp":
            return _Split(weights=False, gradients=False, optimizer=False)
        if self.config.parallel.replica_engine == "fsdp":
            return _Split(weights=True, gradients=True, optimizer=True)
        stage = self.zero["stage"]
        return _Split(
            weights=stage == 3, gradients=stage > 1, optimizer=True, own_weights=stage < 3
        )

    def _block_values(self, rank: int) -> float:
        """Numbers that a rank holds of its block."""
        place, split = self.layout.place_of(rank), self._split
        if place is None:
            return 0.0
        values, size = self.block_parameters[place[0]], self.layout.num_replicas
        weights = 1 + self._has_average
        return values * (
            weights / (size if split.weights else 1)
            + 1 / (size if split.gradients else 1)
            + (2 + split.own_weights) / (size if split.optimizer else 1)
        )

    def _shared_values(self, rank: int) -> float:
        """Numbers that a rank holds of the shared modules: `parallel.coordinator` and `sync`."""
        config, p, layout = self.config, self.config.parallel, self.layout
        has_block = layout.place_of(rank) is not None
        copies = 1.0 + self._has_average
        if config.shared == "sharded":
            copies += 1 + 4 / layout.world_size  # its part, as weights and gradients of its own
        elif config.shared == "coordinated" and layout.needs_coordinator:
            copies += 1 + 2 * (rank == 0)
        else:
            copies += 3 * has_block
            if rank == 0 and config.shared == "averaged":  # the average's
                copies += 1 + has_outer_step(p) + (p.outer_momentum > 0)
        return copies * self.shared_parameters

    @property
    def _has_average(self) -> bool:
        return self.config.train.ema_decay > 0


@dataclass(frozen=True, kw_only=True)
class _Split:
    """What an engine splits among a block's replicas: see parallel.replicas and parallel.zero."""

    weights: bool
    gradients: bool
    optimizer: bool
    own_weights: bool = False
    """Whether the optimizer steps a copy of the weights, which it splits too."""


def report(plan: Plan, options: list[str]) -> None:
    """The plan on the terminal. options: the command line's, of the configuration."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(_table(plan), highlight=False)
    warnings = [f"warning: {text}" for text in (*_straddling(plan), *_unused(plan))]
    for line in (_about_state(plan), _about_shared(plan), *_commands(plan, options), *warnings):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _table(plan: Plan) -> Table:
    """One row for each block, and one for a dedicated coordinator."""
    config, layout = plan.config, plan.layout
    title = f"{_who(layout)} ({config.parallel.replica_engine}) on {plan.cluster}"
    table = Table(title=title, title_justify="left", title_style="bold")
    for header in ("block", "ranks", "node:GPUs", "layers", "sigma", "parameters", "state a rank"):
        table.add_column(header, justify="right", overflow="fold")
    if layout.offset:
        state, shared = human_bytes(plan.state_bytes(0)), f"{plan.shared_parameters:,} shared"
        table.add_row("coordinator", "0", _gpus(layout, [0]), "-", "-", shared, state)
    schedule = plan.setup.process.partition
    for block, layers in enumerate(config.layers_of_block):
        ranks = layout.replicas(block)
        state = human_bytes(plan.state_bytes(ranks[-1]))
        if (most := human_bytes(plan.state_bytes(ranks[0]))) != state:
            state = f"{state}, rank {ranks[0]}: {most}"
        low, high = schedule.block_range(block) if schedule else (None, None)
        table.add_row(
            str(block) if schedule else "all",
            _spans(ranks),
            _gpus(layout, ranks),
            f"{layers[0]}-{layers[-1]}",
            f"{low:.3g} .. {high:.3g}" if schedule else "-",
            f"{plan.block_parameters[block]:,}",
            state,
        )
    return table


def _about_state(plan: Plan) -> str:
    average = ", averaged weights" if plan.config.train.ema_decay > 0 else ""
    on_host = [
        part
        for part in ("optimizer", "param")
        if (plan.zero.get(f"offload_{part}") or {}).get("device", "none") != "none"
    ]
    return (
        f"state: fp32 weights, gradients, AdamW's moments{average}, shared modules included; "
        "activations and messages come on top"
        + (f"; DeepSpeed keeps its {' and '.join(on_host)} in host memory" if on_host else "")
    )


def _about_shared(plan: Plan) -> str:
    """Who holds the shared modules, and who their optimizer."""
    config, world_size, count = plan.config, plan.layout.world_size, plan.shared_parameters
    p, moments = config.parallel, 2 * FLOAT_BYTES * count
    if config.shared == "private":
        owner = "with their optimizer; each block keeps its own"
    elif config.shared == "averaged":
        owner = f"with their optimizer; rank 0 averages them every {p.sync_every} steps"
    elif config.shared == "sharded":
        owner = f"their optimizer split over all ranks, {human_bytes(moments / world_size)} each"
    elif plan.layout.needs_coordinator:
        beside = "alone" if plan.layout.offset else "beside block 0"
        owner = f"their optimizer ({human_bytes(moments)}) on rank 0, {beside}"
    else:
        owner = "with their optimizer"
    return f"shared modules: {count:,} parameters on every rank, {owner}"


def _commands(plan: Plan, options: list[str]) -> list[str]:
    """What to type on each node."""
    train = ["-m", "dbdist.train", *options]
    counts = _ranks_per_node(plan.layout)
    if len(counts) == 1:
        words = ["torchrun", "--rdzv-backend=loopback", f"--nproc_per_node={counts[0]}", *train]
        return ["to type:", f"  {shlex.join(words)}"]
    lines = ["to type, with MASTER_ADDR the address of node 0:"]
    for count in sorted(set(counts), reverse=True):
        nodes = [node for node, own in enumerate(counts) if own == count]
        rank = str(nodes[0]) if len(nodes) == 1 else "$NODE_RANK"
        lines.append(
            f"  torchrun --nnodes={len(counts)} --node_rank={rank} --nproc_per_node={count} "
            f"--master_addr=$MASTER_ADDR --master_port=29500 {shlex.join(train)}"
            + (f"  # NODE_RANK {_spans(nodes)}" if len(nodes) > 1 else "")
        )
    return lines


def _straddling(plan: Plan) -> Iterator[str]:
    """What straddling costs, block by block, and how to avoid it."""
    config, layout, cluster = plan.config, plan.layout, plan.cluster
    for block in layout.straddling:
        who = f"block {block}'s replicas" if config.mode == "block_parallel" else "the replicas"
        yield (
            f"{who} (ranks {_spans(layout.replicas(block))}) straddle nodes "
            f"{_spans(layout.nodes_of(block))}: about {human_bytes(plan.wire_bytes(block))} a step "
            "into and out of each over the network"
        )
    if layout.straddling and config.mode == "block_parallel":
        ways = []
        first = (cluster.gpus_per_node - layout.offset) // layout.num_replicas
        if other := cluster.gpus_per_node // layout.num_replicas:
            ways.append(f"use --nodes {1 + ceil((layout.num_blocks - first) / other)}")
        replicas = _fewer_replicas(config, cluster, whole=True)
        ways.append(f"set parallel.replicas {replicas}")
        yield f"to keep every block on one node, {' or '.join(ways)}"


def _unused(plan: Plan) -> Iterator[str]:
    """How many GPUs have nothing to do, and what would use them."""
    layout, cluster = plan.layout, plan.cluster
    if unused := cluster.num_gpus - layout.world_size:
        ways = []
        if (num_nodes := len(_ranks_per_node(layout))) < cluster.num_nodes:
            ways.append(f"--nodes {num_nodes} is enough")
        replicas, rest = divmod(cluster.num_gpus - layout.offset, layout.num_blocks)
        if rest == 0 and _with_replicas(plan.config, replicas) is not None:
            ways.append(f"parallel.replicas {replicas} would use all")
        yield "; ".join([f"{unused} of {_count(cluster.num_gpus, 'GPU')} stay unused", *ways])


def _who(layout: Layout) -> str:
    extra = " + 1 dedicated coordinator" if layout.offset else ""
    blocks, replicas = _count(layout.num_blocks, "block"), _count(layout.num_replicas, "replica")
    return f"{blocks} x {replicas}{extra}"


def _gpus(layout: Layout, ranks: Iterable[int]) -> str:
    """`0-1:0-3` for GPUs 0 to 3 of nodes 0 and 1."""
    nodes = layout.nodes or (0,) * layout.world_size
    first: dict[int, int] = {}
    for rank, node in enumerate(nodes):
        first.setdefault(node, rank)
    gpus: dict[int, list[int]] = {}
    for rank in ranks:
        gpus.setdefault(nodes[rank], []).append(rank - first[nodes[rank]])
    alike = groupby(sorted(gpus), key=lambda node: _spans(gpus[node]))
    return " ".join(f"{_spans(list(same))}:{own}" for own, same in alike)


def _spans(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2,5"."""
    ends = [i + 1 for i, (a, b) in enumerate(pairwise(numbers)) if b != a + 1]
    parts = [numbers[a:b] for a, b in pairwise([0, *ends, len(numbers)])]
    return ",".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s'[: number != 1]}"


if __name__ == "__main__":
    main()
