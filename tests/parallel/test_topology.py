"""Which rank does what: laws of the placement on any nodes, and the groups that come of it."""

import random
from dataclasses import replace
from itertools import chain

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from dbdist.parallel.layout import Layout


def on_nodes(num_blocks, num_replicas, coordinator, counts, shuffled=False):
    """A layout on nodes of so many ranks each."""
    nodes = list(chain.from_iterable([node] * count for node, count in enumerate(counts)))
    if shuffled:
        random.Random(0).shuffle(nodes)
    return Layout(num_blocks, num_replicas, coordinator, tuple(nodes))


def uneven(total):
    """Sizes from 1 to 9 that add up to `total`."""
    sizes, draw = [], random.Random(1)
    while sum(sizes) < total:
        sizes.append(min(draw.randint(1, 9), total - sum(sizes)))
    return sizes


LAYOUTS = [
    Layout(1),
    Layout(5, 1, "dedicated"),
    Layout(3, 4, "sharded"),
    Layout(1, 1024),
    Layout(1024),
    on_nodes(4, 3, "colocated", [4, 4, 4]),
    on_nodes(6, 2, "dedicated", [7, 6]),
    on_nodes(6, 2, "dedicated", [6, 7]),
    on_nodes(2, 4, "dedicated", [1, 4, 4]),
    on_nodes(2, 4, "colocated", [3, 5]),
    on_nodes(3, 4, "sharded", [1, 6, 5]),
    on_nodes(2, 8, "colocated", [4, 4, 4, 4]),
    on_nodes(5, 3, "colocated", [8, 7], shuffled=True),
    on_nodes(128, 8, "colocated", [8] * 128),
    on_nodes(64, 16, "sharded", [8] * 128),
    on_nodes(341, 3, "dedicated", [8] * 128),
    on_nodes(256, 4, "colocated", uneven(1024)),
    on_nodes(341, 3, "dedicated", uneven(1024)),
    on_nodes(512, 2, "sharded", uneven(1024), shuffled=True),
]
each_layout = pytest.mark.parametrize(
    "layout", LAYOUTS, ids=lambda a: f"{a.num_blocks}x{a.num_replicas}-{a.coordinator}"
)


@each_layout
def test_every_rank_has_one_place_and_every_place_one_rank(layout):
    blocks, replicas = layout.num_blocks, layout.num_replicas
    ranks = {layout.rank_of(b, r): (b, r) for b in range(blocks) for r in range(replicas)}
    assert sorted(ranks) == list(range(layout.offset, layout.world_size))
    assert all(layout.place_of(rank) == place for rank, place in ranks.items())
    assert layout.world_size == blocks * replicas + layout.offset


@each_layout
def test_rank_0_is_the_coordinator_alone_or_the_first_copy_of_block_0(layout):
    assert layout.place_of(0) == (None if layout.coordinator == "dedicated" else (0, 0))


@each_layout
def test_chains_and_replicas_are_the_two_ways_through_the_same_map(layout):
    chains = [layout.chain(replica) for replica in range(layout.num_replicas)]
    blocks = [layout.replicas(block) for block in range(layout.num_blocks)]
    assert [list(row) for row in zip(*chains, strict=True)] == blocks
    assert blocks[-1][-1] == layout.rank_of(layout.num_blocks - 1, layout.num_replicas - 1)
    # A process group sorts its ranks: a replica's number is its rank in the group.
    assert all(ranks == sorted(ranks) for ranks in blocks)


