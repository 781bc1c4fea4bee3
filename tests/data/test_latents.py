"""Latents read back as they were written, normalised, and drawn by their keys alone."""

import gc
import json
import os
import struct
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from data_files import assert_one_sentence
from hostile import changed_bytes, changed_json, changed_safetensors, few
from hypothesis import given, settings
from hypothesis import strategies as st
from latent_folders import CONTENTS, FORM, contents, values, write
from torch import Tensor

from dbdist.data.base import ChecksFiles, Dataset, Spec
from dbdist.data.found import describe_found, identity_of
from dbdist.data.inputs import pixels_of
from dbdist.data.latent_files import Shard, read_index
from dbdist.data.latents import LatentDataset, denormalize, spec_from
from dbdist.data.loader import BatchStream
from dbdist.data.options import LatentOptions
from dbdist.data.sources import dataset_spec, load_dataset, prepare
from dbdist.errors import ConfigError, DataError


def options(root: Path, **given: Any) -> LatentOptions:
    return LatentOptions(root=str(root), **given)


def load(root: Path, split: Any = "train", **given: Any) -> LatentDataset:
    dataset = load_dataset(options(root, **given), split)
    assert isinstance(dataset, LatentDataset)
    return dataset


def everything(dataset: LatentDataset) -> Tensor:
    """Every sample as it is stored, undrawn."""
    return denormalize(dataset.__getitems__([*range(len(dataset))])["image"], dataset.spec)


def drawn(dataset: LatentDataset, i: int, count: int, first_seed: int = 0) -> Tensor:
    """As many draws of one sample, as they are before normalisation."""
    keys = [(i, first_seed + seed) for seed in range(count)]
    return denormalize(dataset.__getitems__(keys)["image"], dataset.spec)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("has_posterior", [True, False])
def test_samples_are_those_that_were_written(
    tmp_path: Path, dtype: str, has_posterior: bool
) -> None:
    what = contents(dtype=dtype, has_posterior=has_posterior)
    write(tmp_path, what)
    for split in ("train", "test"):
        dataset, expected = load(tmp_path, split), values(what, split)
        stored = expected["mean" if has_posterior else "latents"].to(getattr(torch, dtype)).float()
        torch.testing.assert_close(everything(dataset), stored, rtol=1e-5, atol=1e-6)
        assert torch.equal(dataset.labels, expected["labels"])
        batch = dataset.__getitems__([6, 0, 6])
        assert batch["image"].dtype == torch.float32
        assert batch["label"].tolist() == expected["labels"][[6, 0, 6]].tolist()
        assert torch.equal(dataset[0]["image"], batch["image"][1])


def test_a_set_is_what_training_takes(tmp_path: Path) -> None:
    write(tmp_path)
    prepare(options(tmp_path))
    train, test = load(tmp_path), load(tmp_path, "test")
    assert isinstance(train, Dataset)
    assert isinstance(train, ChecksFiles)
    assert isinstance(train.spec, Spec)
    assert train.spec == dataset_spec(options(tmp_path))
    assert (train.spec.channels, train.spec.image_size, train.spec.num_classes) == (4, 6, 3)
    assert train.spec.class_names == ("ant", "bee", "cat")
    assert describe_found(train, test) == "train 23 latents of 3 classes, test 7"
    assert (train.augments, test.augments) == (True, False)


def test_training_samples_without_a_posterior_have_mean_0_and_std_one_half(tmp_path: Path) -> None:
    write(tmp_path, contents(has_posterior=False))
    dataset = load(tmp_path)
    assert not dataset.augments
    image = dataset.__getitems__([*range(len(dataset))])["image"].double()
    assert image.mean(dim=(0, 2, 3)).abs().max() < 1e-6
    assert (image.std(dim=(0, 2, 3), correction=0) - 0.5).abs().max() < 1e-6


