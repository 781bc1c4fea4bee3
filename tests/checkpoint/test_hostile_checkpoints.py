"""Manifests, weights and exported models that were changed: used, or refused in one sentence."""

import dataclasses
import hashlib
import json
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hostile import changed_bytes, changed_json, changed_safetensors, few
from hypothesis import given
from hypothesis import strategies as st
from ranks import config_of, setup_of

import dbdist
from dbdist.checkpoint.choose import Candidates
from dbdist.checkpoint.manifest import find_checkpoint
from dbdist.checkpoint.weights import load_weights
from dbdist.checkpoint.writer import CheckpointWriter
from dbdist.commands.export import export
from dbdist.errors import CheckpointError, ConfigError
from dbdist.inference.load_models import load_block
from dbdist.inference.published import load_published_vit
from dbdist.parallel.layout import Layout
from dbdist.parallel.topology import Topology
from dbdist.run.folder import claim
from dbdist.training.rank_state import RankState
from dbdist.training.state_files import files_of, files_to_restore, restore

pytestmark = pytest.mark.timeout(120)
PUBLISHED = Path(__file__).parents[1] / "golden/a/weights.safetensors"
ALONE, BLOCKS = Topology(Layout(1)), [0, 1, 2]


def state_of(config, seed=0):
    """A rank's state, with something in its optimizers."""
    config = dataclasses.replace(config, seed=seed)
    state = RankState(config, ALONE, setup_of(config), BLOCKS)
    for parameter in [p for owned in state.blocks for p in owned.module.parameters()]:
        parameter.grad = torch.full_like(parameter, 0.1 * (seed + 1))
    for parameter in state.shared.parameters():
        parameter.grad = torch.full_like(parameter, 0.1 * (seed + 1))
    for owned in state.blocks:
        owned.engine.step(torch.tensor(1.0))
    state.sync.step(1)
    return state


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(folder of a run with a checkpoint of step 1, its configuration)."""
    folder = tmp_path_factory.mktemp("hostile") / "run"
    config = config_of(
        f"run_dir={folder}", "mode=sequential", "train.ema_decay=0.5", "train.max_steps=1"
    )
    claim(config, 100, None)
    state = state_of(config, seed=7)
    writer = CheckpointWriter(folder, ALONE, {0}, keep_last=9)
    writer.save(1, files_of(state), {"model": setup_of(config).describe(), "samples_seen": 1})
    writer.finish(10.0)
    return folder, config


def restamp(path, manifest, file):
    """Makes the manifest state what is now in the file, so that what comes after is reached."""
    content = (path / file).read_bytes()
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    changed = json.loads(manifest)
    changed["files"][file] = entry
    (path / "manifest.json").write_text(json.dumps(changed))


def tensors_of(state):
    own = dict(state.parameters)
    assert state.ema is not None
    own |= {f"ema {name}": tensor for name, tensor in state.ema.averages.items()}
    for name, optimizer in (
        *((str(owned.index), owned.engine.optimizer) for owned in state.blocks),
        ("shared", state.sync.optimizer),
    ):
        for i, entry in optimizer.state_dict()["state"].items():
            own |= {f"optimizer {name} {i} {kind}": tensor for kind, tensor in entry.items()}
    return {name: tensor.detach().clone() for name, tensor in own.items()}


def assert_one_sentence(error, about=""):
    assert "\n" not in str(error)
    assert len(str(error)) < 1000
    assert str(about) in str(error)


@contextmanager
def restored(path):
    """A file to change, that is as it was afterwards."""
    original = path.read_bytes()
    try:
        yield path
    finally:
        path.write_bytes(original)


def assert_used_or_refused(exported):
    try:
        dbdist.load(exported)
    except CheckpointError as error:
        assert_one_sentence(error)


# -- the manifest ----------------------------------------------------------------------------------


def use(config, folder):
    """All that a run which continues asks of its checkpoints."""
    model = setup_of(config).describe()
    needed = files_to_restore(config, ALONE, BLOCKS)
    found = Candidates(folder, ALONE, model, lambda _: needed, fallback=True, is_training=True)
    choice = found.newest()
    if choice is not None:
        for file in needed:
            choice.checkpoint.tensors(file)


@few
@given(data=st.data())
def test_a_changed_manifest_is_used_or_refused(run, data):
    folder, config = run
    path = folder / "checkpoints/step-00000001/manifest.json"
    original = path.read_bytes()
    outside = folder / "checkpoints/outside.safetensors"
    shutil.copy(path.parent / "shared.safetensors", outside)
    manifest = json.loads(original)
    if data.draw(st.booleans()):
        content = json.dumps(data.draw(changed_json(manifest))).encode()
    else:
        content = data.draw(changed_bytes(original))
    with restored(path):
        path.write_bytes(content)
        try:
            use(config, folder)
        except CheckpointError as error:
            assert_one_sentence(error, folder)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "..", "a/b", "", ".x"])
def test_a_manifest_that_names_files_elsewhere_is_refused_whatever_their_hash(run, name):
    folder, config = run
    with restored(folder / "checkpoints/step-00000001/manifest.json") as path:
        manifest = json.loads(path.read_bytes())
        manifest["files"][name] = manifest["files"]["shared.safetensors"]
        path.write_text(json.dumps(manifest))
        with pytest.raises(
            CheckpointError, match=r"manifest\.json is damaged: .*no name of a file"
        ):
            use(config, folder)


# -- weights, with a manifest that states their hash -----------------------------------------------


FILES = [
    f"{name}{kind}.safetensors"
    for name in ("shared", "block-1")
    for kind in ("", ".ema", ".optimizer")
]


@pytest.fixture(scope="module")
def held(run):
    """A rank's state to restore into, and what it holds."""
    state = state_of(run[1])
    return state, tensors_of(state)


