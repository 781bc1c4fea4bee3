"""Every launcher of launch/, typed as its README says, on localhost: the same run whoever started
it, two nodes, a lost rank, a job that Slurm stops. GPUs, ssh and a real Slurm are not here."""

import importlib.util
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from machine import BIN, ROOT, free_port, wait_for_checkpoint
from reading import evaluation_of, hashes_of
from torch.distributed.run import get_args_parser as torchrun_parser

from dbdist.config.parse import parse_config

LAUNCH = ROOT / "launch"
SMALL = "--config configs/digits.yaml --train.max_steps 80 --train.warmup_steps 5 "
THREE = f"{SMALL} --train.log_every 20 --checkpoint.every_steps 20 --model.num_layers 3".split()
# A block on each node, which exchanges nothing with the other between checkpoints: nodes learn of a
# loss by torchrun alone, as they do where NCCL waits for a lost peer.
FOUR = "--model.num_blocks 2 --model.num_layers 2 --parallel.replicas 2 --parallel.sync never"
FOUR = [*THREE, *FOUR.split()]


def result_of(run_dir):
    return evaluation_of(run_dir), hashes_of(run_dir, 80)


@pytest.fixture(scope="module")
def reference(machine):
    """Three ranks of one torchrun."""
    run_dir = machine.folder / "reference"
    machine.run("dbdist.train", *THREE, "--run_dir", run_dir, ranks=3)
    evaluation, hashes = result_of(run_dir)
    assert evaluation["world_size"] == 3
    assert evaluation["num_samples"] == 360
    assert evaluation["accuracy"] > 0.2, "more than chance, or equal results say little"
    return evaluation, hashes


def run(machine, *words, **variables):
    return machine.finish(machine.start(*words, **variables))


# -- one node --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_deepspeed_launcher_trains_the_same(machine, reference):
    run_dir = machine.folder / "deepspeed"
    words = ("--num_gpus", 3, "--master_port", free_port(), "--module", "dbdist.train")
    printed = run(machine, "deepspeed", *words, *THREE, "--run_dir", run_dir)
    assert "--local_rank=2" in printed, "the launcher passes it"
    assert result_of(run_dir) == reference


@pytest.mark.slow
def test_accelerate_launch_trains_the_same_on_three_ranks(machine, reference):
    run_dir = machine.folder / "accelerate"
    words = ("launch", "--config_file", "launch/accelerate_cpu.yaml", "-m", "dbdist.train")
    run(machine, "accelerate", *words, *THREE, "--run_dir", run_dir)
    assert result_of(run_dir) == reference


@pytest.mark.slow
def test_a_run_that_loses_a_rank_goes_on_by_itself_to_the_same_weights(machine, reference):
    run_dir = machine.folder / "killed"
    agent = machine.start(LAUNCH / "torchrun.sh", "dbdist.train", *THREE, "--run_dir", run_dir,
                          NPROC_PER_NODE=3, MAX_RESTARTS=1)  # fmt: skip
    wait_for_checkpoint(agent, run_dir)
    agent.strike(1)
    printed = machine.finish(agent)
    assert re.search(r"continuing from step (20|40|60)", printed), printed
    assert result_of(run_dir) == reference


def test_a_mistake_is_told_by_every_rank_where_rank_0_holds_the_store(machine):
    """As under the DeepSpeed launcher, whose other ranks must not lose the store first."""
    port = free_port()
    ranks = [
        machine.start(
            *(sys.executable, "-m", "dbdist.train", f"--local_rank={rank}", "--trian.lr=1"),
            **{"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_SIZE": 2},
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
        )
        for rank in range(2)
    ]
    assert [rank.wait(120) for rank in ranks] == [2, 2]
    for i, rank in enumerate(ranks):
        printed = rank.printed()
        assert printed == (
            f"[r{i}] dbdist train: error: unknown option --trian.lr; did you mean --train.lr?\n"
        )


# -- two nodes: two agents on the loopback device --------------------------------------------------


def two_nodes(machine, *words, **variables):
    """An agent with two ranks for each node."""
    variables = {
        "NNODES": 2,
        "NPROC_PER_NODE": 2,
        "RDZV_ENDPOINT": f"127.0.0.1:{free_port()}",
        "LOCAL_ADDR": "127.0.0.1",
    } | variables
    return [machine.start(LAUNCH / "torchrun.sh", *words, **variables) for _ in range(2)]


@pytest.fixture(scope="module")
def on_two_nodes(machine):
    run_dir = machine.folder / "two-nodes"
    machine.finish(*two_nodes(machine, "dbdist.train", *FOUR, "--run_dir", run_dir))
    return run_dir, *result_of(run_dir)