def test_drawn_training_samples_have_mean_0_and_std_one_half(tmp_path: Path) -> None:
    """100 epochs of 23 samples of 36 numbers: the standard error is below 0.001."""
    write(tmp_path)
    dataset = load(tmp_path)
    sums = torch.zeros(2, 4, dtype=torch.float64)
    for epoch in range(100):
        keys = [(i, 1000 * epoch + i) for i in range(len(dataset))]
        image = dataset.__getitems__(keys)["image"].double()
        sums += torch.stack([image.mean(dim=(0, 2, 3)), image.square().mean(dim=(0, 2, 3))]) / 100
    assert sums[0].abs().max() < 0.005
    assert (sums[1].sqrt() - 0.5).abs().max() < 0.005


def test_a_draw_has_the_mean_and_the_standard_deviation_of_the_posterior(tmp_path: Path) -> None:
    """Against the written numbers, within five standard errors of 2,000 draws."""
    write(tmp_path)
    dataset, expected = load(tmp_path), values(CONTENTS, "train")
    for i in (0, 17):
        draws = drawn(dataset, i, 2000)
        mean, std = expected["mean"][i], expected["std"][i]
        assert ((draws.mean(0) - mean).abs() <= 5 * std / 2000**0.5 + 1e-3).all()
        assert ((draws.std(0) - std).abs() <= 5 * std / 4000**0.5 + 1e-3).all()
        shape = ((draws - mean) / std.clamp(min=0.05)).flatten(1).T
        crossed = torch.corrcoef(shape) - torch.eye(len(shape))
        assert crossed.abs().max() < 0.15, "every number has noise of its own"


def test_a_draw_depends_on_its_key_alone(tmp_path: Path) -> None:
    write(tmp_path, contents(has_mirrored=True))
    dataset, other = load(tmp_path), load(tmp_path)
    alone = dataset[(9, 17)]["image"]
    torch.manual_seed(1)
    before = torch.get_rng_state()
    keys = [(2, 5), (9, 17), 9, (9, 18), (22, 17)]
    image = other.__getitems__(keys)["image"]
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(image[1], alone)
    assert all(not torch.equal(image[i], alone) for i in (0, 2, 3, 4))
    assert torch.equal(image[2], dataset[9]["image"])
    same = dataset.__getitems__([*reversed(keys)])["image"].flip(0)
    assert torch.equal(same, image)


def test_half_of_the_training_samples_are_mirrored(tmp_path: Path) -> None:
    what = contents(has_posterior=False, has_mirrored=True, dtype="float32")
    write(tmp_path, what)
    dataset, expected = load(tmp_path), values(what, "train")
    draws = drawn(dataset, 3, 400)
    is_mirrored = (draws - expected["latents"][3]).flatten(1).abs().max(dim=1).values > 0.1
    assert 160 < int(is_mirrored.sum()) < 240
    assert torch.allclose(draws[is_mirrored], expected["latents_mirrored"][3], atol=1e-5)
    assert torch.allclose(draws[~is_mirrored], expected["latents"][3], atol=1e-5)
    plain = load(tmp_path, flip=False)
    assert not plain.augments
    assert torch.allclose(drawn(plain, 3, 20), expected["latents"][3], atol=1e-5)
    assert not load(tmp_path, "test").augments


def test_mirrored_draws_come_from_the_mirrored_posterior(tmp_path: Path) -> None:
    what = contents(has_mirrored=True)
    expected = values(what, "train")
    expected = {k: v * 0.01 if k.startswith("std") else v for k, v in expected.items()}
    write(tmp_path, what, train=expected)
    draws = drawn(load(tmp_path), 20, 1000)
    is_mirrored = (draws - expected["mean_mirrored"][20]).flatten(1).abs().max(dim=1).values < 0.1
    kinds = ((is_mirrored, "_mirrored"), (~is_mirrored, ""))
    for chosen, ending in kinds:
        std = draws[chosen].std(0)
        assert (std / expected[f"std{ending}"][20] - 1).abs().median() < 0.05


def test_mirroring_without_mirrored_images_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    assert "--flip" in refusal(options(tmp_path, flip=True))


