"""`dbdist plan`: what it shows, what it warns of, what it refuses, and that it starts nothing."""

import shlex
import time
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import setup_of

from dbdist.cli import main
from dbdist.commands.placement import Cluster, Plan, place
from dbdist.commands.plan import run
from dbdist.config.parse import parse_config
from dbdist.errors import ConfigError, TopologyError

ROOT = Path(__file__).parents[2]
DIGITS = str(ROOT / "configs" / "digits.yaml")
FLOAT = 4
BLOCK, SHARED = 108_416, 6_914  # parameters of configs/digits.yaml, as its README shows


@pytest.fixture(autouse=True)
def nothing_starts(monkeypatch):
    """A process group is a failure."""

    def refused(*_, **__):
        raise AssertionError("a plan must not do this")

    monkeypatch.setattr(dist, "init_process_group", refused)
    monkeypatch.setattr(dist, "new_group", refused)


def lines_of(capsys, *words):
    """What `dbdist plan` prints with configs/digits.yaml, line by line."""
    run([DIGITS, *words])
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "\x1b" not in captured.out, "plain text when it is not a terminal"
    assert max(len(line) for line in captured.out.splitlines() if "│" in line) <= 120
    return [line.rstrip() for line in captured.out.splitlines()]


def rows_of(lines):
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if "│" in line]


def digits(*options):
    return parse_config("test", "", ["--config", DIGITS, *(f"--{o}" for o in options)]).validate()


def plan_of(num_nodes, gpus_per_node, *options):
    cluster = Cluster(num_nodes, gpus_per_node)
    config = digits(*options)
    return Plan(config, cluster, place(config, cluster))


# -- what it shows ---------------------------------------------------------------------------------


def test_a_row_says_where_a_block_is_and_what_it_is(capsys):
    lines = lines_of(capsys, "--nodes", "3", "--gpus-per-node", "2", "--parallel.replicas", "2")
    assert lines[0] == "3 blocks x 2 replicas (ddp) on 3 nodes x 2 GPUs"
    assert rows_of(lines) == [
        ["0", "0-1", "0:0-1", "0-1", "2.33 .. 80", "108,416", "1.7 MiB, rank 0: 1.8 MiB"],
        ["1", "2-3", "1:0-1", "2-3", "0.933 .. 2.91", "108,416", "1.7 MiB"],
        ["2", "4-5", "2:0-1", "4-5", "0.002 .. 1.34", "108,416", "1.7 MiB"],
    ]
    assert "shared modules: 6,914 parameters on every rank, their optimizer (54.0 KiB)" in "".join(
        lines
    )
    assert not any("warning" in line for line in lines)


def test_a_dedicated_coordinator_has_a_row_and_whole_blocks_stand_beside_it(capsys):
    words = ("--parallel.replicas", "2", "--parallel.coordinator", "dedicated")
    lines = lines_of(capsys, "--nodes", "2", "--gpus-per-node", "4", *words)
    assert [row[:3] for row in rows_of(lines)] == [
        ["coordinator", "0", "0:0"],
        ["0", "1-2", "0:1-2"],
        ["1", "3-4", "1:0-1"],
        ["2", "5-6", "1:2-3"],
    ]
    assert rows_of(lines)[0][5:] == ["6,914 shared", "108.0 KiB"]
    assert lines[-1] == "warning: 1 of 8 GPUs stay unused"


