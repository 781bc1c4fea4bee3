"""An exported model predicts as the blocks do; a damaged one is refused in one sentence."""

import dataclasses
import json
import os
import struct
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from vits import block_of, randomize, shared_of

import dbdist
from dbdist import seeds
from dbdist.checkpoint.weights import fill, load_weights
from dbdist.config.config import Config
from dbdist.data.images import DatasetSpec
from dbdist.data.options import ImageOptions
from dbdist.errors import CheckpointError
from dbdist.inference.exported import Description, save_model
from dbdist.models.denoiser import Denoiser
from dbdist.models.options import ViTOptions
from dbdist.models.vit import ViTConfig
from dbdist.processes.direct import Direct
from dbdist.processes.gaussian import Gaussian, NoiseSchedule
from dbdist.processes.options import GaussianOptions
from dbdist.sampling.sampler import Rows, Sampler
from dbdist.tasks.classification import Classification
from dbdist.tasks.options import ClassificationOptions, ClassificationSamplerOptions

SPEC = DatasetSpec("digits", 1, 4, 5, (0.3,), (0.4,), tuple("abcde"))
SIZES = ViTConfig(
    image_size=4, channels=1, num_classes=5, patch_size=2, hidden_size=12, num_heads=2, mlp_size=16
)
MODEL = ViTOptions(
    num_blocks=2,
    num_layers=3,
    layers_per_block=(1, 2),
    patch_size=2,
    hidden_size=12,
    num_heads=2,
    mlp_size=16,
    init="published",
)
SCHEDULE = NoiseSchedule(2)
SAMPLER = {
    "num_steps": 4,
    "start": "noise",
    "num_draws": 2,
    "label_table": "raw",
    "readout": (0, 1),
    "guidance_scale": 1.5,
}


def config_of(mode="block_parallel", **sampler):
    return Config(
        mode=mode,
        model=MODEL,
        noise=GaussianOptions(),
        data=ImageOptions(),
        sampler=ClassificationSamplerOptions(**SAMPLER | sampler),
    )


def modules(private=False):
    """(shared modules of each block, blocks of one and two layers)."""
    shared = [randomize(shared_of(SIZES), 10 * b if private else 0) for b in range(2)]
    blocks = [randomize(block_of(SIZES, r), 1) for r in (range(1), range(1, 3))]
    return shared, blocks


def weights_of_blocks(private=False):
    shared, blocks = modules(private)
    weights = {n: p.detach() for block in blocks for n, p in block.named_parameters()}
    for b, own in enumerate(shared if private else shared[:1]):
        prefix = f"block-{b}.shared." if private else "shared."
        weights |= {f"{prefix}{n}": p.detach() for n, p in own.named_parameters()}
    return weights


def export_blocks(out, private=False, **sampler):
    description = Description(config_of(**sampler), SPEC, (1, 2), private)
    save_model(out, weights_of_blocks(private), description)
    return out


def plain_modules():
    return randomize(shared_of(SIZES, is_plain=True)), randomize(
        block_of(SIZES, range(3), is_plain=True), 1
    )


def export_plain(out):
    shared, block = plain_modules()
    weights = {f"shared.{n}": p.detach() for n, p in shared.named_parameters()}
    weights |= {n: p.detach() for n, p in block.named_parameters()}
    save_model(out, weights, Description(config_of("end_to_end"), SPEC, (3,)))
    return Denoiser(shared, block, Direct()).eval()


def network_of(model):
    """The module inside a loaded classifier."""
    return model._answer


def pixels(num_samples=7):
    return torch.rand(num_samples, 1, 4, 4, generator=torch.Generator().manual_seed(3))


# -- prediction ------------------------------------------------------------------------------------


@pytest.mark.parametrize("private", [False, True])
@torch.no_grad()
def test_a_loaded_model_answers_as_its_blocks_in_turn(tmp_path, private):
    model = dbdist.load(export_blocks(tmp_path, private))
    shared, blocks = modules(private)
    process = Gaussian(SCHEDULE)
    sampler = Sampler(process, SCHEDULE.steps(4), 0, "noise", num_draws=2, guidance_scale=1.5)
    options = ClassificationSamplerOptions(label_table="raw")
    task = Classification(ClassificationOptions(), options, SPEC, 12, 2)
    z = sampler.initial_state(task, Rows(0, 7), torch.float32)
    images, answers = (pixels() - 0.3) / 0.4, []
    for b in range(2):
        denoiser = Denoiser(shared[b], blocks[b], process)
        z, answer = sampler.run_block(b, denoiser, task, shared[b], images, z)
        answers.append(answer)
    expected = (answers[0] + answers[1]) / 2
    torch.testing.assert_close(model.predict_proba(pixels()), expected, rtol=1e-5, atol=1e-7)
    assert model.predict(pixels()).tolist() == expected.argmax(1).tolist()