@pytest.mark.slow
def test_two_nodes_train_and_evaluate(machine, on_two_nodes):
    run_dir, trained, hashes = on_two_nodes
    assert trained["world_size"] == 4
    assert trained["accuracy"] > 0.2
    (run_dir / "evaluation.json").unlink()
    machine.finish(*two_nodes(machine, "dbdist.evaluate", "--run_dir", run_dir))
    assert result_of(run_dir) == (trained, hashes)


@pytest.mark.slow
def test_two_nodes_go_on_after_one_has_lost_a_rank(machine, on_two_nodes):
    run_dir = machine.folder / "two-nodes-killed"
    agents = two_nodes(machine, "dbdist.train", *FOUR, "--run_dir", run_dir, MAX_RESTARTS=1)
    wait_for_checkpoint(agents[0], run_dir)
    next(agent for agent in agents if 3 in agent.ranks()).strike(3)
    printed = machine.finish(*agents)
    assert re.search(r"continuing from step (20|40|60)", printed), printed
    assert "connectFullMesh" not in printed, "no rank tried the addresses of the first start"
    assert result_of(run_dir) == on_two_nodes[1:]


# -- Slurm -----------------------------------------------------------------------------------------

SRUN = f"""#!{sys.executable}
# In place of Slurm's: the command once a node, all nodes here.
import os, signal, subprocess, sys
words = sys.argv[1:]
start = next(i for i, word in enumerate(words) if not word.startswith("--"))
with open(os.environ["SLURM_CALLS"], "a") as file:
    print("srun", *words, file=file)
nodes = [
    subprocess.Popen(words[start:], env={{**os.environ, "SLURM_NODEID": str(node)}})
    for node in range(int(os.environ["SLURM_JOB_NUM_NODES"]))
]
for number in (signal.SIGTERM, signal.SIGUSR1):  # which it passes on
    signal.signal(number, lambda number, _: [node.send_signal(number) for node in nodes])
sys.exit(max(abs(node.wait()) for node in nodes))
"""
SCONTROL = """#!/bin/sh
echo "scontrol $*" >> "$SLURM_CALLS"
case "$1" in show) printf 'localhost\\nlocalhost\\nlocalhost\\n' ;; esac
"""


@pytest.fixture
def slurm(machine, tmp_path):
    """Variables of a job on three nodes, with Slurm's commands in PATH."""
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return {
        "PATH": f"{tmp_path}:{BIN}:{os.environ['PATH']}",
        "SLURM_CALLS": tmp_path / "calls",
        "SLURM_JOB_ID": 4711,
        "SLURM_JOB_NODELIST": "node-[1-3]",
        "SLURM_JOB_NUM_NODES": 3,
        "SLURM_CPUS_PER_TASK": 1,
        "SLURM_GPUS_ON_NODE": 1,  # the script's ranks per node
        "RDZV_PORT": free_port(),
        "LOCAL_ADDR": "127.0.0.1",
    }


@pytest.mark.slow
def test_a_slurm_job_stops_in_time_and_ends_the_same_when_it_runs_again(machine, reference, slurm):
    run_dir = machine.folder / "slurm"
    words = ("bash", LAUNCH / "slurm.sbatch", "dbdist.train", *THREE, "--run_dir", run_dir)
    job = machine.start(*words, **slurm)
    wait_for_checkpoint(job, run_dir)
    job.send_signal(signal.SIGUSR1)  # as `--signal=B:USR1@…` has Slurm do
    assert "requeueing job 4711" in machine.finish(job)
    assert not (run_dir / "evaluation.json").exists(), "it was stopped"
    assert not job.end(10.0), "nothing of the step goes on"
    assert slurm["SLURM_CALLS"].read_text().endswith("scontrol requeue 4711\n")

    (saved,) = re.findall(r"stopped at step (\d+) \(SIGUSR1 on ", job.printed())
    printed = run(machine, *words, **slurm)
    assert f"continuing from step {saved} " in printed, printed
    assert result_of(run_dir) == reference
    calls = slurm["SLURM_CALLS"].read_text()
    assert calls.count("scontrol show hostnames node-[1-3]") == 2
    assert calls.count("--cpu-bind=none --cpus-per-task=1") == 2


def test_a_slurm_job_ends_with_the_exit_code_of_its_step(machine, slurm, tmp_path):
    (tmp_path / "srun").write_text("#!/bin/sh\nexit 7\n")
    job = machine.start("bash", LAUNCH / "slurm.sbatch", "dbdist.train", **slurm)
    assert job.wait(60) == 7
    assert "requeue" not in slurm["SLURM_CALLS"].read_text()


