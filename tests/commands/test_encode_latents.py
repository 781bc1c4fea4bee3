"""`dbdist encode-latents` against diffusers itself, with a small autoencoder of random weights."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor

from dbdist.commands.check_data import run as check_data
from dbdist.commands.encode_latents import run
from dbdist.data.latents import LatentDataset, denormalize
from dbdist.data.options import LatentOptions
from dbdist.data.small_sets import read_table
from dbdist.data.sources import load_dataset
from dbdist.data.vae import CONFIG, WEIGHTS, Vae, decode_latents, load_vae
from dbdist.errors import ConfigError, DataError

SIDE, NUM = 16, {"train": 7, "val": 3}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> Any:
    """8 channels, two levels, so that 16 pixels a side become 8; posteriors of different widths."""
    from diffusers import AutoencoderKL

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            norm_num_groups=4,
            sample_size=SIDE,
            scaling_factor=0.3,
            shift_factor=0.2,
        ).eval()


@pytest.fixture(scope="module")
def vae_folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vaes") / "small-vae"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder of two classes with 7 pictures to train and 3 to test of each."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, n in NUM.items():
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


def pixels(images: Path, split: str) -> Tensor:
    """uint8, class by class, read by PIL alone."""
    paths = sorted((images / split).glob("*/*.png"))
    arrays = [np.asarray(Image.open(path)).copy() for path in paths]
    return torch.stack([torch.from_numpy(a).permute(2, 0, 1) for a in arrays])


@torch.no_grad()
def posterior(model: Any, uint8: Tensor) -> Any:
    return model.encode(uint8.float() / 127.5 - 1).latent_dist


def words(images: Path, out: Path, vae: Path, *more: str) -> list[str]:
    sizes = ["--image-size", str(SIDE), "--batch-size", "4", "--shard-size", "5", "--device", "cpu"]
    return [str(images), str(out), "--vae", str(vae), *sizes, *more]


def load(out: Path, split: Any = "train", **given: Any) -> LatentDataset:
    dataset = load_dataset(LatentOptions(root=str(out), **given), split)
    assert isinstance(dataset, LatentDataset)
    return dataset


def batch_of(dataset: LatentDataset) -> Tensor:
    return dataset.__getitems__([*range(len(dataset))])["image"]


@pytest.fixture(scope="module")
def encoded(images: Path, vae_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that the command can store."""
    out = tmp_path_factory.mktemp("latents") / "out"
    run(words(images, out, vae_folder, "--flip"))
    return out


@pytest.fixture(scope="module")
def vae(vae_folder: Path) -> Vae:
    return load_vae(vae_folder, CPU)


@pytest.mark.parametrize(("split", "folder"), [("train", "train"), ("test", "val")])
def test_latents_are_those_of_diffusers(
    model: Any, images: Path, encoded: Path, split: str, folder: str
) -> None:
    """As its pipelines have them: (raw - 0.2) x 0.3, to the precision of float16."""
    dataset, of = load(encoded, split), posterior(model, pixels(images, folder))
    expected = (of.mean - 0.2) * 0.3
    torch.testing.assert_close(denormalize(batch_of(dataset), dataset.spec), expected, **HALF)
    n = NUM[folder]
    assert dataset.labels.tolist() == [0] * n + [1] * n
    assert dataset.spec.class_names == ("cat", "dog")
    stored = [safetensors.torch.load_file(p) for p in sorted(encoded.glob(f"{split}-*"))]
    std = torch.cat([shard["std"] for shard in stored])
    torch.testing.assert_close(std.float(), of.std * 0.3, **HALF)


HALF: dict[str, float] = {"rtol": 2e-3, "atol": 2e-4}


def test_mirrored_latents_are_those_of_the_mirrored_images(
    model: Any, images: Path, encoded: Path
) -> None:
    of = posterior(model, pixels(images, "train").flip(-1))
    stored = [safetensors.torch.load_file(p) for p in sorted(encoded.glob("train-*"))]
    for name, expected in (("mean", (of.mean - 0.2) * 0.3), ("std", of.std * 0.3)):
        found = torch.cat([shard[f"{name}_mirrored"] for shard in stored])
        torch.testing.assert_close(found.float(), expected, **HALF)
    (test, *_) = (safetensors.torch.load_file(p) for p in encoded.glob("test-*"))
    assert sorted(test) == ["labels", "mean", "std"]


def test_means_alone_have_mean_0_and_std_one_half(
    model: Any, images: Path, vae_folder: Path, tmp_path: Path
) -> None:
    run(words(images, tmp_path / "out", vae_folder, "--mean-only", "--dtype", "float32"))
    dataset = load(tmp_path / "out")
    assert not dataset.augments
    batch = batch_of(dataset)
    expected = (posterior(model, pixels(images, "train")).mean - 0.2) * 0.3
    torch.testing.assert_close(denormalize(batch, dataset.spec), expected, rtol=1e-4, atol=1e-5)
    assert batch.mean(dim=(0, 2, 3)).abs().max() < 1e-5
    assert (batch.std(dim=(0, 2, 3), correction=0) - 0.5).abs().max() < 1e-5


