"""Networks that turn images into features, and the small one that dbdist trains for that.

Takes images (or latents) in the normalised scale of a data set. The small network is a function of
the training images, the recipe and the seed, so that figures of different runs can be compared.
Nothing here moves the global random generators or communicates.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dbdist import seeds
from dbdist.data.base import Dataset
from dbdist.data.images import DatasetSpec
from dbdist.models.empty import to_empty

RECIPE = 1
"""Number of the small network's recipe: its form and its training; changes make it another."""
NUM_FEATURES = 64
WIDTHS = (16, 32, 64, 64, 64)
"""Channels of the convolutions; each but the last is followed by a halving."""
MAX_KEPT = 7
"""Side at which an image is no longer halved."""
MAX_SIDE = 64
"""Larger images are averaged down to this side."""
BATCH_SIZE = 64
LR, BETAS, EPS, SMOOTHING = 1e-3, (0.9, 0.999), 1e-8, 0.1
MIN_SEEN, MAX_SEEN, EPOCHS = 20_000, 150_000, 3
"""Training images: so many epochs, within these bounds."""


class Seen(NamedTuple):
    """What a network sees in images; nan for an image that is not finite."""

    features: Float[Tensor, "n d"]
    logits: Float[Tensor, "n k"] | None
    """Of the data set's classes; None from a network that knows others."""


class Extractor:
    """A network, from images in the normalised scale of a data set to features, in float32."""

    def __init__(self, network: nn.Module, num_features: int, spec: Any) -> None:
        """network: what `as_shown` gives -> `Seen`. spec: of the data set."""
        self.network, self.num_features, self.spec = network, num_features, spec
        network.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "n c s s"]) -> Seen:
        """Features on the images' device, whatever precision is set around."""
        is_finite_N1 = images.isfinite().flatten(1).all(dim=1, keepdim=True)
        network = self.network.to(images.device)
        with full_precision(images.device):
            features, logits = network(as_shown(images, self.spec))
        if logits is not None:
            logits = logits.where(is_finite_N1, torch.nan)
        return Seen(features.where(is_finite_N1, torch.nan), logits)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Neither autocast nor TF32, and the same result each time."""
    exact = torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=False
    )
    with torch.autocast(device.type, enabled=False), exact:
        yield


def as_shown(images: Float[Tensor, "n c s s"], spec: Any) -> Float[Tensor, "n c s s"]:
    """Images as float32 from -1, black, to 1, white; what lies outside cannot be shown.

    Latents stay in their normalised scale. spec: of the data set.
    """
    if not isinstance(spec, DatasetSpec):
        return images.float()
    mean, std = (
        torch.tensor(v, dtype=torch.float32, device=images.device).view(-1, 1, 1)
        for v in (spec.mean, spec.std)
    )
    return 2 * (images.float() * std + mean).clamp(0, 1) - 1


class SmallNetwork(nn.Module):
    """Convolutions, 64 features of a ReLU layer, and logits of the classes.

    The features are normalised before the ReLU: their size is about 1 whatever the images, which
    the kernel of KID relies on, and none of them dies.
    """

    def __init__(self, channels: int, image_size: int, num_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        side = min(image_size, MAX_SIDE)
        for width in WIDTHS:
            layers += [nn.Conv2d(channels, width, 3, padding=1, dtype=torch.float32), nn.ReLU()]
            channels = width
            if side <= MAX_KEPT:
                break
            layers.append(nn.MaxPool2d(2))
            side //= 2
        self.convolutions = nn.Sequential(*layers)
        self.features = nn.Linear(channels * side**2, NUM_FEATURES, dtype=torch.float32)
        self.logits = nn.Linear(NUM_FEATURES, num_classes, dtype=torch.float32)

    def forward(self, pixels: Float[Tensor, "n c s s"]) -> Seen:
        """Of images from -1 to 1."""
        if pixels.shape[-1] > MAX_SIDE:
            pixels = F.adaptive_avg_pool2d(pixels, MAX_SIDE)
        hidden = self.features(self.convolutions(pixels).flatten(1))
        features = F.layer_norm(hidden, (NUM_FEATURES,)).relu()
        return Seen(features, self.logits(features))


def empty_small_network(spec: Any) -> SmallNetwork:
    """The small network for this data, without values."""
    with torch.device("meta"):
        network = SmallNetwork(spec.channels, spec.image_size, spec.num_classes)
    to_empty(network, torch.device("cpu"))
    return network


def train_small_network(train_set: Dataset, device: torch.device, seed: int = 0) -> SmallNetwork:
    """The small network after its training on these images, on the CPU.

    Cross-entropy with smoothed labels, Adam, a learning rate that falls linearly to zero. Images
    are not augmented.
    """
    network = empty_small_network(train_set.spec)
    for name, parameter in network.named_parameters():
        nn.init.zeros_(parameter)
        if parameter.ndim > 1:
            generator = seeds.generator(seed, "extractor", name)
            nn.init.kaiming_normal_(parameter, nonlinearity="relu", generator=generator)
    network.to(device)
    num_steps = _num_steps(len(train_set))
    adam = _Adam(list(network.parameters()))
    with torch.enable_grad(), full_precision(device):
        for step, index in zip(range(num_steps), _shuffled(len(train_set), seed), strict=False):
            batch = train_set.__getitems__(index)
            pixels = as_shown(batch["image"].to(device), train_set.spec)
            label_N = batch["label"].to(device)
            loss = F.cross_entropy(network(pixels).logits, label_N, label_smoothing=SMOOTHING)
            adam.step(loss, LR * (1 - step / num_steps))
    return network.cpu()


class _Adam:
    """Adam (1412.6980), without the seconds that the first step of torch's takes to import."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters, self.num_steps = parameters, 0
        self.mean, self.square = ([torch.zeros_like(p) for p in parameters] for _ in range(2))

    def step(self, loss: Float[Tensor, ""], lr: float) -> None:
        gradients = torch.autograd.grad(loss, self.parameters)
        self.num_steps += 1
        scale = lr / (1 - BETAS[0] ** self.num_steps)
        correction = 1 - BETAS[1] ** self.num_steps
        with torch.no_grad():
            for p, g, m, v in zip(self.parameters, gradients, self.mean, self.square, strict=True):
                m.lerp_(g, 1 - BETAS[0])
                v.lerp_(g * g, 1 - BETAS[1])
                p.addcdiv_(m, (v / correction).sqrt_().add_(EPS), value=-scale)


def images_of(
    dataset: Dataset, index: Sequence[int], size: int = 256
) -> Iterator[Float[Tensor, "n c s s"]]:
    """These images, some at a time, unchanged by augmentation."""
    for start in range(0, len(index), size):
        yield dataset.__getitems__([*index[start : start + size]])["image"]


def subset(dataset: Dataset, num_images: int, purpose: str) -> list[int]:
    """So many samples at random, always the same ones; a shorter subset is a longer one's start."""
    order = torch.randperm(len(dataset), generator=seeds.generator(0, purpose))
    return order[:num_images].tolist()


def _num_steps(num_images: int) -> int:
    return min(max(EPOCHS * num_images, MIN_SEEN), MAX_SEEN) // BATCH_SIZE


def _shuffled(num_images: int, seed: int) -> Iterator[list[int]]:
    """Batches without end, from a permutation an epoch; the last one of an epoch may be small."""
    for epoch in count():
        generator = seeds.generator(seed, "extractor", "order", epoch)
        yield from map(
            Tensor.tolist, torch.randperm(num_images, generator=generator).split(BATCH_SIZE)
        )