def test_every_gpu_is_a_replica_end_to_end(capsys):
    lines = lines_of(capsys, "--nodes", "2", "--gpus-per-node", "4", "--mode", "end_to_end")
    ((block, ranks, gpus, layers, sigma, *_),) = rows_of(lines)
    assert (block, ranks, gpus, layers, sigma) == ("all", "0-7", "0-1:0-3", "0-5", "-")
    (warning,) = [line for line in lines if "warning" in line]
    assert warning.startswith("warning: the replicas (ranks 0-7) straddle nodes 0-1: about ")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ((), "their optimizer (54.0 KiB) on rank 0, beside block 0"),
        (("parallel.coordinator=dedicated",), "their optimizer (54.0 KiB) on rank 0, alone"),
        (("parallel.coordinator=sharded",), "their optimizer split over all ranks, 18.0 KiB each"),
        (("parallel.sync=every",), "with their optimizer; rank 0 averages them every 20 steps"),
        (("parallel.sync=never",), "with their optimizer; each block keeps its own"),
        (("mode=end_to_end",), "with their optimizer"),
    ],
)
def test_it_says_who_has_the_shared_modules_and_their_optimizer(capsys, options, text):
    gpus = "4" if "dedicated" in str(options) else "1" if "end" in str(options) else "3"
    lines = lines_of(capsys, "--gpus-per-node", gpus, *(f"--{option}" for option in options))
    (line,) = [line for line in lines if line.startswith("shared modules: ")]
    assert line.endswith(f"parameters on every rank, {text}")


def test_the_command_to_type_repeats_the_options(capsys):
    words = ("--run_dir", "a b", "--parallel.replicas=2")
    (line,) = [x for x in lines_of(capsys, "--gpus-per-node", "6", *words) if "torchrun" in x]
    train = ["-m", "dbdist.train", "--config", DIGITS, *words]
    assert shlex.split(line) == [
        "torchrun",
        "--rdzv-backend=loopback",
        "--nproc_per_node=6",
        *train,
    ]


def test_on_several_nodes_there_is_a_command_for_each_number_of_ranks(capsys):
    words = ("--parallel.replicas", "2", "--model.num_blocks=6")
    lines = lines_of(capsys, "--nodes", "4", "--gpus-per-node", "4", *words)
    (line,) = [line for line in lines if "torchrun" in line]
    assert "torchrun --nnodes=3 --node_rank=$NODE_RANK --nproc_per_node=4 " in line
    assert line.endswith("  # NODE_RANK 0-2")
    lines = lines_of(capsys, "--nodes", "4", "--gpus-per-node", "5", *words[2:],
                     "--parallel.replicas", "2", "--parallel.coordinator", "dedicated")  # fmt: skip
    first, second = [line for line in lines if "torchrun" in line]
    assert "--node_rank=0 --nproc_per_node=5 " in first
    assert "--node_rank=$NODE_RANK --nproc_per_node=4 " in second
    assert second.endswith("  # NODE_RANK 1-2")


def test_the_configuration_may_be_named_as_for_train_or_stand_alone(capsys):
    expected = lines_of(capsys, "--gpus-per-node", "4", "--model.num_blocks", "2")
    for words in (
        ["--config", DIGITS, "--gpus-per-node", "4", "--model.num_blocks", "2"],
        ["--gpus-per-node=4", "--nodes=1", DIGITS, "--model.num_blocks", "2"],
    ):
        main(["plan", *words])
        assert [x.rstrip() for x in capsys.readouterr().out.splitlines()] == expected


def test_spans_of_nodes_and_gpus_are_short(capsys):
    words = ("--nodes=3", "--gpus-per-node=4", "--parallel.replicas=3", "--train.batch_size=96")
    lines = lines_of(capsys, *words, "--model.num_blocks=4", "--model.layers_per_block=[1,1,2,2]")
    assert [row[1:3] for row in rows_of(lines)] == [
        ["0-2", "0:0-2"],
        ["4-6", "1:0-2"],
        ["8-10", "2:0-2"],
        ["3,7,11", "0-2:3"],
    ]