@each_layout
def test_as_few_blocks_straddle_as_can_be(layout):
    nodes = layout.nodes or (0,) * layout.world_size
    free = {node: 0 for node in nodes}
    for rank in range(layout.offset, layout.world_size):
        free[nodes[rank]] += 1
    room = sum(count // layout.num_replicas for count in free.values())
    straddling = layout.straddling
    assert len(straddling) == max(0, layout.num_blocks - room)
    for block in range(layout.num_blocks):
        own = {nodes[rank] for rank in layout.replicas(block)}
        assert layout.nodes_of(block) == sorted(own)
        assert (block in straddling) == (len(own) > 1)


@pytest.mark.parametrize("num_blocks", [1, 2, 5])
@pytest.mark.parametrize("num_replicas", [1, 2, 3])
@pytest.mark.parametrize("coordinator", ["colocated", "dedicated", "sharded"])
def test_on_one_node_or_with_replicas_that_divide_every_node_it_is_block_by_block(
    num_blocks, num_replicas, coordinator
):
    layout = Layout(num_blocks, num_replicas, coordinator)
    first = layout.offset
    expected = [
        list(range(first + b * num_replicas, first + (b + 1) * num_replicas))
        for b in range(num_blocks)
    ]
    counts = [[layout.world_size]]
    if coordinator != "dedicated":
        counts.append([num_replicas] * num_blocks)
    for nodes in (
        None,
        *(on_nodes(num_blocks, num_replicas, coordinator, c).nodes for c in counts),
    ):
        same = replace(layout, nodes=nodes)
        assert [same.replicas(b) for b in range(num_blocks)] == expected
        assert same.straddling == []


@pytest.mark.parametrize(
    ("layout", "blocks", "straddling"),
    [
        (
            on_nodes(4, 3, "colocated", [4, 4, 4]),
            [[0, 1, 2], [4, 5, 6], [8, 9, 10], [3, 7, 11]],
            [3],
        ),
        (on_nodes(2, 3, "colocated", [3, 3]), [[0, 1, 2], [3, 4, 5]], []),
        # Ranks of two nodes in turn.
        (Layout(2, 2, nodes=(0, 1, 0, 1)), [[0, 2], [1, 3]], []),
        (Layout(2, 2, nodes=(7, 3, 3, 7)), [[0, 3], [1, 2]], []),
        # Rank 0 holds block 0, though alone on its node.
        (on_nodes(2, 2, "colocated", [1, 3]), [[0, 3], [1, 2]], [0]),
        # A coordinator alone on a node leaves the others whole; among others it takes a place.
        (on_nodes(2, 2, "dedicated", [1, 2, 2]), [[1, 2], [3, 4]], []),
        (on_nodes(2, 2, "dedicated", [2, 3]), [[2, 3], [1, 4]], [1]),
        # More replicas than a node has: neighbours.
        (on_nodes(2, 4, "colocated", [2, 2, 2, 2]), [[0, 1, 2, 3], [4, 5, 6, 7]], [0, 1]),
    ],
)
def test_cases_worked_by_hand(layout, blocks, straddling):
    assert [layout.replicas(b) for b in range(layout.num_blocks)] == blocks
    assert layout.straddling == straddling


@pytest.fixture
def fake_world():
    """`fake_world(rank, size)`: torch's group of ranks that are not there."""
    dist.set_debug_level(dist.DebugLevel.OFF)  # its checks would call them

    def start(rank, size):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)

    yield start
    dist.destroy_process_group()
    dist.set_debug_level_from_env()


@pytest.mark.parametrize("rank", [0, 5, 11])
def test_on_one_node_it_is_torchs_own_mesh_of_blocks_and_replicas(fake_world, rank):
    fake_world(rank, 12)
    mesh = init_device_mesh("cpu", (4, 3), mesh_dim_names=("block", "replica"))
    layout = Layout(4, 3)
    assert mesh.mesh.tolist() == [layout.replicas(block) for block in range(4)]
    assert tuple(mesh.get_coordinate() or ()) == layout.place_of(rank)


@pytest.mark.parametrize("rank", [0, 777, 1023])
def test_torchs_mesh_of_a_thousand_placed_ranks_gives_the_same_places(fake_world, rank):
    fake_world(rank, 1024)
    layout = on_nodes(256, 4, "colocated", uneven(1024))
    ranks = torch.tensor([layout.replicas(block) for block in range(256)])
    mesh = DeviceMesh("cpu", ranks, mesh_dim_names=("block", "replica"))
    assert tuple(mesh.get_coordinate() or ()) == layout.place_of(rank)


def groups_of_rank(rank, nodes):
    """What a rank learns from the copies of its block, and from its predecessor in the chain."""
    rank.launch = replace(rank.launch, node=nodes[rank.launch.rank])
    topology = rank.join(Layout(2, 2))
    total = torch.tensor([10.0**topology.rank])
    dist.all_reduce(total, group=topology.replica_group)
    chain_ranks, before = topology.layout.chain(topology.replica), torch.tensor([-1])
    if topology.block == 0:
        dist.send(torch.tensor([topology.rank]), chain_ranks[1], group=topology.p2p_group)
    else:
        dist.recv(before, chain_ranks[0], group=topology.p2p_group)
    replica = dist.get_group_rank(topology.own_group(), topology.rank)
    return topology.layout, (topology.block, replica), total.item(), before.item()


@pytest.mark.parametrize(
    ("nodes", "places", "totals", "before"),
    [
        ((0, 0, 1, 1), [(0, 0), (0, 1), (1, 0), (1, 1)], [11, 11, 1100, 1100], [-1, -1, 0, 1]),
        ((0, 1, 0, 1), [(0, 0), (1, 0), (0, 1), (1, 1)], [101, 1010, 101, 1010], [-1, 0, -1, 2]),
        ((0, 1, 1, 1), [(0, 0), (1, 0), (1, 1), (0, 1)], [1001, 110, 110, 1001], [-1, 0, 3, -1]),
    ],
    ids=["neighbours", "in turn", "straddling"],
)
def test_ranks_agree_on_nodes_and_groups(ranks, nodes, places, totals, before):
    answers = ranks.run(4, groups_of_rank, nodes)
    assert {layout for layout, *_ in answers} == {Layout(2, 2, nodes=nodes)}
    assert [rest for _, *rest in answers] == [
        list(a) for a in zip(places, totals, before, strict=True)
    ]
