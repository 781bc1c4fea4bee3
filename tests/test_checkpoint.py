"""Checkpoints on disk: what counts as one, what is refused, what a writer leaves behind."""

import itertools
import json
import shutil

import pytest
import torch
from torch import nn

from dbdist.checkpoint import (
    CheckpointWriter,
    ema_file,
    find_checkpoint,
    optimizer_file,
    optimizer_tensors,
    restore_optimizer,
)
from dbdist.errors import CheckpointError
from dbdist.parallel.topology import Layout, Topology

ABOUT = {"model": {"layers_per_block": [2, 1], "data": "digits"}, "samples_seen": 5}
FILES = {
    "shared.safetensors": {"head.weight": torch.arange(6.0).reshape(2, 3)},
    "block-0.safetensors": {"layers.0.norm1.weight": torch.ones(4), "empty": torch.zeros(0)},
}


def writer_of(run_dir, keep_last=10):
    return CheckpointWriter(run_dir, Topology(Layout(1)), {0}, keep_last)


def write(run_dir, *steps, keep_last=10):
    writer = writer_of(run_dir, keep_last)
    for step in steps:
        writer.save(step, FILES, ABOUT)
    writer.finish(1.0)
    return run_dir / f"checkpoints/step-{steps[-1]:08d}"


def found(run_dir, step=None):
    checkpoint = find_checkpoint(run_dir, step)
    assert checkpoint is not None
    return checkpoint


# -- reading back ----------------------------------------------------------------------------------


def test_what_was_saved_is_read_back_bit_for_bit(tmp_path):
    path = write(tmp_path, 7)
    checkpoint = found(tmp_path)
    assert (checkpoint.step, checkpoint.path) == (7, path)
    assert set(checkpoint.manifest["files"]) == set(FILES)
    assert checkpoint.manifest["samples_seen"] == 5
    for name, tensors in FILES.items():
        assert checkpoint.has(name)
        own = checkpoint.tensors(name)
        assert own.keys() == tensors.keys()
        assert all(torch.equal(own[key], tensors[key]) for key in own)
    assert {p.name for p in path.iterdir()} == {"manifest.json", *FILES}


def test_tensors_that_share_memory_or_are_not_contiguous_are_saved_as_they_look(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    writer = writer_of(tmp_path)
    writer.save(1, {"a.safetensors": {"whole": base, "row": base[1], "turned": base.T}}, ABOUT)
    own = found(tmp_path).tensors("a.safetensors")
    assert torch.equal(own["row"], base[1])
    assert torch.equal(own["turned"], base.T)


def test_the_newest_or_the_asked_step_is_found(tmp_path):
    assert find_checkpoint(tmp_path) is None
    assert find_checkpoint(tmp_path / "absent") is None
    write(tmp_path, 5, 100, 30)
    assert found(tmp_path).step == 100
    assert found(tmp_path, 30).step == 30
    with pytest.raises(CheckpointError, match=r"step 6.*\[5, 30, 100\]"):
        find_checkpoint(tmp_path, 6)
    with pytest.raises(CheckpointError, match="none"):
        find_checkpoint(tmp_path / "absent", 6)


def test_steps_beyond_eight_digits_are_newer(tmp_path):
    write(tmp_path, 99_999_999, 100_000_000)
    assert found(tmp_path).step == 100_000_000


def test_other_files_and_folders_are_no_checkpoints(tmp_path):
    write(tmp_path, 5)
    folder = tmp_path / "checkpoints"
    for name in ("step-00000009", "step-7", "step-0000000x", "latest", "step-00000008.tmp"):
        (folder / name).mkdir()
    (folder / "step-7" / "manifest.json").write_text("{}")
    (folder / "step-00000010").write_text("a file")
    (folder / "step-00000011" / "manifest.json").mkdir(parents=True)
    assert found(tmp_path).step == 5


# -- incomplete and old ones -----------------------------------------------------------------------


def test_a_folder_without_manifest_is_ignored_and_cleaned_up(tmp_path):
    write(tmp_path, 5)
    path = write(tmp_path, 9)
    (path / "manifest.json").unlink()
    assert found(tmp_path).step == 5
    (tmp_path / "checkpoints" / "notes").mkdir()
    writer_of(tmp_path).clean()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "notes",
        "step-00000005",
    ]


@pytest.mark.parametrize("keep_last", [1, 2, 3])
def test_the_last_complete_ones_are_kept(tmp_path, keep_last):
    write(tmp_path, 1, 2, 3, 4, keep_last=keep_last)
    kept = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert kept == [f"step-{s:08d}" for s in (1, 2, 3, 4)[-keep_last:]]


def test_the_last_ones_are_those_of_the_highest_steps(tmp_path):
    write(tmp_path, 99_999_999, 100_000_000, keep_last=1)
    assert found(tmp_path).step == 100_000_000