# -- the files themselves --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")]), ids=lambda path: path.name
)
def test_scripts_pass_shellcheck(path):
    done = subprocess.run(
        [BIN / "shellcheck", "--external-sources", path], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "NPROC_PER_NODE: is not set"),
        ({"NPROC_PER_NODE": 2, "NNODES": 2}, "RDZV_ENDPOINT: is not set: .* 2 nodes"),
    ],
)
def test_torchrun_sh_says_what_it_needs(machine, variables, message):
    script = machine.start(LAUNCH / "torchrun.sh", "dbdist.train", **variables)
    assert script.wait(60) == 1
    assert re.search(message, script.printed())


def commands():
    """Every command line of launch/README.md, as words; of `… ssh HOST COMMAND`, the command."""
    text = (LAUNCH / "README.md").read_text().replace("\\\n", " ")
    for block in re.findall(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            yield shlex.split(line, comments=True)


def options_of(package, file):
    """The options that a launcher's source declares: importing it would take seconds."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    source = (Path(spec.submodule_search_locations[0]) / file).read_text()
    return set(re.findall(r'"(--?[\w-]+)"', source))


def split_at_module(words, known):
    """(the launcher's own options, dbdist's module and words): every option is a known one."""
    module = next(i for i, word in enumerate(words) if word.startswith("dbdist."))
    own = [part for word in words[:module] for part in word.split("=", 1)]
    assert {word for word in own if word.startswith("-")} <= known, own
    return dict(zip(own, [*own[1:], ""], strict=True)), words[module:]


def check_module(ranks, module, *words):
    """dbdist accepts these words, and has a block for each of the ranks."""
    assert importlib.util.find_spec(module), module
    config = parse_config("test", "", list(words))
    if module == "dbdist.train":
        config.validate()
        dedicated = config.parallel.coordinator == "dedicated"
        assert ranks == config.num_blocks * config.parallel.replicas + dedicated


def check(words):
    variables = {}
    while "=" in words[0]:
        name, _, variables[name] = words.pop(0).partition("=")
    if words[:2] == ["uv", "run"]:
        words = words[2:]
    for word in words:
        if re.match(r"(launch|configs)/", word):
            assert (ROOT / word).is_file(), word
    hosts = (LAUNCH / "hostfile").read_text()
    match words:
        case [".", "launch/env.sh"]:
            pass
        case ["torchrun", *rest]:
            own = torchrun_parser().parse_args(rest)
            assert own.module
            check_module(int(own.nproc_per_node), own.training_script, *own.training_script_args)
        case ["launch/torchrun.sh", *rest]:
            script = (LAUNCH / "torchrun.sh").read_text()
            assert all(f"${{{name}:" in script for name in variables), variables
            nodes = int(variables.get("NNODES", "1"))
            check_module(nodes * int(variables["NPROC_PER_NODE"]), *rest)
        case ["deepspeed", *rest]:
            own, rest = split_at_module(rest, options_of("deepspeed", "launcher/runner.py"))
            assert "--module" in own
            ranks = [own["--num_gpus"]] if "--num_gpus" in own else re.findall(r"=(\d+)", hosts)
            check_module(sum(map(int, ranks)), *rest)
        case ["accelerate", "launch", *rest]:
            own, rest = split_at_module(rest, options_of("accelerate", "commands/launch.py"))
            assert "-m" in own
            values = yaml.safe_load((ROOT / own["--config_file"]).read_text())
            check_module(int(own.get("--num_processes", values["num_processes"])), *rest)
        case ["sbatch", *rest]:
            script = (LAUNCH / "slurm.sbatch").read_text()
            options = dict(re.findall(r"^#SBATCH (--[\w-]+)=(\S+)", script, re.MULTILINE))
            own, rest = split_at_module(rest, options.keys())
            assert "launch/slurm.sbatch" in own
            options |= own
            check_module(int(options["--nodes"]) * int(options["--gpus-per-node"]), *rest)
        case _:
            pytest.fail(f"no such launcher: {words}")


def test_the_readme_names_every_file_and_its_commands_fit():
    found = list(commands())
    assert len(found) > 8
    for words in found:
        check(words)
    text = (LAUNCH / "README.md").read_text()
    assert all(path.name in text for path in LAUNCH.iterdir() if path.name != "README.md")


@pytest.mark.parametrize("name", ["accelerate_cpu.yaml", "accelerate_gpu.yaml"])
def test_accelerates_files_start_ranks_and_leave_the_rest_to_dbdist(name):
    values = yaml.safe_load((LAUNCH / name).read_text())
    assert values["distributed_type"] == "MULTI_GPU"
    assert values["use_cpu"] is (name == "accelerate_cpu.yaml")
    assert values["mixed_precision"] == "no"
    assert not [key for key in values if key.endswith("_config")], "nothing that wraps a model"


def test_the_hostfile_is_one_that_deepspeed_reads():
    lines = [line for line in (LAUNCH / "hostfile").read_text().splitlines() if line]
    hosts = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"\S+\s+slots=\d+", line) for line in hosts)  # as its runner does
    assert len(hosts) == 2