@torch.no_grad()
def test_a_loaded_plain_model_answers_with_probabilities(tmp_path):
    network = export_plain(tmp_path)
    expected = network((pixels() - 0.3) / 0.4, torch.zeros(7, 0), None).softmax(-1)
    torch.testing.assert_close(dbdist.load(tmp_path).predict_proba(pixels()), expected)


def test_readout_of_the_last_block_is_its_answer_alone(tmp_path):
    both = dbdist.load(export_blocks(tmp_path / "both")).predict_proba(pixels())
    each = [
        dbdist.load(export_blocks(tmp_path / str(b), readout=(b,))).predict_proba(pixels())
        for b in range(2)
    ]
    torch.testing.assert_close(both, (each[0] + each[1]) / 2)


def test_blocks_share_one_set_of_shared_modules_unless_each_has_its_own(tmp_path):
    for private in (False, True):
        network = network_of(dbdist.load(export_blocks(tmp_path / str(private), private)))
        sets = {id(denoiser.shared) for denoiser in network.denoisers}
        assert len(sets) == (2 if private else 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_the_network_has_the_precision_of_its_weights(tmp_path, dtype):
    weights = load_file(export_blocks(tmp_path) / "model.safetensors")
    save_file({k: v.to(dtype) for k, v in weights.items()}, tmp_path / "model.safetensors")
    model = dbdist.load(tmp_path)
    assert {p.dtype for p in network_of(model).parameters()} == {dtype}
    assert model.predict_proba(pixels()).shape == (7, 5)


@pytest.mark.parametrize("kind", ["blocks", "plain"])
def test_images_may_be_bytes_floats_arrays_and_without_a_channel(tmp_path, kind):
    {"blocks": export_blocks, "plain": export_plain}[kind](tmp_path)
    model = dbdist.load(tmp_path)
    raw = (pixels() * 255).round().to(torch.uint8)
    expected = model.predict_proba(raw)
    same = [
        raw.float() / 255,
        raw.double() / 255,
        raw[:, 0],
        raw.numpy(),
        raw[:, 0].double().numpy() / 255,
    ]
    for images in same:
        torch.testing.assert_close(model.predict_proba(images), expected)
    assert model.predict(raw).dtype == torch.int64
    torch.testing.assert_close(expected.sum(1), torch.ones(7))


def test_a_plain_model_does_not_depend_on_the_batch_size(tmp_path):
    export_plain(tmp_path)
    model = dbdist.load(tmp_path)
    whole = model.predict_proba(pixels())
    torch.testing.assert_close(model.predict_proba(pixels(), batch_size=3), whole)


def test_a_chain_from_the_mean_does_not_depend_on_the_batch_size(tmp_path):
    model = dbdist.load(export_blocks(tmp_path, start="mean", num_draws=1))
    whole = model.predict_proba(pixels())
    torch.testing.assert_close(model.predict_proba(pixels(), batch_size=3), whole)


def test_two_batches_of_a_noise_start_draw_different_noise(tmp_path):
    model = dbdist.load(export_blocks(tmp_path, num_draws=1))
    same = pixels(1).expand(4, 1, 4, 4)
    first, second = model.predict_proba(same, batch_size=2).split(2)
    assert not torch.allclose(first, second)


@pytest.mark.parametrize("kind", ["blocks", "plain"])
def test_no_images_give_no_answers(tmp_path, kind):
    {"blocks": export_blocks, "plain": export_plain}[kind](tmp_path)
    model = dbdist.load(tmp_path)
    for images in (torch.zeros(0, 1, 4, 4), torch.zeros(0, 4, 4, dtype=torch.uint8)):
        assert model.predict_proba(images).shape == (0, 5)
        assert model.predict(images).shape == (0,)


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(2, 3, 4, 4),
        torch.zeros(2, 1, 8, 8),
        torch.zeros(2, 1, 4, 5),
        torch.zeros(2, 2, 1, 4, 4),
        torch.zeros(()),
        torch.zeros(2, 1, 4, 4, dtype=torch.int64),
        torch.zeros(2, 1, 4, 4, dtype=torch.bool),
        torch.full((2, 1, 4, 4), 1.5),
        torch.full((2, 1, 4, 4), -0.1),
        torch.full((2, 1, 4, 4), float("nan")),
        np.full((2, 1, 4, 4), 256.0),
    ],
)
def test_images_of_another_shape_type_or_range_are_a_value_error(tmp_path, images):
    model = dbdist.load(export_blocks(tmp_path))
    with pytest.raises(ValueError, match="images"):
        model.predict(images)


