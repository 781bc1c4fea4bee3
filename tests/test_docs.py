"""README and docs: their commands parse, their links lead somewhere, their example works."""

import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.run import get_args_parser

import dbdist
from dbdist.cli import COMMANDS, main
from dbdist.commands import plan
from dbdist.config import registry
from dbdist.config.parse import parse_config
from dbdist.config.presets import presets

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKED = [*PAGES, ROOT / "launch" / "README.md", ROOT / "docker" / "README.md"]
NEW_TASK = ROOT / "docs" / "adding-a-task.md"


def blocks(page, language=""):
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def commands():
    """Every whole command of the pages, as (page, words after `uv run`)."""
    for page in PAGES:
        lines = [line for block in blocks(page) for line in block.splitlines()]
        for text in [*lines, *re.findall(r"`([^`\n]+)`", page.read_text())]:
            if text.startswith("uv run ") and "…" not in text:
                yield page, shlex.split(text)[2:]


def config_of(first, words):
    """The configuration of train's words, whose first may be its file or preset."""
    if words and not words[0].startswith("-"):
        words = [first, *words]
    if first == "--config":
        return parse_config("test", "", words).validate()
    return parse_config("test", "", words)


def check(words):
    match words:
        case ["torchrun", *rest]:
            own = get_args_parser().parse_args(rest)
            command, given = own.training_script, own.training_script_args
            if command.endswith(".py"):
                command, given = f"dbdist.{given[0]}", given[1:]
            if command == "dbdist.train" and "points" not in given:
                config = config_of("--config", given)
                ranks = config.num_blocks * config.parallel.replicas
                assert int(own.nproc_per_node) == ranks
            else:
                assert command in ("dbdist.train", "dbdist.evaluate", "dbdist.commands.sample")
        case ["dbdist", "train", *rest] if "--help" not in rest:
            config_of("--config", rest)
        case ["dbdist", "evaluate", *rest]:
            config_of("--run_dir", rest)
        case ["dbdist", "configs", name]:
            assert name in presets()
        case ["dbdist", "plan", name, *rest] if name in presets():
            plan.run([name, *rest])
        case ["dbdist", "plan" | "check-data", name, *_]:
            assert name in presets() or name == "CONFIG"
        case ["dbdist", command, *_]:
            assert command in COMMANDS
        case ["python", "-m", module, *_]:
            assert importlib.util.find_spec(module)
        case ["python", "points.py", command, *_]:
            assert command in COMMANDS
        case _:
            assert words[0] in ("pytest", "tensorboard")


def test_commands_are_as_they_are_typed():
    found = list(commands())
    assert len(found) > 20
    for page, words in found:
        try:
            check(words)
        except (Exception, SystemExit) as error:
            pytest.fail(f"{page.name}: {shlex.join(words)}: {error!r}")


def test_links_lead_to_files_and_headings():
    for page in LINKED:
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if link.startswith("http"):
                continue
            path, _, heading = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.is_file(), f"{page}: {link}"
            titles = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            anchors = [re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles]
            assert not heading or heading in anchors, link


@pytest.fixture
def example(tmp_path, monkeypatch):
    """The files of docs/adding-a-task.md in the current folder; their names are removed after."""
    text = NEW_TASK.read_text()
    for name, code in re.findall(r"^## `(\w+\.py)`.*?^```python\n(.*?)^```$", text, re.M | re.S):
        (tmp_path / name).write_text(code)
        monkeypatch.delitem(sys.modules, name[:-3], raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    kept = {section: {**names} for section, names in registry.SECTIONS.items()}
    yield tmp_path
    for section, names in kept.items():
        registry.SECTIONS[section].clear()
        registry.SECTIONS[section].update(names)


def test_the_example_of_a_new_task_trains_evaluates_and_loads(example):
    importlib.import_module("points")
    common = ["--task.name", "points", "--run_dir", "runs/points", "--mode", "sequential"]
    main(["train", *common, "--train.max_steps", "60", "--train.lr", "3e-3"])
    trained = json.loads(Path("runs/points/evaluation.json").read_text())
    assert 0 < trained["mse"] < 0.1  # the points' own spread is 1/3
    main(["evaluate", "runs/points"])
    assert json.loads(Path("runs/points/evaluation.json").read_text())["mse"] == trained["mse"]
    main(["export", "runs/points", "out/points"])
    angle = torch.tensor([1.0, 2.0, 3.0])
    request = {"input": torch.stack([angle.cos(), angle.sin()], dim=1)}
    assert dbdist.load("out/points")(request).shape == (3, 2)