def test_training_draws_have_mean_0_and_std_one_half(encoded: Path) -> None:
    """200 epochs of 14 samples of 64 numbers, without mirrored images."""
    dataset = load(encoded, flip=False)
    keys = [(i, 1000 * epoch + i) for epoch in range(200) for i in range(len(dataset))]
    batch = dataset.__getitems__(keys)["image"].double()
    assert batch.mean(dim=(0, 2, 3)).abs().max() < 0.01
    assert (batch.std(dim=(0, 2, 3)) - 0.5).abs().max() < 0.01


def test_decoding_is_that_of_diffusers(model: Any, images: Path, encoded: Path, vae: Vae) -> None:
    dataset = load(encoded, "test")
    found = decode_latents(batch_of(dataset), vae, dataset.spec)
    with torch.no_grad():
        decoded = model.decode(posterior(model, pixels(images, "val")).mean).sample
    expected = (decoded / 2 + 0.5).clamp(0, 1) * 255
    assert found.dtype == torch.uint8
    assert found.shape == (6, 3, SIDE, SIDE)
    assert (found.float() - expected).abs().max() <= 1, "half a step of rounding, and float16"
    assert (found.float() - expected).abs().mean() < 0.3
    none = decode_latents(torch.empty(0, 4, 8, 8), vae, dataset.spec)
    assert none.shape == (0, 3, SIDE, SIDE)


def test_decoding_by_another_autoencoder_is_refused(encoded: Path, vae: Vae) -> None:
    dataset = load(encoded, "test")
    other = replace(dataset.spec, vae_sha256="1" * 64)
    with pytest.raises(ConfigError, match=r"another autoencoder than small-vae: .*111111"):
        decode_latents(batch_of(dataset), vae, other)


def test_the_index_says_where_latents_come_from(encoded: Path, vae_folder: Path) -> None:
    import hashlib

    index = json.loads((encoded / "index.json").read_text())["contents"]
    sha256 = hashlib.sha256((vae_folder / WEIGHTS).read_bytes()).hexdigest()
    assert index["vae"] == {"name": "small-vae", "sha256": sha256, "scaling": 0.3, "shift": 0.2}
    assert index["source"]["name"] == "image_folder"
    assert index["source"]["train"]["num_samples"] == 14
    assert not (encoded / "unfinished.json").exists()