def test_predicting_is_repeatable_and_moves_no_global_generator(tmp_path):
    model = dbdist.load(export_blocks(tmp_path))
    state = torch.get_rng_state()
    first = model.predict_proba(pixels())
    assert torch.equal(first, model.predict_proba(pixels()))
    assert torch.equal(torch.get_rng_state(), state)


def test_classes_have_their_names(tmp_path):
    model = dbdist.load(export_blocks(tmp_path, start="mean", num_draws=1))
    assert model.class_names == tuple("abcde")
    expected = ["abcde"[i] for i in model.predict_proba(pixels()).argmax(1).tolist()]
    assert model.predict_labels(pixels()) == expected


# -- older versions --------------------------------------------------------------------------------


def version_1(sizes, layers, noise, sampler, private=False):
    """The config.json that version 1 wrote."""
    return {
        "format": "dbdist-model",
        "version": 1,
        "data": dataclasses.asdict(SPEC),
        "model": dataclasses.asdict(sizes),
        "layers_per_block": layers,
        "noise": noise,
        "sampler": sampler,
        "private_shared": private,
    }


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("owners", [None, [0, 0, 0, 1]])
def test_a_model_of_version_1_predicts_as_its_blocks_in_turn(tmp_path, private, owners):
    sampler = {
        "num_steps": 4,
        "start": "noise",
        "sigma_start": 20.0,
        "num_draws": 2,
        "label_table": "normalized",
        "readout": [1],
        "guidance_scale": 0.0,
        "seed": 3,
    }
    sampler |= {} if owners is None else {"blocks": owners}
    config = version_1(SIZES, [1, 2], dataclasses.asdict(SCHEDULE), sampler, private)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(weights_of_blocks(private), tmp_path / "model.safetensors")
    shared, blocks = modules(private)
    levels = SCHEDULE.levels(4, 20.0)
    noise = [torch.randn(2, 12, generator=seeds.generator(3, "sampler", i)) for i in range(7)]
    z = (1 + 20.0**2) ** 0.5 * torch.cat(noise)
    images = ((pixels() - 0.3) / 0.4).repeat_interleave(2, dim=0)
    owners = owners or [0, 0, 1, 1]
    answer = torch.zeros(())
    with torch.no_grad():
        for i, owner in enumerate(owners):
            denoiser = Denoiser(shared[owner], blocks[owner], Gaussian(SCHEDULE))
            answer = denoiser(images, z, torch.full((14,), levels[i])).softmax(-1)
            if i < 3:
                table = shared[owner].label_table
                clean = answer @ (table / table.norm(dim=1, keepdim=True))
                z = z + (levels[i + 1] - levels[i]) * (z - clean) / levels[i]
    expected = answer.unflatten(0, (7, 2)).mean(1)
    found = dbdist.load(tmp_path).predict_proba(pixels())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_description_that_states_two_cuts_is_refused(tmp_path):
    path = export_blocks(tmp_path) / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "layers_per_block": config["layers_per_block"][::-1]}))
    with pytest.raises(CheckpointError, match=r"layers_per_block \(2, 1\), model.*\(1, 2\)"):
        dbdist.load(tmp_path)


