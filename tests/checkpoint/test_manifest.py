"""Checkpoints on disk: what counts as one, and what is refused."""

import json
import shutil

import pytest
import torch

from dbdist.checkpoint.manifest import find_checkpoint, read_manifest
from dbdist.checkpoint.names import ema_file, optimizer_file
from dbdist.checkpoint.writer import CheckpointWriter
from dbdist.errors import CheckpointError
from dbdist.parallel.layout import Layout
from dbdist.parallel.topology import Topology

ABOUT = {"model": {"layers_per_block": [2, 1], "data": "digits"}, "samples_seen": 5}
FILES = {
    "shared.safetensors": {"head.weight": torch.arange(6.0).reshape(2, 3)},
    "block-0.safetensors": {"layers.0.norm1.weight": torch.ones(4), "empty": torch.zeros(0)},
}


def write(run_dir, *steps, files=FILES):
    writer = CheckpointWriter(run_dir, Topology(Layout(1)), {0}, keep_last=10)
    for step in steps:
        writer.save(step, files, ABOUT)
    writer.finish(10.0)
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
    write(tmp_path, 1, files={"a.safetensors": {"whole": base, "row": base[1], "turned": base.T}})
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


@pytest.mark.parametrize("data", [[], None, "digits"])
def test_a_manifest_whose_data_is_no_object_is_refused(tmp_path, data):
    path = write(tmp_path, 3) / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "data": data}))
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged: data is no object"):
        read_manifest(path.parent)


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


def test_file_names_that_belong_together():
    assert optimizer_file("block-2.safetensors") == "block-2.optimizer.safetensors"
    assert ema_file("shared.safetensors") == "shared.ema.safetensors"