def test_saving_a_step_again_replaces_it(tmp_path):
    write(tmp_path, 5)
    writer = writer_of(tmp_path)
    writer.save(5, {"shared.safetensors": {"x": torch.ones(2)}}, ABOUT)
    checkpoint = found(tmp_path)
    assert set(checkpoint.manifest["files"]) == {"shared.safetensors"}
    assert checkpoint.tensors("shared.safetensors").keys() == {"x"}


def save_on_rank(rank, run_dir, silent):
    topology = rank.join(Layout(3))
    writer = CheckpointWriter(run_dir, topology, {0, 1, 2}, 10)
    if topology.rank not in silent:
        own = {f"block-{topology.rank}.safetensors": {"x": torch.full((2,), float(topology.rank))}}
        writer.save(4, own, ABOUT if topology.is_coordinator else {})
    topology.barrier()
    message = ""
    try:
        writer.finish(0.2)
    except CheckpointError as error:
        message = str(error)
    topology.barrier()
    return message


def test_a_checkpoint_is_complete_when_every_rank_has_written(ranks, tmp_path):
    assert ranks.run(3, save_on_rank, tmp_path, ()) == ["", "", ""]
    checkpoint = found(tmp_path)
    for block in range(3):
        assert checkpoint.tensors(f"block-{block}.safetensors")["x"].tolist() == [block, block]


def test_a_rank_that_does_not_write_is_named_and_there_is_no_checkpoint(ranks, tmp_path):
    messages = ranks.run(3, save_on_rank, tmp_path, (1,))
    assert "step 4" in messages[0]
    assert "rank 1" in messages[0]
    assert messages[1:] == ["", ""]
    assert find_checkpoint(tmp_path) is None


def test_a_folder_that_cannot_be_written_is_refused_by_name(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(CheckpointError, match="checkpoints"):
        writer_of(tmp_path).save(1, FILES, ABOUT)


# -- damage ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [0, 20, -1])
def test_damaged_files_are_refused_by_name(tmp_path, place):
    path = write(tmp_path, 3) / "block-0.safetensors"
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    for damaged in (bytes(content), bytes(content[:-1]), b"", bytes(content) + b"x"):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"block-0\.safetensors is damaged"):
            found(tmp_path).tensors("block-0.safetensors")
    path.unlink()
    with pytest.raises(CheckpointError, match=r"block-0\.safetensors"):
        found(tmp_path).tensors("block-0.safetensors")
    assert found(tmp_path).tensors("shared.safetensors")


def test_a_file_that_the_manifest_does_not_list_is_refused(tmp_path):
    path = write(tmp_path, 3)
    shutil.copy(path / "block-0.safetensors", path / "block-1.safetensors")
    with pytest.raises(CheckpointError, match=r"block-1\.safetensors is not part"):
        found(tmp_path).tensors("block-1.safetensors")


def test_a_checkpoint_of_another_model_is_refused_by_the_first_difference(tmp_path):
    write(tmp_path, 3)
    checkpoint = found(tmp_path)
    checkpoint.check_fits(ABOUT["model"])
    for key, value in (("layers_per_block", [1, 2]), ("data", "cifar10"), ("new", 1)):
        with pytest.raises(CheckpointError, match=key):
            checkpoint.check_fits({**ABOUT["model"], key: value})


def uses(run_dir):
    """All that a resuming run asks of a checkpoint."""
    checkpoint = find_checkpoint(run_dir)
    if checkpoint is not None:
        assert isinstance(checkpoint.step, int)
        checkpoint.check_fits(ABOUT["model"])
        for name in FILES:
            checkpoint.tensors(name)


def mutations(value, path=()):
    if path:
        yield path, "removed"
        for other in (None, -1, 1.5, "x", [], {}, [1], True, 10**30):
            yield path, other
    children = (
        value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    )
    for key in children:
        yield from mutations(value[key], (*path, key))


def test_no_mutation_of_a_manifest_ends_in_anything_but_a_refusal_or_an_intact_one(tmp_path):
    path = write(tmp_path, 3) / "manifest.json"
    manifest = json.loads(path.read_text())
    wrong = []
    for where, other in mutations(manifest):
        changed = json.loads(json.dumps(manifest))
        owner = changed
        for key in where[:-1]:
            owner = owner[key]
        if other == "removed":
            del owner[where[-1]]
        else:
            owner[where[-1]] = other
        path.write_text(json.dumps(changed))
        try:
            uses(tmp_path)
        except CheckpointError as error:
            if "\n" in str(error):
                wrong.append((where, other, "more than one line"))
        except Exception as error:
            wrong.append((where, other, f"{type(error).__name__}: {error}"[:100]))
    listed = "\n".join(f"{'.'.join(map(str, w))} = {o!r}: {text}" for w, o, text in wrong)
    assert not wrong, f"{len(wrong)} of the mutations:\n{listed}"


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"5", b'"x"', b"\xff\xfe", b"{}", b"\0" * 50, b"[" * 5000, b"NaN"],
)
def test_a_manifest_that_is_no_manifest_is_refused(tmp_path, content):
    path = write(tmp_path, 3) / "manifest.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        uses(tmp_path)