def test_1024_ranks_are_planned_in_seconds(capsys):
    words = ("--model.num_blocks=128", "--model.num_layers=128", "--parallel.replicas=8")
    start = time.monotonic()
    lines = lines_of(capsys, "--nodes", "128", "--gpus-per-node", "8", *words)
    assert time.monotonic() - start < 10
    rows = rows_of(lines)
    assert [row[0] for row in rows] == [str(block) for block in range(128)]
    assert rows[127][:4] == ["127", "1016-1023", "127:0-7", "127-127"]
    assert not any("warning" in line for line in lines)
    assert any("--nnodes=128 --node_rank=$NODE_RANK --nproc_per_node=8" in line for line in lines)


@pytest.mark.slow
def test_a_model_that_fits_no_machine_is_planned(capsys):
    words = ("--model.num_layers=1500", "--model.hidden_size=12288")
    rows = rows_of(lines_of(capsys, "--gpus-per-node=3", *words))
    assert all(row[6].endswith("TiB") for row in rows)


# -- where it puts blocks --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cluster", "options", "counts", "straddling"),
    [
        ((4, 8), ["parallel.replicas=2"], [6], 0),
        ((2, 4), ["parallel.replicas=2"], [4, 2], 0),  # 3 on each would cut block 2 in two
        ((2, 8), ["parallel.replicas=4"], [8, 4], 0),
        ((8, 8), ["parallel.replicas=4"], [4, 4, 4], 0),  # as many on each node, where they can be
        ((8, 3), ["parallel.replicas=4"], [3, 3, 3, 3], 3),
        ((3, 4), ["parallel.replicas=2", "parallel.coordinator=dedicated"], [3, 4], 0),
    ],
)
def test_ranks_on_each_node(cluster, options, counts, straddling):
    layout = plan_of(*cluster, *options).layout
    assert [(layout.nodes or ()).count(node) for node in range(len(counts))] == counts
    assert len(layout.straddling) == straddling


@pytest.mark.parametrize("coordinator", ["colocated", "dedicated"])
def test_no_block_straddles_where_all_fit(coordinator):
    config, extra = digits(), int(coordinator == "dedicated")
    for num_nodes, gpus, replicas in product((1, 2, 3, 5, 8), (1, 2, 3, 4, 8), (1, 2, 3, 4, 8)):
        most = (num_nodes * gpus - extra) // replicas
        whole = (gpus - extra) // replicas + (num_nodes - 1) * (gpus // replicas)
        for blocks in {1, whole, most} - {0} if most else ():
            model = replace(config.model, num_blocks=blocks, num_layers=blocks)
            parallel = replace(config.parallel, replicas=replicas, coordinator=coordinator)
            asked = replace(config, model=model, parallel=parallel)
            layout = place(asked, Cluster(num_nodes, gpus))
            nodes = layout.nodes or ()
            assert list(nodes) == sorted(nodes)
            assert max(nodes.count(node) for node in nodes) <= gpus
            assert max(nodes) < num_nodes
            assert len(layout.straddling) == max(0, blocks - whole)


# -- what a rank holds -----------------------------------------------------------------------------


def expected_bytes(values):
    return pytest.approx(FLOAT * values, abs=8)


