"""Files that figures of images need: the small network, and features of training images.

DATA_ROOT/extractors/NAME-DIGEST.safetensors: the digest names the training images, their form and
the recipe, so other data has other files. One process a node makes them (`dbdist.tasks.features`).
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dbdist.data.base import Dataset
from dbdist.data.images import DatasetSpec
from dbdist.errors import DataError
from dbdist.tasks.extractor import RECIPE
from dbdist.whole_files import check_file, write_whole

CONTENT = "sha256"
"""Where a file says what its tensors are."""


@dataclass(frozen=True)
class Cached:
    """The content of a file."""

    tensors: dict[str, Tensor]
    digest: str
    """SHA-256 of the tensors."""


def folder_of(root: str | Path) -> Path:
    """Where the files of the data under this `data.root` are."""
    return Path(root).expanduser().absolute() / "extractors"


def file_of(folder: Path, name: str, train_set: Dataset) -> Path:
    """The file of this name for these training images, whatever `data.scaling` is."""
    spec: Any = train_set.spec
    form = spec.identity()
    if isinstance(spec, DatasetSpec):
        form = [spec.channels, spec.image_size, spec.num_classes]
    made_of = {"recipe": RECIPE, "form": form, "train": train_set.digest()}
    digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
    return folder / f"{name}-{digest[:16]}.safetensors"


def read_cached(path: Path) -> Cached:
    """The tensors of a file. Raises DataError where it is missing or damaged."""
    try:
        check_file(path)
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
            stated = (file.metadata() or {}).get(CONTENT)
    except FileNotFoundError:
        raise DataError(
            f"{path} is missing; training makes it, and evaluation where the training images are"
        ) from None
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, " ".join(str(error).split())[:200]) from None
    digest = _digest(tensors)
    if digest != stated:
        raise _damaged(path, "its content has changed")
    return Cached(tensors, digest)


def write_cached(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes a file whole or not at all; raises OSError."""
    write_whole(path, save(tensors, {CONTENT: _digest(tensors)}))


def _damaged(path: Path, reason: str) -> DataError:
    return DataError(f"{path} is damaged ({reason}); delete it to have it made again")


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), *tensor.shape]).encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
