"""The same weights as other programs write them are the same model; nothing in a file runs."""

import argparse
import functools
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dbdist.errors import CheckpointError
from dbdist.inference.foreign_weights import read_weights
from dbdist.inference.published import load_published_vit

ANCHOR = "patch.weight"
WEIGHTS = {ANCHOR: torch.ones(2), "module_norm.bias": torch.arange(3.0), "head.bias": torch.ones(1)}


def under(prefix):
    return {f"{prefix}{name}": tensor for name, tensor in WEIGHTS.items()}


def read(path):
    return read_weights(path, ANCHOR)


def same(found):
    return found.keys() == WEIGHTS.keys() and all(torch.equal(found[k], WEIGHTS[k]) for k in found)


@pytest.mark.parametrize(
    "content",
    [
        WEIGHTS,
        under("model."),
        under("module."),
        under("_orig_mod."),
        under("model._orig_mod."),
        under("_orig_mod.module.model."),
        under("any.other.name."),
        {"state_dict": under("model."), "epoch": 3, "optimizer_states": [{"state": {}}]},
        {"model": WEIGHTS, "epoch": 3},
        {"model_state_dict": WEIGHTS},
        {"module": under("module.")},
        {"state_dict": {"model": WEIGHTS}},
        {"patch._orig_mod.weight": WEIGHTS[ANCHOR], **WEIGHTS},
    ],
    ids=lambda content: next(iter(content)),
)
def test_wrappers_and_prefixes_are_removed(tmp_path, content):
    torch.save(content, tmp_path / "weights.bin")
    found = read(tmp_path / "weights.bin")
    assert same(found.tensors)
    assert found.ignored == ()


@pytest.mark.parametrize(
    ("content", "ignored"),
    [
        (under("model.") | under("ema_model."), "ema_model.patch.weight"),
        (under("ema.") | under("m.") | {"val.tp": torch.ones(1)}, "val.tp"),
        (WEIGHTS | under("ema_model."), "ema_model.head.bias"),
        ({"model": WEIGHTS, "model_ema": WEIGHTS}, "model_ema.*"),
    ],
)
def test_what_lies_beside_the_model_is_left_out_and_named(tmp_path, content, ignored):
    torch.save(content, tmp_path / "w.pt")
    found = read(tmp_path / "w.pt")
    assert same(found.tensors)
    assert ignored in found.ignored


@pytest.mark.parametrize("name", ["w.safetensors", "w.bin", "w.ckpt", "w"])
def test_a_file_is_known_by_its_content(tmp_path, name):
    torch.save(WEIGHTS, tmp_path / name)
    assert same(read(tmp_path / name).tensors)
    save_file(WEIGHTS, tmp_path / name)
    assert same(read(tmp_path / name).tensors)
    torch.save(WEIGHTS, tmp_path / name, _use_new_zipfile_serialization=False)
    assert same(read(tmp_path / name).tensors)
    (tmp_path / name).write_bytes(b"neither of both")
    with pytest.raises(CheckpointError, match="damaged"):
        read(tmp_path / name)


@pytest.mark.parametrize(
    "hyper_parameters",
    [
        argparse.Namespace(num_heads=4, num_blocks=3),
        {"data_dir": Path("data"), "num_heads": 4, "model": argparse.Namespace(num_blocks=3)},
        {"optimizer": functools.partial(torch.optim.AdamW, lr=1), "num_heads": 4, "num_blocks": 3},
    ],
)
def test_hyper_parameters_of_any_class_are_no_hindrance(tmp_path, golden, hyper_parameters):
    weights = {f"model.{name}": tensor for name, tensor in golden("a/weights").items()}
    content = {"state_dict": weights, "hyper_parameters": hyper_parameters}
    torch.save(content, tmp_path / "last.ckpt")
    sizes = load_published_vit(tmp_path / "last.ckpt").config
    assert (sizes.num_heads, sizes.num_blocks) == (4, 3)


class Calls:
    """Pickles as a call."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def test_what_a_file_calls_never_runs(tmp_path):
    victim = tmp_path / "executed"
    harmless = {"state_dict": WEIGHTS, "hyper_parameters": Calls(Path, str(victim))}
    torch.save(harmless, tmp_path / "w.ckpt")
    assert same(read(tmp_path / "w.ckpt").tensors)
    for call in (Calls(exec, f"open({str(victim)!r}, 'w')"), Calls(getattr, Path, "touch")):
        torch.save({"state_dict": WEIGHTS, "hyper_parameters": call}, tmp_path / "w.ckpt")
        with pytest.raises(CheckpointError, match="nothing in it was executed") as caught:
            read(tmp_path / "w.ckpt")
        assert "\x1b" not in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not victim.exists()


def test_another_model_is_refused_with_what_it_has(tmp_path):
    torch.save({"encoder.weight": torch.ones(1)}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"'patch\.weight' is missing.*encoder\.weight"):
        read(tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="is missing"):
        read(tmp_path / "absent.pt")