def test_a_plain_model_of_version_1_predicts_as_one_of_today(tmp_path):
    export_plain(tmp_path)
    today = dbdist.load(tmp_path).predict_proba(pixels())
    config = version_1(SIZES, [3], None, {"num_steps": 6, "seed": 0, "readout": [0]})
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(dbdist.load(tmp_path).predict_proba(pixels()), today)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"model": None}, "config.json"),
        ({"layers_per_block": [1, 1, 1]}, "num_blocks"),
        ({"data": {**dataclasses.asdict(SPEC), "num_classes": 6}}, "data"),
        ({"sampler": {"num_steps": 1}}, "config.json"),
    ],
)
def test_a_description_of_version_1_that_does_not_fit_is_refused(tmp_path, change, word):
    config = version_1(SIZES, [1, 2], dataclasses.asdict(SCHEDULE), {"num_steps": 4})
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    save_file(weights_of_blocks(), tmp_path / "model.safetensors")
    assert word in refused(tmp_path)


# -- damage ----------------------------------------------------------------------------------------


def refused(path):
    """The one-sentence message of a refusal; anything but CheckpointError fails the test."""
    with pytest.raises(CheckpointError) as caught:
        dbdist.load(path)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    return message


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return export_blocks(tmp_path_factory.mktemp("exported"))


@pytest.fixture
def model_dir(exported, tmp_path):
    """A fresh copy of an exported model."""
    for path in exported.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_a_folder_without_a_model_is_refused(tmp_path):
    assert str(tmp_path) in refused(tmp_path)
    assert "absent" in refused(tmp_path / "absent")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file")


def test_missing_weights_are_refused(model_dir):
    (model_dir / "model.safetensors").unlink()
    assert "model.safetensors" in refused(model_dir)


@pytest.mark.parametrize("cut", [0, 1, 7, 8, 9, 100, 2000, -4000, -1])
def test_truncated_weights_are_refused(model_dir, cut):
    path = model_dir / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    assert "model.safetensors" in refused(model_dir)


def test_any_flipped_bit_of_the_weights_header_is_refused_or_harmless(model_dir):
    path = model_dir / "model.safetensors"
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    generator = np.random.default_rng(0)
    num_refused = 0
    places = [*range(8), *generator.integers(8, 8 + length, 60)]
    for place in places:
        flipped = bytearray(content)
        flipped[place] ^= 1 << int(generator.integers(8))
        path.write_bytes(flipped)
        try:
            dbdist.load(model_dir)
        except CheckpointError as error:
            num_refused += "\n" not in str(error)
    assert num_refused > 0.8 * len(places)


def rewrite(path, change):
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda w: w.pop("layers.1.mlp_in.weight"), r"layers.1.mlp_in.weight"),
        (lambda w: w.pop("shared.label_table"), "label_table"),
        (lambda w: w.update({"layers.9.norm1.weight": torch.zeros(12)}), "layers.9"),
        (lambda w: w.update({"surprise": torch.zeros(2)}), "surprise"),
        (lambda w: w.update({"shared.head.bias": torch.zeros(6)}), "head.bias"),
        (lambda w: w.clear(), "model.safetensors"),
        (lambda w: w.update({k: v.long() for k, v in w.items()}), "model.safetensors"),
    ],
)
def test_weights_of_another_model_are_refused_by_tensor(model_dir, change, word):
    rewrite(model_dir / "model.safetensors", change)
    assert word in refused(model_dir)


def mutations(value, path=()):
    """(where, replacement) for every place in a JSON value: removed, or of another type or sign."""
    if path:
        yield path, "removed"
        for other in (None, -1, 0, "x"):
            if other != value:
                yield path, other
    if isinstance(value, dict):
        for key in value:
            yield from mutations(value[key], (*path, key))
    elif isinstance(value, list) and value:
        yield from mutations(value[0], (*path, 0))


def apply(value, path, other):
    value = json.loads(json.dumps(value))
    owner = value
    for key in path[:-1]:
        owner = owner[key]
    if other == "removed":
        del owner[path[-1]]
    else:
        owner[path[-1]] = other
    return value


def mishandled_mutations(model_dir):
    """Mutations of config.json that end in neither a refusal nor a model that predicts."""
    path = model_dir / "config.json"
    config = json.loads(path.read_text())
    for where, other in mutations(config):
        path.write_text(json.dumps(apply(config, where, other)))
        text = ""
        try:
            spec = (model := dbdist.load(model_dir)).spec
            model.predict(torch.zeros(1, spec.channels, spec.image_size, spec.image_size))
        except CheckpointError as error:
            text = "more than one line" if "\n" in str(error) else ""
        except Exception as error:
            text = f"{type(error).__name__}: {error}"[:100]
        if text:
            yield f"{'.'.join(map(str, where))} = {other!r}: {text}"


