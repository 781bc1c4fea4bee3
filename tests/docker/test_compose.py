"""The compose files and the commands in docker/README.md: their options exist, their paths fit the
image, and two "machines" meet."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
from compose_files import DOCKER, load, words_of_service
from torch.distributed.run import parse_args, parse_min_max_nnodes

from dbdist import __version__
from dbdist.config.parse import parse_config
from dbdist.inference.of_run import layout_for_evaluation
from dbdist.parallel.layout import layout_of

ROOT = DOCKER.parent
ONE, TWO = "compose.yaml", "compose.two-nodes.yaml"
REQUIRED = {"MASTER_ADDR": "127.0.0.1", "NODE1_ADDR": "127.0.0.1", "DBDIST_RUNS": "/shared/runs"}
SERVICES = [(ONE, "train"), (TWO, "node0"), (TWO, "node1")]


def checked(words):
    """The configuration of a torchrun command whose options exist and whose processes fit it."""
    assert words[0] == "torchrun"
    launch = parse_args(words[1:])
    assert launch.module
    options = launch.training_script_args
    for option, value in pairwise(options):
        assert option != "--config" or (ROOT / value).is_file()
    config = parse_config("test", "", options)
    nodes, most = parse_min_max_nnodes(launch.nnodes)
    assert nodes == most
    world_size = nodes * int(launch.nproc_per_node)
    if launch.training_script == "dbdist.evaluate":
        layout_for_evaluation(config, world_size)
    else:
        assert launch.training_script == "dbdist.train"
        layout_of(config.validate(), world_size).check(world_size)
    return config


def volumes_of(service):
    return dict(volume.rsplit(":", 1)[::-1] for volume in service["volumes"])


@pytest.mark.parametrize(("file", "name"), SERVICES)
@pytest.mark.parametrize(
    "more", [{}, {"DBDIST_OPTIONS": "--train.lr 1e-4 --train.betas '[0.8, 0.9]'"}]
)
def test_a_services_command_is_one_that_dbdist_takes(file, name, more):
    config = checked(words_of_service(file, name, **REQUIRED, **more))
    assert (config.train.betas == (0.8, 0.9)) == bool(more)


@pytest.mark.parametrize(("file", "name"), SERVICES)
@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_finds_its_data_and_runs_on_the_volumes(file, name, path):
    config = parse_config("test", "", ["--config", str(path)])
    service = load(file, **REQUIRED)["services"][name]
    folder = Path(re.findall(r"^WORKDIR (.*)$", (DOCKER / "Dockerfile").read_text(), re.M)[-1])
    assert set(volumes_of(service)) == {
        str(folder / config.data.root),
        str((folder / config.run_dir).parent),
    }


@pytest.mark.parametrize("file", [ONE, TWO])
def test_a_file_builds_and_runs_the_image_of_this_version_on_all_gpus(file):
    content = load(file, **REQUIRED)
    for service in content["services"].values():
        assert service["image"] == f"dbdist:{__version__}"
        context = DOCKER / service["build"]["context"]
        assert (context / service["build"]["dockerfile"]).samefile(DOCKER / "Dockerfile")
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
        named = {source for source in volumes_of(service).values() if "/" not in source}
        assert named <= set(content["volumes"])


def test_eight_processes_on_each_of_two_nodes_are_eight_replicas_of_two_blocks():
    for name in ("node0", "node1"):
        config = checked(words_of_service(TWO, name, **REQUIRED, DBDIST_PROCESSES="8"))
        assert (config.model.num_blocks, config.parallel.replicas) == (2, 8)


@pytest.mark.parametrize("missing", REQUIRED)
def test_two_nodes_do_not_start_without_their_addresses_and_a_shared_folder(missing):
    with pytest.raises(ValueError, match=missing):
        load(TWO, **{name: value for name, value in REQUIRED.items() if name != missing})


def readme_commands():
    """(what docker or torchrun is told, the words in the container) of the README's commands."""
    text = (DOCKER / "README.md").read_text()
    for block in re.findall(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            before, image, words = line.partition(f"dbdist:{__version__} ")
            if image and words.strip() != ".":
                yield shlex.split(words)
            elif " run " in before and " train " in before:
                yield shlex.split(before.partition(" train ")[2])


def test_the_readmes_commands_are_ones_that_the_image_takes():
    commands = list(readme_commands())
    assert len(commands) > 2
    for words in commands:
        if words[0] == "torchrun":
            checked(words)
        elif words[:2] in (["dbdist", "train"], ["dbdist", "evaluate"]):
            parse_config("test", "", [word for word in words[2:] if word != "--help"])
        else:
            assert words[0] in ("dbdist", "tensorboard", "python"), words


@pytest.mark.slow
def test_two_nodes_meet_and_train_whichever_starts_first(tmp_path):
    """Both commands at once on this machine, the second node's first: CPU instead of GPUs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    options = f"--model.num_blocks 2 --train.max_steps 2 --device cpu --run_dir {tmp_path}/run"
    variables = REQUIRED | {
        "MASTER_PORT": port,
        "DBDIST_CONFIG": "configs/digits.yaml",
        "DBDIST_OPTIONS": options,
    }
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    nodes = []
    for name in ("node1", "node0"):
        nodes.append(
            subprocess.Popen(
                words_of_service(TWO, name, **variables),
                cwd=ROOT,
                env={**os.environ, "PATH": path, "TORCH_DISTRIBUTED_DEBUG": "OFF"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
        time.sleep(3)
    try:
        told = [node.communicate(timeout=120)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(told)
    assert json.loads((tmp_path / "run/evaluation.json").read_text())["world_size"] == 2