@pytest.mark.parametrize("file", FILES)
@few
@given(data=st.data())
def test_changed_weights_are_restored_or_refused_before_anything_changes(run, held, file, data):
    folder, _ = run
    state, before = held
    path = folder / "checkpoints/step-00000001"
    original, manifest = (path / file).read_bytes(), (path / "manifest.json").read_bytes()
    (path / file).write_bytes(data.draw(changed_safetensors(original)))
    restamp(path, manifest, file)
    checkpoint = find_checkpoint(folder)
    try:
        try:
            load_block(state.setup, checkpoint, 1, ALONE.device)
        except CheckpointError as error:
            assert_one_sentence(error)
        try:
            restore(state, checkpoint)
        except CheckpointError as error:
            assert_one_sentence(error, file)
            after = tensors_of(state)
            assert after.keys() == before.keys()
            assert all(torch.equal(after[name], before[name]) for name in before)
        else:
            before.clear()
            before.update(tensors_of(state))
    finally:
        (path / file).write_bytes(original)
        (path / "manifest.json").write_bytes(manifest)


def test_a_header_whose_error_has_several_lines_is_refused_in_one(tmp_path):
    path = tmp_path / "x.safetensors"
    header = json.dumps({"x": {"dtype": "a\nb", "shape": [1], "data_offsets": [0, 4]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(CheckpointError) as caught:
        load_weights(path)
    assert_one_sentence(caught.value, path)


# -- exported models -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "out"
    export(run[1], out)
    return out


@few
@given(data=st.data())
def test_a_changed_description_of_a_model_is_used_or_refused(exported, data):
    with restored(exported / "config.json") as path:
        path.write_text(json.dumps(data.draw(changed_json(json.loads(path.read_bytes())))))
        assert_used_or_refused(exported)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("sampler", "num_steps", 10**9),
        ("sampler", "num_draws", 10**9),
        ("model", "num_blocks", 10**9),
        ("model", "hidden_size", 12 * 10**9),
        ("model", "mlp_size", 10**12),
        ("data", "num_classes", 10**12),
        ("data", "image_size", 8 * 10**6),
        ("layers_per_block", 0, 10**9),
    ],
)
@pytest.mark.timeout(20)
def test_a_description_that_asks_for_too_much_is_refused_at_once(exported, section, key, value):
    with restored(exported / "config.json") as path:
        config = json.loads(path.read_bytes())
        config[section][key] = value
        path.write_text(json.dumps(config))
        with pytest.raises(CheckpointError):
            dbdist.load(exported)


@few
@given(data=st.data())
def test_changed_weights_of_a_model_are_used_or_refused(exported, data):
    with restored(exported / "model.safetensors") as path:
        path.write_bytes(data.draw(changed_safetensors(path.read_bytes())))
        assert_used_or_refused(exported)


# -- published weights -----------------------------------------------------------------------------


@few
@given(data=st.data())
def test_changed_published_weights_are_used_or_refused(tmp_path, data):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(data.draw(changed_safetensors(PUBLISHED.read_bytes())))
    try:
        load_published_vit(path)
    except (CheckpointError, ConfigError) as error:
        assert_one_sentence(error)