def test_a_manifest_that_states_another_step_than_its_folder_is_refused(tmp_path):
    path = write(tmp_path, 3)
    path.rename(path.with_name("step-00000004"))
    with pytest.raises(CheckpointError, match="step"):
        find_checkpoint(tmp_path)


def test_truncated_manifests_are_refused(tmp_path):
    path = write(tmp_path, 3) / "manifest.json"
    content = path.read_bytes()
    for cut in range(0, len(content), 17):
        path.write_bytes(content[:cut])
        with pytest.raises(CheckpointError):
            uses(tmp_path)


# -- optimizers ------------------------------------------------------------------------------------


def model():
    generator = torch.Generator().manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, 2))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(generator=generator)
    return module


def steps(module, optimizer, num_steps, start=0):
    """The last layer never has a gradient."""
    for step in range(start, start + num_steps):
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        module[:2](x).square().sum().backward()
        optimizer.step()


MAKERS = {
    "adamw": lambda p: torch.optim.AdamW(p, 0.05, weight_decay=0.1),
    "adamw-fused": lambda p: torch.optim.AdamW(p, 0.05, fused=True),
    "adamw-amsgrad": lambda p: torch.optim.AdamW(p, 0.05, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, 1e-4),
    "nesterov": lambda p: torch.optim.SGD(p, 1e-4, momentum=0.9, nesterov=True),
}


@pytest.mark.parametrize(("kind", "prefix"), list(itertools.product(MAKERS, ["", "shared."])))
def test_an_optimizer_goes_on_where_it_was_saved_bit_for_bit(tmp_path, kind, prefix):
    straight = model()
    optimizer = MAKERS[kind](straight.parameters())
    steps(straight, optimizer, 3)
    saved = optimizer_tensors(optimizer, dict(straight.named_parameters()), prefix)
    writer_of(tmp_path).save(3, {"o.safetensors": saved}, ABOUT)
    weights = {k: v.clone() for k, v in straight.state_dict().items()}
    steps(straight, optimizer, 3, start=3)

    resumed = model()
    resumed.load_state_dict(weights)
    other = MAKERS[kind](resumed.parameters())
    read = found(tmp_path).tensors("o.safetensors")
    restore_optimizer(other, dict(resumed.named_parameters()), read, prefix)
    steps(resumed, other, 3, start=3)
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_an_optimizers_state_is_named_by_parameter_and_never_stepped_ones_have_none():
    module = model()
    optimizer = MAKERS["adamw"](module.parameters())
    parameters = dict(module.named_parameters())
    assert optimizer_tensors(optimizer, parameters) == {}
    steps(module, optimizer, 1)
    names = optimizer_tensors(optimizer, parameters, "shared.").keys()
    assert names == {
        f"shared.{layer}.{leaf}/{key}"
        for layer in (0, 1)
        for leaf in ("weight", "bias")
        for key in ("step", "exp_avg", "exp_avg_sq")
    }


def test_restoring_keeps_the_learning_rate_of_the_new_optimizer_and_copies_the_state():
    module = model()
    optimizer = MAKERS["adamw"](module.parameters())
    parameters = dict(module.named_parameters())
    steps(module, optimizer, 2)
    saved = {k: v.clone() for k, v in optimizer_tensors(optimizer, parameters).items()}
    other = torch.optim.AdamW(module.parameters(), 0.5, weight_decay=0.0)
    restore_optimizer(other, parameters, saved)
    assert (other.param_groups[0]["lr"], other.param_groups[0]["weight_decay"]) == (0.5, 0.0)
    before = {k: v.clone() for k, v in saved.items()}
    steps(module, other, 1)
    assert all(torch.equal(saved[k], before[k]) for k in saved)


def test_a_parameter_whose_name_begins_like_anothers_keeps_its_own_state():
    parameters = {"a": nn.Parameter(torch.zeros(2)), "a.b": nn.Parameter(torch.zeros(3))}
    optimizer = torch.optim.SGD(parameters.values(), 0.1, momentum=0.9)
    for value, parameter in enumerate(parameters.values()):
        parameter.grad = torch.full_like(parameter, value + 1.0)
    optimizer.step()
    saved = optimizer_tensors(optimizer, parameters)
    other = torch.optim.SGD(parameters.values(), 0.1, momentum=0.9)
    restore_optimizer(other, parameters, saved)
    for value, parameter in enumerate(parameters.values()):
        assert (other.state[parameter]["momentum_buffer"] == value + 1.0).all()


def test_file_names_that_belong_together():
    assert optimizer_file("block-2.safetensors") == "block-2.optimizer.safetensors"
    assert ema_file("shared.safetensors") == "shared.ema.safetensors"
