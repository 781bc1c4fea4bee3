"""Shows where every block would go, what its ranks would hold, and what to type.

    dbdist plan CONFIG --nodes N --gpus-per-node G

This is arithmetic only: it starts no process, joins no group and makes no weights.
Options of the configuration change it as for train.
"""

import shlex
import sys
from collections.abc import Iterable, Iterator
from itertools import groupby, pairwise
from math import ceil

from rich.console import Console
from rich.table import Table

from dbdist.commands.command_line import OneLineParser, guarded, with_first
from dbdist.commands.placement import (
    FLOAT_BYTES,
    Cluster,
    Plan,
    counted,
    fewer_replicas,
    place,
    ranks_per_node,
    who,
    with_replicas,
)
from dbdist.config.parse import parse_config
from dbdist.errors import ConfigError
from dbdist.monitor.ownership import human_bytes
from dbdist.parallel.layout import Layout


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
    options = with_first("--config", options)
    cluster = Cluster(given.nodes, given.gpus_per_node)
    config = parse_config("dbdist plan", "", options).validate()
    if not config.is_joint:
        raise ConfigError(
            "parallel.blocks trains some blocks by themselves; plan places all, leave it out"
        )
    report(Plan(config, cluster, place(config, cluster)), options)


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
    title = f"{who(layout)} ({config.parallel.replica_engine}) on {plan.cluster}"
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
    counts = ranks_per_node(plan.layout)
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
        replicas = fewer_replicas(config, cluster, whole=True)
        ways.append(f"set parallel.replicas {replicas}")
        yield f"to keep every block on one node, {' or '.join(ways)}"


def _unused(plan: Plan) -> Iterator[str]:
    """How many GPUs have nothing to do, and what would use them."""
    layout, cluster = plan.layout, plan.cluster
    if unused := cluster.num_gpus - layout.world_size:
        ways = []
        if (num_nodes := len(ranks_per_node(layout))) < cluster.num_nodes:
            ways.append(f"--nodes {num_nodes} is enough")
        replicas, rest = divmod(cluster.num_gpus - layout.offset, layout.num_blocks)
        if rest == 0 and with_replicas(plan.config, replicas) is not None:
            ways.append(f"parallel.replicas {replicas} would use all")
        yield "; ".join([f"{unused} of {counted(cluster.num_gpus, 'GPU')} stay unused", *ways])


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


if __name__ == "__main__":
    main()
