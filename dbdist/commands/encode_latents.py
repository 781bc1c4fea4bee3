"""Computes the latents of a set of images once, for --data.name latents.

    dbdist encode-latents FOLDER OUT --vae PATH

FOLDER holds pictures as data.name image_folder reads them; --data.name NAME takes another set of
images, whose files are in FOLDER. PATH is a folder with config.json and
diffusion_pytorch_model.safetensors of a diffusers AutoencoderKL. Nothing is downloaded. After an
interruption, the same command again goes on where it was.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dbdist.commands.command_line import OneLineParser, guarded
from dbdist.commands.progress import progress_bar
from dbdist.config.config import check_values
from dbdist.config.parse import parse_config
from dbdist.data.found import describe_found, identity_of
from dbdist.data.images import DatasetSpec, ImageDataset
from dbdist.data.latent_files import INDEX, Contents, Form, Split
from dbdist.data.latent_writer import LatentWriter, opened_writer
from dbdist.data.options import AugmentOptions, ImageOptions
from dbdist.data.sources import load_dataset, prepare
from dbdist.data.vae import Vae, load_vae
from dbdist.data.workers import load_batches
from dbdist.errors import ConfigError

Data = Mapping[Split, ImageDataset]


def main(argv: list[str] | None = None) -> None:
    guarded(
        "dbdist encode-latents",
        lambda: run(sys.argv[1:] if argv is None else argv),
        interrupted="finished shards are kept; the same command goes on",
    )


def run(argv: list[str]) -> None:
    given, options = _parser().parse_known_args(argv)
    images = images_of(given.folder, given.image_size, options)
    vae = load_vae(Path(given.vae), _device(given.device))
    prepare(images)
    data: dict[Split, Any] = {"train": load_dataset(images, "train")}
    data["test"] = load_dataset(images, "test")
    print(describe_found(data["train"], data["test"]))
    contents = contents_of(data, vae, given)
    num_samples = {split: len(dataset) for split, dataset in data.items()}
    out = Path(given.out)
    with opened_writer(out, contents, num_samples) as writer:
        if writer.num_kept:
            print(f"{given.out}: shards that are finished: {writer.num_kept}")
        encode(data, vae, writer, given.batch_size, images.num_workers)
        if not (out / INDEX).exists():
            writer.finish()
    print(f"{given.out}: dbdist train … --data.name latents --data.root {given.out}")


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog="dbdist encode-latents",
        description=__doc__,
        epilog="Further options: --data.name, --data.num_workers, --data.on_error as for train.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", metavar="FOLDER", help="the images")
    parser.add_argument("out", metavar="OUT", help="folder to write, new or begun by this command")
    parser.add_argument("--vae", metavar="PATH", required=True, help="folder of the autoencoder")
    parser.add_argument("--batch-size", type=_count, default=32, metavar="N", help="default 32")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    parser.add_argument(
        "--image-size", type=_count, metavar="S", help="side in pixels; default: data.image_size"
    )
    parser.add_argument(
        "--flip", action="store_true", help="training images also mirrored left-right"
    )
    parser.add_argument(
        "--mean-only", action="store_true", help="means of the posteriors, without what to draw by"
    )
    parser.add_argument(
        "--dtype", choices=["float16", "float32"], default="float16", help="default float16"
    )
    parser.add_argument(
        "--shard-size", type=_count, default=8192, metavar="N", help="images a file; default 8192"
    )
    return parser


def _count(word: str) -> int:
    if not (word.isascii() and word.isdigit() and 0 < int(word) < 2**31):
        raise argparse.ArgumentTypeError(f"{word} is no number of something")
    return int(word)


def _device(name: str) -> torch.device:
    has_gpu = torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if has_gpu else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"--device {name}: use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device {name}: use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and not (has_gpu and (device.index or 0) < torch.cuda.device_count()):
        raise ConfigError(f"--device {name}: there is no such GPU; use auto or cpu")
    return device


def images_of(folder: str, image_size: int | None, words: list[str]) -> ImageOptions:
    """The set of images that the command line means. Raises ConfigError."""
    for word in words:
        if word.startswith("--") and not word.startswith("--data."):
            raise ConfigError(f"{word.partition('=')[0]} is no option of this command; see --help")
    words = ["--data.name", "image_folder", "--data.root", folder, *words]
    if image_size is not None:
        words += ["--data.image_size", str(image_size)]
    config = parse_config("dbdist encode-latents", "", words)
    check_values(config)
    data = config.data
    data.check()
    if not isinstance(data, ImageOptions):
        raise ConfigError(f"data.name {data.name} is no set of images")
    if data.augment != AugmentOptions():
        raise ConfigError(
            "images are encoded as they are; leave data.augment out (--flip encodes mirrored ones)"
        )
    return data


def contents_of(data: Data, vae: Vae, given: argparse.Namespace) -> Contents:
    """What the folder is to hold.

    given: with flip, mean_only, dtype and shard_size. Raises ConfigError for images that the
    autoencoder cannot take.
    """
    spec = data["train"].spec
    if spec.channels not in (1, vae.image_channels):
        raise ConfigError(
            f"{spec.name} has images of {spec.channels} channels, the autoencoder takes "
            f"{vae.image_channels}"
        )
    if spec.image_size % vae.factor:
        raise ConfigError(
            f"images of {spec.image_size} pixels a side cannot be encoded; --image-size must be a "
            f"multiple of {vae.factor}"
        )
    form = Form(
        vae.channels, spec.image_size // vae.factor, given.dtype, not given.mean_only, given.flip
    )
    source = identity_of(data["train"], data["test"])
    names = spec.class_names
    return Contents(form, vae.identity, spec.num_classes, names, given.shard_size, source)


def encode(
    data: Data, vae: Vae, writer: LatentWriter, batch_size: int, num_workers: int = 0
) -> None:
    """Writes every shard that is still missing."""
    for split, dataset in data.items():
        missing = writer.missing(split)
        if not missing:
            continue
        batches = [
            [*samples[start : start + batch_size]]
            for _, samples in missing
            for start in range(0, len(samples), batch_size)
        ]
        loading = closing(load_batches(dataset, batches, num_workers))
        with loading as loaded, progress_bar() as bar:
            task = bar.add_task(split, total=sum(len(samples) for _, samples in missing))
            for number, samples in missing:
                parts: list[dict[str, Tensor]] = []
                num_done = 0
                while num_done < len(samples):
                    batch = next(loaded)
                    pixels = pixels_of(batch["image"], dataset.spec, vae)
                    latents = dict(_latents(pixels, vae, writer.contents.form, split))
                    parts.append({**latents, "labels": batch["label"]})
                    num_done += len(pixels)
                    bar.advance(task, len(pixels))
                tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
                labels = tensors.pop("labels")
                shard = writer.add(split, number, tensors, labels)
                print(f"{shard.file}: {shard.num_samples:,} images")


def pixels_of(
    images: Float[Tensor, "n c s s"], spec: DatasetSpec, vae: Vae
) -> Float[Tensor, "n k s s"]:
    """Images of a set as the autoencoder takes them: in [-1, 1], grey ones as colour."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (spec.mean, spec.std))
    pixels = (2 * (images * std + mean) - 1).clamp(-1, 1)
    return pixels.expand(-1, vae.image_channels, -1, -1)


def _latents(
    pixels: Float[Tensor, "n c s s"], vae: Vae, form: Form, split: Split
) -> Iterator[tuple[str, Tensor]]:
    """(name, values) of every tensor that a shard is to hold of these images."""
    yield from zip(form.names(), vae.encode(pixels), strict=False)
    if form.has_mirrored and split == "train":
        yield from zip(form.names(is_mirrored=True), vae.encode(pixels.flip(-1)), strict=False)


if __name__ == "__main__":
    main()