def test_one_ranks_state_is_what_one_step_of_adamw_allocates():
    plan, config = plan_of(1, 1, "model.num_blocks=1"), digits("model.num_blocks=1")
    setup, cpu = setup_of(config), torch.device("cpu")
    modules = setup.shared(0, cpu), setup.block(0, 0, cpu)
    parameters = [p for module in modules for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    states = [t for s in optimizer.state.values() for k, t in s.items() if k != "step"]
    held = [*parameters, *(p.grad for p in parameters if p.grad is not None), *states]
    assert plan.state_bytes(0) == sum(t.nbytes for t in held)


@pytest.mark.parametrize(
    ("engine", "block_values"),
    [
        ("replica_engine=ddp", 4 * BLOCK),
        ("replica_engine=fsdp", 4 * BLOCK / 2),
        ("replica_engine=deepspeed", (2 + 3 / 2) * BLOCK),  # its optimizer steps weights of its own
        ("deepspeed_config=2", (1 + 4 / 2) * BLOCK),
        ("deepspeed_config=3", 4 * BLOCK / 2),
    ],
)
def test_engines_split_a_blocks_state_among_its_replicas(tmp_path, engine, block_values):
    if engine.startswith("deepspeed_config"):
        stage = engine[-1]
        engine = f"replica_engine=deepspeed --parallel.deepspeed_config={tmp_path}/zero.json"
        (tmp_path / "zero.json").write_text(f'{{"zero_optimization": {{"stage": {stage}}}}}')
    options = [option.removeprefix("--parallel.") for option in engine.split()]
    plan = plan_of(1, 6, "parallel.replicas=2", *(f"parallel.{o}" for o in options))
    for rank in range(1, 6):
        assert plan.state_bytes(rank) == expected_bytes(block_values + 2 * SHARED)
    assert plan.state_bytes(0) == expected_bytes(block_values + 4 * SHARED)


def test_what_deepspeed_keeps_in_host_memory_is_told(capsys, tmp_path):
    zero = '{"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}'
    (tmp_path / "zero.json").write_text(zero)
    words = ("--gpus-per-node=3", "--parallel.replica_engine=deepspeed")
    text = "; DeepSpeed keeps its optimizer in host memory"
    assert not any(line.endswith(text) for line in lines_of(capsys, *words))
    lines = lines_of(capsys, *words, f"--parallel.deepspeed_config={tmp_path}/zero.json")
    assert any(line.endswith(text) for line in lines)


@pytest.mark.parametrize(
    ("options", "first", "other"),
    [
        (["parallel.coordinator=dedicated"], 4 * SHARED, 4 * BLOCK + 2 * SHARED),
        (["parallel.coordinator=sharded"], *[4 * BLOCK + (2 + 3 / 3) * SHARED] * 2),
        (["parallel.sync=never"], *[4 * BLOCK + 4 * SHARED] * 2),
        (["parallel.sync=every"], 4 * BLOCK + 5 * SHARED, 4 * BLOCK + 4 * SHARED),
        (
            [
                "parallel.sync=every",
                "parallel.coordinator=dedicated",
                "parallel.outer_momentum=0.9",
            ],
            5 * SHARED,
            4 * BLOCK + 4 * SHARED,
        ),
        (["train.ema_decay=0.9"], 5 * BLOCK + 5 * SHARED, 5 * BLOCK + 3 * SHARED),
    ],
)
def test_the_shared_modules_state_follows_the_coordinator(options, first, other):
    plan = plan_of(1, 4, *options)
    assert plan.state_bytes(0) == expected_bytes(first)
    assert plan.state_bytes(plan.layout.world_size - 1) == expected_bytes(other)


# -- what it warns of ------------------------------------------------------------------------------


def warnings_of(capsys, *words):
    return [
        line.removeprefix("warning: ")
        for line in lines_of(capsys, *words)
        if line.startswith("warning: ")
    ]


def test_a_straddling_block_is_told_with_its_cost_and_the_cure(capsys):
    words = ("--nodes=3", "--gpus-per-node=4", "--parallel.replicas=3", "--train.batch_size=96")
    warnings = warnings_of(
        capsys, *words, "--model.num_blocks=4", "--model.layers_per_block=[1,1,1,3]"
    )
    moved = FLOAT * 2 * (3 * BLOCK // 2 + SHARED) * 2 // 3
    assert warnings == [
        "block 3's replicas (ranks 3,7,11) straddle nodes 0-2: about "
        f"{moved / 2**10:.1f} KiB a step into and out of each over the network",
        "to keep every block on one node, use --nodes 4 or set parallel.replicas 2",
    ]


def test_more_replicas_than_a_node_has_gpus_can_only_be_fewer(capsys):
    warnings = warnings_of(capsys, "--nodes=6", "--gpus-per-node=2", "--parallel.replicas=4")
    assert [w.split(":")[0] for w in warnings[:3]] == [
        f"block {b}'s replicas (ranks {4 * b}-{4 * b + 3}) straddle nodes {2 * b}-{2 * b + 1}"
        for b in range(3)
    ]
    assert warnings[3:] == ["to keep every block on one node, set parallel.replicas 2"]


@pytest.mark.parametrize(
    ("options", "passes"),
    [
        (["replica_engine=ddp"], 2),
        (["replica_engine=fsdp"], 3 * 4),
        (["replica_engine=deepspeed"], 2),
    ],
)
def test_what_crosses_the_network_follows_the_engine(options, passes):
    words = ("train.accumulation_steps=4", "parallel.replicas=2")
    plan = plan_of(6, 1, *words, *(f"parallel.{option}" for option in options))
    assert plan.layout.straddling == [0, 1, 2]
    assert plan.wire_bytes(1) == FLOAT * (passes * BLOCK + 2 * SHARED) // 2


@pytest.mark.parametrize(
    ("words", "warning"),
    [
        (["--gpus-per-node=3"], None),
        (["--gpus-per-node=4"], "1 of 4 GPUs stay unused"),
        (
            ["--gpus-per-node=3", "--nodes=4"],
            "9 of 12 GPUs stay unused; --nodes 1 is enough; parallel.replicas 4 would use all",
        ),
        (["--gpus-per-node=9"], "6 of 9 GPUs stay unused"),  # 3 replicas do not divide 128 samples
    ],
)
def test_unused_gpus_are_told(capsys, words, warning):
    assert warnings_of(capsys, *words) == ([warning] if warning else [])


# -- what it refuses -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "error", "parts"),
    [
        (["--nodes=0", "--gpus-per-node=2"], ConfigError, ["--nodes is 0", "at least 1"]),
        (["--gpus-per-node=-1"], ConfigError, ["--gpus-per-node is -1", "at least 1"]),
        (
            ["--nodes=2", "--gpus-per-node=4", "--parallel.replicas=4"],
            TopologyError,
            ["3 blocks x 4 replicas need 12 GPUs, 2 nodes x 4 GPUs are 8; use --nodes 3 or set "
             "parallel.replicas 2"],
        ),
        (
            ["--gpus-per-node=3", "--parallel.coordinator=dedicated"],
            TopologyError,
            ["3 blocks x 1 replica + 1 dedicated coordinator need 4 GPUs", "use --nodes 2"],
        ),
        (["--gpus-per-node=8", "--mode=sequential"], TopologyError, ["one process"]),
        (
            ["--gpus-per-node=3", "--parallel.sync=never", "--parallel.blocks=1"],
            ConfigError,
            ["parallel.blocks", "leave it out"],
        ),
        (["--gpus-per-node=3", "--mode=end_to_end"], ConfigError, ["batch_size 128", "= 3"]),
        (["--gpus-per-node=3", "--data.nam=x"], ConfigError, ["did you mean --data.name"]),
        (["--gpus-per-node=3", "--model.num_blocks=4"], ConfigError, ["num_blocks 4"]),
        (["--gpus-per-node=3", "--model.patch_size=3"], ConfigError, ["patch_size 3"]),
        (["--gpus-per-node=3", "stray"], ConfigError, ["stray"]),
    ],
)  # fmt: skip
def test_what_cannot_be_placed_is_refused_in_one_sentence(words, error, parts):
    with pytest.raises(error) as caught:
        run([DIGITS, *words])
    assert all(part in str(caught.value) for part in parts), caught.value


def test_a_refusal_ends_with_one_line_and_exit_code_2(machine):
    job = machine.python("dbdist.commands.plan", DIGITS, "--gpus-per-node=2")
    assert job.wait(120) == 2
    (line,) = job.printed().splitlines()
    assert line.startswith("dbdist plan: error: 3 blocks x 1 replica need 3 GPUs, 1 node x 2 GPUs")
