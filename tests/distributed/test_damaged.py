"""Seven kinds of damage to the newest checkpoint of a real run: refused by name before any weight
changes, with the newest intact one offered, or taken (`checkpoint.fallback`)."""

import json
import re
import shutil

import pytest
import torch
from machine import SMALL
from ranks import setup_of
from reading import lines_of

from dbdist.checkpoint import manifest as checkpoint
from dbdist.checkpoint.choose import Candidates, set_aside
from dbdist.checkpoint.manifest import complete_folders, find_checkpoint
from dbdist.commands.export import export
from dbdist.errors import CheckpointError
from dbdist.inference.of_run import evaluate_run
from dbdist.parallel.layout import Layout
from dbdist.parallel.topology import Topology
from dbdist.run.folder import config_of_run
from dbdist.training.rank_state import RankState
from dbdist.training.state_files import files_to_restore, restore

ALONE, BLOCKS = Topology(Layout(1)), [0, 1, 2]
WORDS = (*SMALL, "--train.max_steps", "15", "--checkpoint.every_steps", "5")
WORDS = (*WORDS, "--checkpoint.keep_last", "3")


@pytest.fixture(scope="module")
def trained(machine):
    """A run with checkpoints of steps 5, 10 and 15."""
    folder = machine.folder / "run"
    machine.run("dbdist.train", *WORDS, "--run_dir", folder, ranks=3)
    return folder


@pytest.fixture
def copy(trained, tmp_path):
    """(a copy of the run, the folder of its newest checkpoint)."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run", tmp_path / "run/checkpoints/step-00000015"


def truncate(path):
    file = path / "block-1.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def flip_a_bit(path, name="block-1.safetensors"):
    content = bytearray((path / name).read_bytes())
    content[-7] ^= 4
    (path / name).write_bytes(content)


def remove(path):
    (path / "block-1.safetensors").unlink()


def swap(path):
    one, other = path / "block-1.safetensors", path / "block-2.safetensors"
    one.rename(path / "x")
    other.rename(one)
    (path / "x").rename(other)


def change_version(path):
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "version": 2}))


def put_foreign_file(path):
    shutil.copy(path.with_name("step-00000010") / "block-1.safetensors", path)


def put_foreign_model(path):
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["model"]["layers_per_block"] = [1, 2, 3]
    (path / "manifest.json").write_text(json.dumps(manifest))


DAMAGE = {
    truncate: r"block-1\.safetensors is damaged: \d+ bytes, \d+ were written",
    flip_a_bit: r"block-1\.safetensors is damaged: its SHA-256",
    remove: r"block-1\.safetensors is missing",
    swap: r"block-1\.safetensors is damaged: it holds the content of block-2\.safetensors",
    change_version: r"manifest\.json is of version 2; this dbdist reads version 1",
    put_foreign_file: r"block-1\.safetensors is damaged: its SHA-256",
    put_foreign_model: r"step-00000015 holds a model with layers_per_block \[1, 2, 3\]",
}
cases = pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)


def config_of(folder, *words):
    return config_of_run("test", "", ["--run_dir", str(folder), *words])


def chosen(folder, fallback, step=None):
    """What one process that reads everything chooses."""
    config = config_of(folder, "--mode", "sequential")
    needed = files_to_restore(config, ALONE, BLOCKS)
    model = setup_of(config).describe()
    found = Candidates(folder, ALONE, model, lambda _: needed, fallback=fallback, is_training=True)
    return found.newest() if step is None else found.of_step(step)


@cases
def test_damage_is_told_by_name_and_the_newest_intact_step_is_offered(copy, damage):
    folder, path = copy
    damage(path)
    before = sorted(p.name for p in path.parent.iterdir())
    offer = "; step 10 is intact: add --checkpoint.fallback true to continue from it"
    with pytest.raises(CheckpointError, match=DAMAGE[damage]) as caught:
        chosen(folder, fallback=False)
    assert str(caught.value).endswith(offer)
    assert "\n" not in str(caught.value)
    assert sorted(p.name for p in path.parent.iterdir()) == before


def test_another_model_is_no_damage(copy):
    folder, _ = copy
    other = {**setup_of(config_of(folder)).describe(), "data": "mnist5k"}
    found = Candidates(folder, ALONE, other, lambda _: [], fallback=False)
    with pytest.raises(CheckpointError, match="data digits, the configuration says mnist5k; use"):
        found.newest()


@cases
def test_the_newest_intact_checkpoint_is_taken_and_what_is_damaged_set_aside(copy, damage, capsys):
    folder, path = copy
    damage(path)
    choice = chosen(folder, fallback=True)
    assert choice.checkpoint.step == 10
    assert choice.damaged == [path]
    assert path.exists()
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1
    assert re.search(f"warning: .*{DAMAGE[damage]}.*; step 10 is the newest intact one", warning)
    (path.parent / "step-00000015.damaged").mkdir()
    set_aside(choice.damaged)
    assert not path.exists()
    assert (path.parent / "step-00000015.damaged-2/block-0.safetensors").exists()
    assert [p.name for p in complete_folders(path.parent)] == ["step-00000005", "step-00000010"]
    assert chosen(folder, fallback=False).checkpoint.step == 10
    assert capsys.readouterr().err == ""


@cases
def test_no_weight_changes_before_all_is_checked(copy, damage):
    folder, path = copy
    config = config_of(folder, "--mode", "sequential")
    state = RankState(config, ALONE, setup_of(config), BLOCKS)
    before = {name: tensor.clone() for name, tensor in state.parameters.items()}
    damage(path)
    with pytest.raises(CheckpointError, match=DAMAGE[damage]):
        restore(state, find_checkpoint(folder))
    after = state.parameters
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any(owned.engine.optimizer.state for owned in state.blocks)
    assert not state.sync.optimizer.state


def test_damage_of_several_checkpoints_is_passed_over(copy, capsys):
    folder, path = copy
    swap(path)
    remove(path.with_name("step-00000010"))
    with pytest.raises(CheckpointError, match="step 5 is intact: add"):
        chosen(folder, fallback=False)
    choice = chosen(folder, fallback=True)
    assert choice.checkpoint.step == 5
    assert [p.name for p in choice.damaged] == ["step-00000015", "step-00000010"]
    change_version(path.with_name("step-00000005"))
    for fallback in (False, True):
        with pytest.raises(CheckpointError, match=r"holds the content.*no other .* is intact"):
            chosen(folder, fallback)
    assert len(complete_folders(path.parent)) == 3


def test_a_step_that_is_asked_for_is_never_replaced(copy):
    folder, path = copy
    truncate(path)
    with pytest.raises(CheckpointError, match=r"block-1\.safetensors.*; give another --eval\.step"):
        evaluate_run(config_of(folder, "--eval.step", "15", "--checkpoint.fallback", "true"), ALONE)
    assert evaluate_run(config_of(folder, "--eval.step", "10"), ALONE).step == 10
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 7; it has \[5, 10, 15\]"):
        evaluate_run(config_of(folder, "--eval.step", "7"), ALONE)


def test_evaluation_and_export_fall_back_and_rename_nothing(copy, tmp_path, capsys):
    folder, path = copy
    flip_a_bit(path)
    with pytest.raises(CheckpointError, match=r"add --checkpoint\.fallback true to use it"):
        evaluate_run(config_of(folder), ALONE)
    with pytest.raises(CheckpointError, match=r"add --checkpoint\.fallback true to use it"):
        export(config_of(folder), tmp_path / "out")
    fallback = config_of(folder, "--checkpoint.fallback", "true")
    assert evaluate_run(fallback, ALONE).step == 10
    export(fallback, tmp_path / "out")
    assert (tmp_path / "out/config.json").exists()
    assert capsys.readouterr().err.count("warning: ") == 2
    assert path.exists()


def test_a_file_that_a_rank_does_not_need_is_not_hashed(copy, monkeypatch):
    """Each rank reads its own blocks' files and the shared ones, each once."""
    folder, path = copy
    hashed = []
    sha256 = checkpoint._sha256
    monkeypatch.setattr(checkpoint, "_sha256", lambda p: hashed.append(p.name) or sha256(p))
    config = config_of(folder)
    one = Topology(Layout(3), rank=1)
    needed = files_to_restore(config, one, [1])
    model = setup_of(config).describe()
    flip_a_bit(path, "block-2.safetensors")
    found = Candidates(folder, one, model, lambda _: needed, fallback=False, is_training=True)
    choice = found.newest()
    for file in needed:
        choice.checkpoint.tensors(file)
    assert hashed == ["shared.safetensors", "block-1.safetensors", "block-1.optimizer.safetensors"]