def test_workers_and_replicas_change_nothing(tmp_path: Path) -> None:
    write(tmp_path, contents(has_mirrored=True))
    dataset = load(tmp_path)

    def batches(**given: Any) -> list[Tensor]:
        stream = BatchStream(dataset, 8, seed=1, block=0, num_steps=7, **given)
        return [batch["image"] for batch in stream]

    whole = batches()
    assert all(torch.equal(a, b) for a, b in zip(whole, batches(num_workers=2), strict=True))
    parts = [batches(replica=r, num_replicas=2) for r in range(2)]
    assert all(torch.equal(torch.cat(p), w) for *p, w in zip(*parts, whole, strict=True))
    again = batches(start_step=4)
    assert all(torch.equal(a, b) for a, b in zip(whole[4:], again, strict=True))


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_shard_is_never_read_whole(tmp_path: Path) -> None:
    """A file of 512 MiB with a hole in the middle, of which four rows are asked for."""
    write(tmp_path, contents(dtype="float32"))
    index = read_index(tmp_path)
    n, row_bytes = 2**18, 4 * 4 * 4 * 16
    shapes = {"mean": (n, 4, 8, 8), "std": (n, 4, 8, 8), "labels": (n,)}
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        size = n * (8 if name == "labels" else row_bytes)
        kind = "I64" if name == "labels" else "F32"
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path = tmp_path / "train-00000.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    assert path.stat().st_size > 2**29
    shard = Shard(path.name, n, path.stat().st_size, "", (0.0,) * 4, (0.0,) * 4)
    what = replace(index.contents, form=replace(FORM, image_size=8, dtype="float32"))
    gc.collect()
    before = resident()
    large = replace(index, contents=what, shards={"train": (shard,)})
    dataset = LatentDataset(tmp_path, large, "train")
    image = dataset.__getitems__([0, (n - 1, 1), n // 2, 77])["image"]
    assert torch.allclose(denormalize(image, dataset.spec), torch.zeros(()), atol=1e-5)
    assert resident() - before < 2**25


def test_the_identity_and_the_spec_are_plain_values(tmp_path: Path) -> None:
    write(tmp_path)
    train, test = load(tmp_path), load(tmp_path, "test")
    identity = identity_of(train, test)
    assert json.loads(json.dumps(identity)) == identity
    assert identity["vae_sha256"] == "0" * 64
    for values_of_spec in (asdict(train.spec), train.spec.identity()):
        assert spec_from(json.loads(json.dumps(values_of_spec))) == train.spec


def test_other_latents_have_another_identity(tmp_path: Path) -> None:
    folders = []
    other_vae = replace(CONTENTS, vae=replace(CONTENTS.vae, sha256="1" * 64))
    other_values = values(CONTENTS, "train")
    other_values["mean"][5, 0, 0, 0] += 1
    train = {"train": other_values}
    for name, what, own in (
        ("a", CONTENTS, {}),
        ("b", other_vae, {}),
        ("c", CONTENTS, train),
        ("again", CONTENTS, {}),
    ):
        write(tmp_path / name, what, **own)
        folders.append(identity_of(load(tmp_path / name), load(tmp_path / name, "test")))
    *others, again = folders
    assert all(a != b for i, a in enumerate(others) for b in others[:i])
    assert again == others[0]


def test_what_a_user_gives_is_normalised_as_training_samples_are(tmp_path: Path) -> None:
    write(tmp_path, contents(dtype="float32"))
    dataset = load(tmp_path)
    stored = values(CONTENTS, "train")["mean"]
    expected = dataset.__getitems__([*range(len(dataset))])["image"]
    torch.testing.assert_close(pixels_of(stored, dataset.spec), expected)
    torch.testing.assert_close(pixels_of(stored.double().numpy(), dataset.spec), expected)
    for wrong in (stored[0], stored[:, :3], stored.to(torch.uint8), "picture.png"):
        with pytest.raises(ValueError, match=r"latents of shape \(N, 4, 6, 6\)"):
            pixels_of(wrong, dataset.spec)


# -- what is refused -------------------------------------------------------------------------------


def refusal(data: LatentOptions, split: Any = "train") -> str:
    with pytest.raises(DataError) as caught:
        load_dataset(data, split)
    assert_one_sentence(caught.value)
    return str(caught.value)


def test_a_folder_without_an_index_is_refused(tmp_path: Path) -> None:
    for data in (options(tmp_path), options(tmp_path / "absent")):
        for function in (prepare, dataset_spec, lambda d: load_dataset(d, "train")):
            with pytest.raises(DataError, match=r"index.json is missing.* encode-latents"):
                function(data)
    write(tmp_path, limit=2)
    assert "again finishes" in refusal(options(tmp_path))


def test_a_missing_shard_is_refused_at_the_start(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "train-00001.safetensors").unlink()
    with pytest.raises(DataError, match=r"train-00001.safetensors is missing"):
        prepare(options(tmp_path))
    assert "train-00001.safetensors is missing" in refusal(options(tmp_path))
    os.mkfifo(tmp_path / "train-00001.safetensors")
    assert "a named pipe" in refusal(options(tmp_path))


def test_a_shard_of_another_size_is_refused_at_the_start(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "train-00002.safetensors"
    size = path.stat().st_size
    os.truncate(path, size - 1)
    assert f"has {size - 1:,} bytes, index.json says {size:,}" in refusal(options(tmp_path))


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("mean", 1), float("nan")),
        (("std", 1), float("inf")),
        (("std", 1), 0.0),
        (("std",), [1.0, 1.0, 1.0]),
        (("mean", 0), 10**400),
        (("mean",), None),
        (("contents",), []),
        (("contents", "form"), None),
        (("contents", "form", "channels"), 3),
        (("contents", "form", "dtype"), "int8"),
        (("contents", "form", "has_posterior"), "yes"),
        (("contents", "vae", "sha256"), None),
        (("contents", "class_names"), ["ant", "bee"]),
        (("contents", "num_classes"), 0),
        (("shards", "test"), []),
        (("shards", "train", 1, "file"), "../train-00001.safetensors"),
        (("shards", "train", 1, "file"), "train-00000.safetensors"),
        (("shards", "train", 1, "num_samples"), -8),
    ],
)
def test_an_index_with_an_impossible_value_is_refused(
    tmp_path: Path, keys: tuple[Any, ...], value: Any
) -> None:
    write(tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())
    place = index
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    (tmp_path / "index.json").write_text(json.dumps(index))
    assert "index.json is damaged (" in refusal(options(tmp_path))


