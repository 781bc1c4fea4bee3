"""The network of the published FID, where its weights are on disk; nothing is downloaded.

torch-fidelity's Inception v3 resizes and computes as the original TensorFlow graph does. Its 2,048
features before the last layer are those of FID (TTUR, 1706.08500).
"""

import hashlib
import io
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dbdist.errors import ConfigError
from dbdist.tasks.extractor import Seen
from dbdist.whole_files import read_file

NUM_FEATURES = 2048
WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{WEIGHTS}"
SHA256 = "6726825d"
"""How the published file's SHA-256 begins, as its name says."""


def missing(folder: Path) -> str | None:
    """What the published network lacks to be used, as part of a sentence; None: nothing.

    folder: where its weights should be.
    """
    if find_spec("torch_fidelity") is None:
        return "the package torch-fidelity (pip install 'dbdist[fid]')"
    if not (folder / WEIGHTS).exists():
        return f"{folder / WEIGHTS}; get {URL} elsewhere and put it there"
    return None


class Inception(nn.Module):
    """Inception v3 of the published FID, for images of one or three channels."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Float[Tensor, "n c s s"]) -> Seen:
        """Of images from -1 to 1, as 8-bit colours; it knows none of the data set's classes."""
        shown = (127.5 * (pixels.nan_to_num(0) + 1)).round().to(torch.uint8)
        (features,) = self.network(shown.expand(-1, 3, -1, -1))
        return Seen(features, None)


def load_inception(folder: Path) -> Inception:
    """The network with its published weights. Raises ConfigError."""
    path = folder / WEIGHTS
    if (lacks := missing(folder)) is not None:
        raise ConfigError(f"task.features: inception needs {lacks}")
    try:
        content = read_file(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); get it from {URL}") from None
    if not hashlib.sha256(content).hexdigest().startswith(SHA256):
        raise ConfigError(
            f"{path} is damaged, as its SHA-256 does not begin with {SHA256}; get it from {URL}"
        )
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    try:
        network: Any = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=_plain(content)
        )
    except Exception as error:  # torch raises many types for files of another kind
        raise ConfigError(
            f"{path} does not hold the network's weights ({type(error).__name__}); get it from "
            f"{URL}"
        ) from None
    return Inception(network)


def _plain(content: bytes) -> io.BytesIO:
    """The same tensors in a file of our own: torch-fidelity unpickles without restrictions."""
    tensors = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    file = io.BytesIO()
    torch.save(tensors, file)
    file.seek(0)
    return file