@pytest.mark.slow
def test_a_mutated_config_json_is_refused_or_gives_a_model_that_predicts(model_dir):
    """In a process of its own: the run-time type checks of tests would find most of it first."""
    code = (
        "import sys, pathlib; from inference.test_exported import mishandled_mutations; "
        "print(*mishandled_mutations(pathlib.Path(sys.argv[1])), sep='\\n')"
    )
    tests = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}"}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(model_dir)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    wrong = result.stdout.strip().splitlines()
    assert not wrong, f"{len(wrong)} of the mutations:\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"5", b'"x"', b"\xff\xfe", b"{}", b"\0" * 50, b"[" * 5000, b"NaN"],
)
def test_a_config_that_is_no_description_is_refused(model_dir, content):
    (model_dir / "config.json").write_bytes(content)
    assert "config.json" in refused(model_dir)


def test_truncated_configs_are_refused(model_dir):
    path = model_dir / "config.json"
    content = path.read_bytes()
    for cut in range(0, len(content) - 2, 23):
        path.write_bytes(content[:cut])
        refused(model_dir)


@pytest.mark.parametrize(("key", "value"), [("format", "other"), ("version", 99), ("version", "1")])
def test_another_format_or_version_is_refused(model_dir, key, value):
    path = model_dir / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    assert "dbdist-model version 2" in refused(model_dir)


def test_config_json_comes_last_and_marks_a_model_complete(tmp_path, monkeypatch):
    out = tmp_path / "out"
    export_blocks(out)

    def refuse(snapshot, path):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("dbdist.checkpoint.snapshot.Snapshot.write", refuse)
        with pytest.raises(CheckpointError, match=r"out cannot be written \(No space"):
            save_model(out, {"x": torch.zeros(10)}, Description(config_of(), SPEC, (1, 2)))
    assert "config.json is of an export that was not finished" in refused(out)
    export_blocks(out)
    dbdist.load(out)


def test_an_export_that_a_full_disk_does_not_let_begin_leaves_the_model_before(small_disk):
    out = small_disk.path / "out"
    export_blocks(out)
    with suppress(OSError):
        (small_disk.path / "ballast").write_bytes(bytes(2**21))
    with pytest.raises(CheckpointError, match=r"out cannot be written \(No space"):
        save_model(out, {"x": torch.zeros(10**6)}, Description(config_of(), SPEC, (1, 2)))
    dbdist.load(out)
    assert not list(out.glob("*.partial"))


def test_what_is_saved_describes_the_model(tmp_path):
    config = json.loads((export_blocks(tmp_path) / "config.json").read_text())
    assert config["layers_per_block"] == [1, 2]
    schedule = dataclasses.asdict(SCHEDULE)
    assert {**config["noise"], "num_blocks": 2} == {"name": "gaussian", **schedule}
    assert config["version"] == 2
    assert config["task"]["name"] == "classification"
    assert config["data"]["class_names"] == list("abcde")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert dbdist.load(tmp_path).spec == SPEC


# -- filling ---------------------------------------------------------------------------------------


def test_fill_copies_by_name_and_refuses_other_names_and_shapes(tmp_path):
    module = torch.nn.Linear(2, 3)
    storage = module.weight.data_ptr()
    weights = {"bias": torch.ones(3), "weight": torch.full((3, 2), 2.0)}
    fill(module, weights, tmp_path)
    assert module.weight.data_ptr() == storage
    assert torch.equal(module.weight, weights["weight"])
    wrong = [
        ({"bias": weights["bias"]}, "lacks tensor weight"),
        (weights | {"other": torch.ones(1)}, "foreign tensor other"),
        (weights | {"weight": torch.ones(2, 3)}, "weight has shape"),
        (weights | {"bias": torch.ones(1)}, "bias has shape"),
    ]
    for given, message in wrong:
        with pytest.raises(CheckpointError, match=message):
            fill(module, given, tmp_path)


def test_loading_weights_names_the_file(tmp_path):
    with pytest.raises(CheckpointError, match="absent"):
        load_weights(tmp_path / "absent.safetensors")
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        load_weights(tmp_path)