def test_every_rank_refuses_with_the_same_offer(machine, copy):
    folder, path = copy
    flip_a_bit(path, "block-2.safetensors")  # rank 2 alone reads it
    before = (folder / "metrics.jsonl").read_bytes()
    offer = r"block-2\.safetensors is damaged.*step 10 is intact: add --checkpoint\.fallback true"
    machine.assert_refused(("dbdist.train", *WORDS, "--run_dir", folder), 3, offer)
    assert (folder / "metrics.jsonl").read_bytes() == before
    assert path.exists()


@pytest.mark.slow
def test_a_run_that_falls_back_ends_as_if_nothing_had_happened(machine, copy):
    folder, path = copy
    expected = json.loads((path / "manifest.json").read_text())["files"]
    flip_a_bit(path, "block-2.optimizer.safetensors")
    words = (*WORDS, "--run_dir", folder, "--checkpoint.fallback", "true")
    out = machine.run("dbdist.train", *words, ranks=3)
    assert len(re.findall(r"warning: .*block-2\.optimizer\.safetensors is damaged", out)) == 1
    assert "continuing from step 10" in out
    assert json.loads((path / "manifest.json").read_text())["files"] == expected
    names = sorted(p.name for p in path.parent.iterdir())
    steps = [f"step-{step:08d}" for step in (5, 10, 15)]
    assert names == [*steps, "step-00000015.damaged"]
    assert "step-00000015\n" in out
    steps = [line["step"] for line in lines_of(folder)]
    assert steps == sorted(set(steps))
