"""The networks and files behind the figures of generated images: chosen, made once, read.

`prepare_features` puts on disk what the figures need, in one process a node; `feature_figures`
reads it in every process. Knows nothing of ranks.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from dbdist import log
from dbdist.config.options import DataOptions
from dbdist.data.base import Dataset
from dbdist.data.images import DatasetSpec
from dbdist.data.sources import load_dataset
from dbdist.errors import ConfigError, DataError
from dbdist.tasks import extractor, inception
from dbdist.tasks.base import Figures
from dbdist.tasks.extractor import Extractor, as_shown, images_of, subset
from dbdist.tasks.extractor_cache import file_of, folder_of, read_cached, write_cached
from dbdist.tasks.image_figures import FeatureFigures, NearestFigures
from dbdist.tasks.options import FeatureOptions
from dbdist.whole_files import locked

MAX_REFERENCE = 10_000
"""Training images that the floor of the Frechet distance is measured with."""
MAX_NEAREST, NEAREST_BYTES = 10_000, 2**26
"""Training images, and bytes of them, among which the nearest one is looked for."""
AUTO_SIDE = 32
"""Side in pixels from which `auto` takes the published network."""


def features_of(
    options: FeatureOptions, data: DataOptions, spec: Any
) -> Literal["inception", "small", "none"]:
    """Whose features `task.features` means for this data. Raises ConfigError."""
    if options.features == "none":
        return "none"
    if options.features == "small":
        return "small"
    lacks = inception.missing(folder_of(data.root))
    if options.features == "auto":
        is_photo = isinstance(spec, DatasetSpec) and spec.channels == 3
        return "inception" if is_photo and spec.image_size >= AUTO_SIDE and not lacks else "small"
    if not isinstance(spec, DatasetSpec) or spec.channels not in (1, 3):
        raise ConfigError(
            f"task.features: inception sees grey and colour images, which {spec.name} has not; "
            "use small"
        )
    if lacks is not None:
        raise ConfigError(f"task.features: inception needs {lacks}, or use small")
    return "inception"


def prepare_features(
    options: FeatureOptions,
    data: DataOptions,
    train_set: Dataset,
    device: torch.device = torch.device("cpu"),  # noqa: B008
) -> None:
    """Makes the files that `feature_figures` reads, unless they are there; once a node.

    A damaged file is made again. Raises ConfigError, or DataError where they cannot be written.
    """
    folder = folder_of(data.root)
    features = features_of(options, data, train_set.spec)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            _make(file_of(folder, "small", train_set), lambda: _small(train_set, device))
            if features == "inception":
                path = file_of(folder, "inception", train_set)
                _make(path, lambda: _inception(folder, train_set, device))
    except OSError as error:
        raise DataError(
            f"{folder} cannot be written ({error.strerror}); figures of images need it, choose "
            "another data.root"
        ) from None


def feature_figures(options: FeatureOptions, data: DataOptions) -> list[Figures]:
    """The figures of generated images, from the files of `prepare_features`.

    Reads the training set: a task should call it once. Raises DataError where a file is missing or
    damaged.
    """
    train_set, folder = load_dataset(data, "train"), folder_of(data.root)
    spec: Any = train_set.spec
    small = read_cached(file_of(folder, "small", train_set))
    network = extractor.empty_small_network(spec)
    network.load_state_dict({n: v for n, v in small.tensors.items() if n != "reference"})
    classifier = Extractor(network, extractor.NUM_FEATURES, spec)
    seer, reference, digest = classifier, small.tensors["reference"], small.digest
    if features_of(options, data, spec) == "inception":
        seer = Extractor(inception.load_inception(folder), inception.NUM_FEATURES, spec)
        reference = read_cached(file_of(folder, "inception", train_set)).tensors["reference"]
    num_pixels = spec.channels * spec.image_size**2
    num_nearest = min(MAX_NEAREST, NEAREST_BYTES // (4 * num_pixels))
    chosen = images_of(train_set, subset(train_set, max(1, num_nearest), "nearest"))
    train_images = torch.cat([as_shown(images, spec) for images in chosen])
    return [
        FeatureFigures(seer, classifier, reference, digest),
        NearestFigures(train_images, spec),
    ]


def _make(path: Path, make: Callable[[], dict[str, Tensor]]) -> None:
    if path.exists():
        try:
            read_cached(path)
            return
        except DataError:
            log.warning(f"{path} is damaged and is made again")
    write_cached(path, make())


def _small(train_set: Dataset, device: torch.device) -> dict[str, Tensor]:
    network = extractor.train_small_network(train_set, device)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    seer = Extractor(network, extractor.NUM_FEATURES, train_set.spec)
    return {**state, "reference": _reference(seer, train_set, device)}


def _inception(folder: Path, train_set: Dataset, device: torch.device) -> dict[str, Tensor]:
    network = inception.load_inception(folder)
    seer = Extractor(network, inception.NUM_FEATURES, train_set.spec)
    return {"reference": _reference(seer, train_set, device)}


def _reference(seer: Extractor, train_set: Dataset, device: torch.device) -> Float[Tensor, "m d"]:
    """Features of training images, whose order is random."""
    chosen = images_of(train_set, subset(train_set, MAX_REFERENCE, "reference"))
    return torch.cat([seer(images.to(device)).features.cpu() for images in chosen])