def test_the_same_command_goes_on_and_then_has_nothing_to_do(
    images: Path,
    vae_folder: Path,
    encoded: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from dbdist.data.latent_writer import LatentWriter

    add, num_added = LatentWriter.add, [0]

    def interrupted(self: Any, *given: Any) -> Any:
        num_added[0] += 1
        if num_added[0] == 3:
            raise KeyboardInterrupt
        return add(self, *given)

    all_words = words(images, tmp_path / "out", vae_folder, "--flip")
    with monkeypatch.context() as patch:
        patch.setattr(LatentWriter, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(all_words)
    assert not (tmp_path / "out" / "index.json").exists()
    capsys.readouterr()
    run(all_words)
    out = capsys.readouterr().out
    assert "finished: 2" in out
    assert "train-00001" not in out
    for path in encoded.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name
    run(all_words)
    assert ".safetensors" not in capsys.readouterr().out


def test_another_image_or_option_is_not_mixed_in(
    images: Path, vae_folder: Path, encoded: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"form.has_mirrored True, but False is asked for"):
        run(words(images, encoded, vae_folder))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    with pytest.raises(ConfigError, match=r"holds notes.txt"):
        run(words(images, tmp_path / "mine", vae_folder))


def test_grey_images_of_another_set_are_encoded(
    model: Any, vae_folder: Path, tmp_path: Path
) -> None:
    """scikit-learn's digits, as colour."""
    run(
        [
            *(str(tmp_path), str(tmp_path / "out"), "--vae", str(vae_folder), "--data.name"),
            *("digits", "--data.num_workers", "1", "--batch-size", "400", "--dtype", "float32"),
        ]
    )
    test, (images, labels) = load(tmp_path / "out", "test"), read_table("digits", is_train=False)
    assert test.labels.tolist() == labels
    with torch.no_grad():
        colour = (images[:9] * 2 - 1).expand(-1, 3, -1, -1)
        expected = (model.encode(colour).latent_dist.mean - 0.2) * 0.3
    found = denormalize(batch_of(test)[:9], test.spec)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_check_data_compares_hashes(
    encoded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in encoded.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    given = ["--data.name", "latents", "--data.root", str(tmp_path)]
    check_data(given)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "train 14 latents of 2 classes, test 6"
    assert [line.split() for line in lines[2:4]] == [["0", "cat", "7", "3"], ["1", "dog", "7", "3"]]
    assert lines[-1] == "all 20 samples can be used"
    damaged = tmp_path / "train-00001.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-50] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(DataError, match="damaged: 1"):
        check_data(given)
    assert f"bad: {damaged} is not what was written" in capsys.readouterr().out


# -- the autoencoder -------------------------------------------------------------------------------


def test_weights_under_the_older_names_of_attention_are_read(
    model: Any, vae_folder: Path, tmp_path: Path
) -> None:
    """As the published autoencoders of Stable Diffusion have them."""
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = safetensors.torch.load_file(vae_folder / WEIGHTS)
    for new, old in older.items():
        weights = {name.replace(f".{new}.", f".{old}."): value for name, value in weights.items()}
    assert any(".query." in name for name in weights)
    (tmp_path / CONFIG).write_bytes((vae_folder / CONFIG).read_bytes())
    safetensors.torch.save_file(weights, tmp_path / WEIGHTS)
    image = torch.rand(1, 3, SIDE, SIDE)
    mean, _ = load_vae(tmp_path, CPU).encode(image)
    with torch.no_grad():
        expected = (model.encode(image).latent_dist.mean - 0.2) * 0.3
    torch.testing.assert_close(mean, expected)


def copied(vae_folder: Path, folder: Path, **config: Any) -> Path:
    """The autoencoder's folder with another configuration."""
    folder.mkdir(exist_ok=True)
    (folder / WEIGHTS).write_bytes((vae_folder / WEIGHTS).read_bytes())
    values = {**json.loads((vae_folder / CONFIG).read_text()), **config}
    (folder / CONFIG).write_text(json.dumps(values))
    return folder


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        load_vae(path, CPU)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 1000
    return message


def test_a_folder_that_is_no_autoencoder_is_refused(vae_folder: Path, tmp_path: Path) -> None:
    assert "is no folder" in refusal(tmp_path / "stabilityai/sd-vae-ft-ema")
    assert "config.json is missing" in refusal(tmp_path)
    copied(vae_folder, tmp_path / "vae")
    assert f"is a pipeline; its autoencoder is {tmp_path / 'vae'}" in refusal(tmp_path)
    assert "UNet2DModel" in refusal(copied(vae_folder, tmp_path / "a", _class_name="UNet2DModel"))
    (tmp_path / "a" / CONFIG).write_text("{")
    assert "no configuration" in refusal(tmp_path / "a")
    (copied(vae_folder, tmp_path / "b") / WEIGHTS).unlink()
    assert f"{WEIGHTS} is missing" in refusal(tmp_path / "b")
    (tmp_path / "b" / WEIGHTS).write_bytes(b"no weights")
    assert "cannot be loaded" in refusal(tmp_path / "b")


def test_weights_that_do_not_fit_are_refused(vae_folder: Path, tmp_path: Path) -> None:
    """diffusers itself would leave tensors at random values."""
    folder = copied(vae_folder, tmp_path / "a")
    weights = safetensors.torch.load_file(folder / WEIGHTS)
    without = {k: v for k, v in weights.items() if k != "decoder.conv_out.bias"}
    safetensors.torch.save_file(without, folder / WEIGHTS)
    assert "lacks decoder.conv_out.bias" in refusal(folder)
    safetensors.torch.save_file({**weights, "more": torch.zeros(1)}, folder / WEIGHTS)
    assert "foreign more" in refusal(folder)
    assert "cannot be loaded" in refusal(copied(vae_folder, tmp_path / "b", latent_channels=8))


def test_without_diffusers_one_line_says_what_to_install(
    vae_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ConfigError, match=r"pip install 'dbdist\[latents\]'"):
        load_vae(vae_folder, CPU)


# -- the command line ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--image-size", "15"], "multiple of 2"),
        (["--train.lr", "1"], "--train.lr is no option of this command"),
        (["--data.augment.flip", "true"], "--flip"),
        (["--data.nam", "digits"], "did you mean --data.name"),
        (["--device", "tpu"], "--device tpu"),
        (["--device", "cuda:77"], "no such GPU"),
    ],
)
def test_a_mistake_is_refused_before_anything_is_written(
    images: Path, vae_folder: Path, tmp_path: Path, more: list[str], said: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        run(words(images, tmp_path / "out", vae_folder, *more))
    assert said in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_set_of_anything_but_images_is_refused(encoded: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="latents is no set of images"):
        run([str(encoded), str(tmp_path / "out"), "--vae", "x", "--data.name", "latents"])
