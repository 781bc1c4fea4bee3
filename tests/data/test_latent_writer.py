"""A folder of latents is whole or says what is missing; another's folder is never touched."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from data_files import assert_one_sentence
from latent_folders import CONTENTS, NUM_SAMPLES, contents, values, write

from dbdist.data.latent_files import read_index
from dbdist.data.latent_writer import opened_writer
from dbdist.errors import ConfigError, DataError, UserError

FILES = ["test-00000", "train-00000", "train-00001", "train-00002"]


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def refusal(out: Path, what: Any = CONTENTS, kind: type[UserError] = ConfigError) -> str:
    before = content_of(out)
    with pytest.raises(kind) as caught:
        write(out, what)
    assert_one_sentence(caught.value)
    assert content_of(out) == before
    return str(caught.value)


@pytest.mark.parametrize("limit", [0, 1, 3, 4])
def test_a_writer_that_was_interrupted_goes_on_where_it_was(tmp_path: Path, limit: int) -> None:
    write(tmp_path / "straight")
    first = write(tmp_path / "out", limit=limit)
    assert len(first) == limit
    (tmp_path / "out" / "train-00001.safetensors.0123abcd.partial").touch()
    second = write(tmp_path / "out")
    assert sorted(first + second) == [f"{name}.safetensors" for name in FILES]
    assert content_of(tmp_path / "out") == content_of(tmp_path / "straight")


def test_a_finished_folder_is_left_as_it_is(tmp_path: Path) -> None:
    write(tmp_path)
    before = content_of(tmp_path)
    assert sorted(before) == ["index.json", *(f"{name}.safetensors" for name in FILES)]
    assert write(tmp_path) == []
    assert content_of(tmp_path) == before


@pytest.mark.parametrize("is_finished", [True, False])
def test_a_shard_that_is_damaged_or_gone_is_written_again(
    tmp_path: Path, is_finished: bool
) -> None:
    write(tmp_path / "straight")
    write(tmp_path / "out", limit=10 if is_finished else 3)
    (tmp_path / "out" / "train-00000.safetensors").write_bytes(b"damaged")
    (tmp_path / "out" / "train-00002.safetensors").unlink()
    with opened_writer(tmp_path / "out", CONTENTS, NUM_SAMPLES) as writer:
        assert [number for number, _ in writer.missing("train")] == [0, 2]
        assert not (tmp_path / "out" / "index.json").exists()
    write(tmp_path / "out")
    assert content_of(tmp_path / "out") == content_of(tmp_path / "straight")


def test_mean_and_std_are_those_of_all_training_samples(tmp_path: Path) -> None:
    for number, has_posterior in enumerate((True, False)):
        out = tmp_path / str(number)
        what = contents(has_posterior=has_posterior, has_mirrored=True)
        write(out, what)
        stored = {name: x.half().double() for name, x in values(what, "train").items()}
        centre = stored["mean" if has_posterior else "latents"].transpose(0, 1).flatten(1)
        variance = centre.var(dim=1, correction=0)
        if has_posterior:  # the law of total variance
            variance = variance + stored["std"].square().mean(dim=(0, 2, 3))
        index = read_index(out)
        torch.testing.assert_close(torch.tensor(index.mean).double(), centre.mean(dim=1))
        torch.testing.assert_close(torch.tensor(index.std).double(), variance.sqrt())


@pytest.mark.parametrize("name", ["notes.txt", "train-00000.safetensors", "index.html"])
def test_a_folder_with_other_files_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    assert name in refusal(tmp_path)


@pytest.mark.parametrize("text", ["{}", "[1]", "no JSON", '{"format": "dbdist-latents"}'])
def test_the_index_of_another_program_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "index.json").write_text(text)
    assert "index.json" in refusal(tmp_path, kind=DataError)


OTHERS = {
    "form.has_mirrored": contents(has_mirrored=True),
    "form.dtype": contents(dtype="float32"),
    "vae.sha256": replace(CONTENTS, vae=replace(CONTENTS.vae, sha256="1" * 64)),
    "source.name": replace(CONTENTS, source={"name": "digits"}),
    "class_names": replace(CONTENTS, class_names=("ant", "bee", "dog")),
    "shard_size": replace(CONTENTS, shard_size=9),
}


@pytest.mark.parametrize("limit", [2, 10])
@pytest.mark.parametrize("key", OTHERS)
def test_latents_of_other_contents_are_refused_by_name(
    tmp_path: Path, key: str, limit: int
) -> None:
    write(tmp_path, limit=limit)
    assert f" {key} " in refusal(tmp_path, OTHERS[key])


def test_the_name_of_the_autoencoders_folder_does_not_matter(tmp_path: Path) -> None:
    write(tmp_path, limit=2)
    write(tmp_path, replace(CONTENTS, vae=replace(CONTENTS.vae, name="elsewhere")))
    assert read_index(tmp_path).contents.vae.name == "elsewhere"


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(DataError, match="out cannot be written"):
        write(tmp_path / "out")


def test_two_writers_do_not_meet(tmp_path: Path) -> None:
    with opened_writer(tmp_path, CONTENTS, NUM_SAMPLES):
        with pytest.raises(ConfigError, match="another process"):
            write(tmp_path)
    write(tmp_path)


def test_numbers_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    wrong = values(CONTENTS, "train")
    wrong["mean"][9, 0, 0, 0] = 1e6
    with pytest.raises(DataError, match=r"train-00001.*--dtype float32"):
        write(tmp_path, train=wrong)
    wrong["mean"][9, 0, 0, 0] = float("nan")
    with pytest.raises(DataError, match=r"train-00001.*not finite"):
        write(tmp_path, train=wrong)
    assert not (tmp_path / "train-00001.safetensors").exists()


def test_a_channel_without_any_variation_is_refused(tmp_path: Path) -> None:
    what = contents(has_posterior=False)
    constant = values(what, "train")
    constant["latents"][:, 2] = 0.7
    with pytest.raises(DataError, match="channel 2"):
        write(tmp_path, what, train=constant)
    assert not (tmp_path / "index.json").exists()


def test_a_full_disk_ends_in_one_sentence_and_loses_nothing(small_disk: Any) -> None:
    what = replace(CONTENTS, form=replace(CONTENTS.form, image_size=64))
    with pytest.raises(DataError, match="cannot be written") as caught:
        write(small_disk.path / "out", what)
    assert_one_sentence(caught.value)
    listing = json.loads((small_disk.path / "out" / "unfinished.json").read_text())
    kept = [shard["file"] for shard in listing["shards"]["train"]]
    assert kept == ["train-00000.safetensors"]
    assert sorted(path.name for path in (small_disk.path / "out").iterdir()) == [
        *kept,
        "unfinished.json",
    ]
