"""How the files and folders of a checkpoint are called."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from dbdist.errors import CheckpointError

MANIFEST = "manifest.json"
SHARED = "shared.safetensors"
PREFIX = "shared."
"""In a block's file, before the names of shared modules that this block keeps for itself."""
FOLDER = re.compile(r"step-(\d{8}|[1-9]\d{8,})", re.ASCII)
FILE = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
"""What a manifest may name: a file in the same folder."""


Files = Mapping[str, Mapping[str, Tensor]]
"""File name -> parameter name -> tensor."""


def block_file(block: int) -> str:
    return f"block-{block}.safetensors"


def optimizer_file(file: str) -> str:
    """The optimizer state that goes with a weights file."""
    return file.replace(".safetensors", ".optimizer.safetensors")


def ema_file(file: str) -> str:
    """The averaged weights that go with a weights file."""
    return file.replace(".safetensors", ".ema.safetensors")


def split_private(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(the layers in a block's file, the shared modules that stand there under PREFIX)."""
    private = {k.removeprefix(PREFIX): t for k, t in tensors.items() if k.startswith(PREFIX)}
    return {k: t for k, t in tensors.items() if not k.startswith(PREFIX)}, private


def step_folders(folder: Path) -> list[Path]:
    """Lists the folders that are named like checkpoints, complete or not.

    Raises CheckpointError if they cannot be listed.
    """
    try:
        return [p for p in folder.iterdir() if p.is_dir() and FOLDER.fullmatch(p.name)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read ({error.strerror})") from None


def step_folder(step: int) -> str:
    """The name of a step's folder, and of what else belongs to a step: `step-00000500`."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """Returns the step of a folder that is named like a checkpoint."""
    return int(path.name.removeprefix("step-"))


PART_FILE = re.compile(r"block-(\d+)\.part\.json")


def part_file(block: int) -> str:
    return f"block-{block}.part.json"


def blocks_in(path: Path) -> list[int]:
    """The blocks that have a part in a step's folder, ascending; none without the folder."""
    try:
        names = os.listdir(path)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from None
    return sorted(int(match[1]) for name in names if (match := PART_FILE.fullmatch(name)))