def rewrite(root: Path, number: int = 1, **changed: Tensor | None) -> None:
    """A shard with other tensors, and the index's size of it."""
    path = root / f"train-{number:05}.safetensors"
    tensors = {**safetensors.torch.load_file(path), **changed}
    content = safetensors.torch.save({k: v for k, v in tensors.items() if v is not None})
    path.write_bytes(content)
    index = json.loads((root / "index.json").read_text())
    index["shards"]["train"][number]["num_bytes"] = len(content)
    (root / "index.json").write_text(json.dumps(index))


HALF = torch.float16


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"mean": torch.zeros(8, 4, 6, 5, dtype=HALF)}, "mean of shape [8, 4, 6, 5]"),
        ({"mean": torch.zeros(7, 4, 6, 6, dtype=HALF)}, "mean of shape [7, 4, 6, 6]"),
        ({"std": torch.zeros(8, 4, 6, 6)}, "torch.float32, index.json says"),
        ({"labels": torch.zeros(8, dtype=torch.int32)}, "labels of shape [8] and type torch.int32"),
        ({"std": None}, "holds labels, mean, not labels, mean, std"),
        ({"more": torch.zeros(1)}, "holds labels, mean, more, std, not"),
        (
            {"labels": torch.tensor([0, 1, 2, 3, 0, 0, 0, 0])},
            "label 3 for sample 3, but there are 3",
        ),
        ({"labels": torch.tensor([0, 1, -1, 0, 0, 0, 0, 0])}, "label -1 for sample 2"),
    ],
)
def test_a_shard_of_another_form_is_refused_at_the_start(
    tmp_path: Path, changed: Any, said: str
) -> None:
    write(tmp_path)
    rewrite(tmp_path, **changed)
    message = refusal(options(tmp_path))
    assert message.startswith(f"{tmp_path}/train-00001.safetensors ")
    assert said in message


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("mean", float("nan"), "not finite in mean of sample 3"),
        ("mean", float("-inf"), "not finite in mean of sample 3"),
        ("std", float("nan"), "not finite in std of sample 3"),
        ("std", -0.1, "below 0 in std of sample 3"),
    ],
)
def test_a_number_that_is_none_is_refused_when_it_is_read(
    tmp_path: Path, name: str, value: float, said: str
) -> None:
    write(tmp_path)
    tensor = safetensors.torch.load_file(tmp_path / "train-00001.safetensors")[name]
    tensor[3, 1, 2, 2] = value
    rewrite(tmp_path, **{name: tensor})
    dataset = load(tmp_path)
    dataset.__getitems__([*range(11), *range(12, 23)])
    for key in (11, (11, 5)):
        with pytest.raises(DataError, match=said) as caught:
            dataset.__getitems__([1, key])
        assert_one_sentence(caught.value)
        assert "train-00001.safetensors" in str(caught.value)


