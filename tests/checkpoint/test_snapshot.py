"""Files written from host memory: safetensors reads back what was copied; a failure leaves none."""

import hashlib
import json
import os
import resource
import stat

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dbdist.checkpoint.snapshot import NAMES, Snapshot, check_dtypes
from dbdist.errors import ConfigError


def write(tensors, path):
    snapshot = Snapshot(tensors)
    snapshot.fill(tensors)
    return snapshot.write(path)


@pytest.mark.parametrize("dtype", NAMES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 4), (5, 7)], ids=str)
def test_every_dtype_and_shape_is_read_back_bit_for_bit(tmp_path, dtype, shape):
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.randint(2 if dtype is torch.bool else 256, (num_bytes,), dtype=torch.uint8)
    tensor, path = raw.view(dtype).view(shape), tmp_path / "x.safetensors"
    entry = write({"x": tensor}, path)
    content = path.read_bytes()
    assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    read = load_file(path)["x"]
    assert (read.dtype, read.shape) == (dtype, shape)
    assert torch.equal(read.reshape(-1).view(torch.uint8), raw)  # bits: a random float may be nan


def test_views_parameters_and_mixed_dtypes_stand_aligned_in_one_file(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "flag": torch.tensor(True),
        "a/step": torch.tensor(3.0),
        "half": torch.randn(3).bfloat16(),
        "turned": base.T,
        "row": base[1],
        "every other": base[:, ::2],
        "expanded": torch.ones(1).expand(4),
        "parameter": nn.Parameter(torch.randn(2, 3, dtype=torch.float64)),
        "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
        'quotes" é': torch.arange(5),
        "empty": torch.zeros(0),
    }
    write(tensors, path := tmp_path / "mixed.safetensors")
    read = load_file(path)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0
    for name, entry in json.loads(content[8 : 8 + length]).items():
        assert entry["data_offsets"][0] % tensors[name].element_size() == 0, name


def test_a_file_without_tensors_is_a_file(tmp_path):
    write({}, tmp_path / "none.safetensors")
    assert load_file(tmp_path / "none.safetensors") == {}


def test_the_same_tensors_make_the_same_file_in_whatever_order(tmp_path):
    a, b = torch.ones(3), torch.zeros(2, dtype=torch.int64)
    assert write({"a": a, "b": b}, tmp_path / "1") == write({"b": b, "a": a}, tmp_path / "2")


def test_a_file_is_readable_for_whom_the_users_mask_allows(tmp_path):
    before = os.umask(0o027)
    try:
        write({"x": torch.ones(1)}, tmp_path / "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640


def test_a_snapshot_serves_tensors_of_its_names_shapes_and_dtypes_again(tmp_path):
    snapshot = Snapshot({"x": torch.zeros(2, 3), "y": torch.zeros(())})
    for value in (1.0, 2.0):
        tensors = {"x": torch.full((2, 3), value), "y": torch.tensor(-value)}
        assert snapshot.fits(tensors)
        snapshot.fill(tensors)
        tensors["x"].zero_()  # what happens to it later does not matter
        snapshot.write(tmp_path / "x")
        assert load_file(tmp_path / "x")["x"].eq(value).all()
    x, y = torch.zeros(2, 3), torch.zeros(())
    for other in (
        {"x": x},
        {"x": x, "z": y},
        {"x": x, "y": y, "z": y},
        {"x": x.T, "y": y},
        {"x": x, "y": y.double()},
    ):
        assert not snapshot.fits(other)


@pytest.fixture
def small_files():
    """No file of this process may exceed 1 MiB: writing fails in the middle, for root, too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_fails_in_the_middle_leaves_the_file_before_and_nothing_else(
    tmp_path, small_files
):
    path = tmp_path / "x.safetensors"
    write({"x": torch.ones(5)}, path)
    with pytest.raises(OSError, match="File too large"):
        write({"x": torch.zeros(2**20)}, path)
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]
    assert load_file(path)["x"].tolist() == [1] * 5


def test_a_dtype_that_no_file_can_hold_is_refused_by_name():
    check_dtypes("block 1", {name: torch.empty(1, dtype=dtype) for dtype, name in NAMES.items()})
    with pytest.raises(ConfigError, match=r"^block 1: rope is of torch\.complex128, .*complex64"):
        check_dtypes("block 1", {"rope": torch.empty(1, dtype=torch.complex128)})