def test_a_changed_byte_is_found_by_its_hash(tmp_path: Path) -> None:
    write(tmp_path)
    assert [*load(tmp_path).damaged_files()] == []
    path = tmp_path / "train-00002.safetensors"
    content = bytearray(path.read_bytes())
    content[-200] ^= 1
    path.write_bytes(content)
    (said,) = load(tmp_path).damaged_files()
    assert said.startswith(f"{path} is not what was written")
    assert [*load(tmp_path, "test").damaged_files()] == []


def test_replacing_damaged_pictures_means_nothing_here() -> None:
    with pytest.raises(ConfigError, match="on_error"):
        LatentOptions(on_error="skip").check()
    LatentOptions().check()


def use(root: Path) -> None:
    """Everything that reads; anything but a DataError is a bug."""
    try:
        prepare(options(root))
        for split in ("train", "test"):
            dataset = load(root, split)
            dataset.__getitems__([0, len(dataset) - 1])
            [*dataset.damaged_files()]
    except DataError as error:
        assert_one_sentence(error)


@settings(few, max_examples=40)
@given(data=st.data())
def test_a_hostile_index_ends_in_one_sentence(tmp_path_factory: Any, data: Any) -> None:
    root = hostile_folder(tmp_path_factory)
    original = (root / "index.json").read_bytes()
    try:
        as_json = changed_json(json.loads(original)).map(lambda value: json.dumps(value).encode())
        (root / "index.json").write_bytes(data.draw(st.one_of(as_json, changed_bytes(original))))
        use(root)
    finally:
        (root / "index.json").write_bytes(original)


@settings(few, max_examples=40)
@given(data=st.data())
def test_a_hostile_shard_ends_in_one_sentence(tmp_path_factory: Any, data: Any) -> None:
    root = hostile_folder(tmp_path_factory)
    path = root / "train-00000.safetensors"
    original, index = path.read_bytes(), (root / "index.json").read_bytes()
    try:
        path.write_bytes(data.draw(changed_safetensors(original)))
        changed = json.loads(index)
        changed["shards"]["train"][0]["num_bytes"] = path.stat().st_size
        (root / "index.json").write_text(json.dumps(changed))
        use(root)
    finally:
        path.write_bytes(original)
        (root / "index.json").write_bytes(index)


_FOLDERS: dict[str, Path] = {}


def hostile_folder(factory: pytest.TempPathFactory) -> Path:
    """A folder of one pair of shards."""
    if "hostile" not in _FOLDERS:
        _FOLDERS["hostile"] = factory.mktemp("hostile")
        write(_FOLDERS["hostile"])
    return _FOLDERS["hostile"]
