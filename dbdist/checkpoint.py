"""RUN/checkpoints: one folder a step, one safetensors file a block, the manifest last.

Files are named by block, never by rank, and tensors by parameter, so any topology may read what any
other wrote. The manifest holds every file's size and SHA-256; a folder without one, and without the
parts of all blocks (`parts`), is no checkpoint. Nothing that is read can execute code. Here is the
reading; `checkpoint_writer` writes.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dbdist.errors import CheckpointError
from dbdist.inference import load_weights
from dbdist.parts import assemble, blocks_in, differences, has_all

FORMAT = "dbdist-checkpoint"
VERSION = 1
MANIFEST = "manifest.json"
_HEAD = {"format": FORMAT, "version": VERSION}
SHARED = "shared.safetensors"
PREFIX = "shared."
"""In a block's file, before the names of shared modules that this block keeps for itself."""
FOLDER = re.compile(r"step-(\d{8,})")
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


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        return self.manifest["step"]

    def has(self, file: str) -> bool:
        return file in self.manifest["files"]

    def tensors(self, file: str) -> dict[str, Tensor]:
        """A file's tensors, after its size and SHA-256. Raises CheckpointError naming the file."""
        path = self.path / file
        if not self.has(file):
            raise CheckpointError(
                f"{path} is not part of this checkpoint ({MANIFEST} does not list it)"
            )
        stated = self.manifest["files"][file]
        try:
            size = path.stat().st_size
            intact = size == stated["bytes"] and _sha256(path) == stated["sha256"]
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error.strerror})") from None
        if not intact:
            raise CheckpointError(
                f"{path} is damaged: {size} bytes, {stated['bytes']} were written, or another "
                "content; remove this checkpoint's folder to fall back on an older one"
            )
        return load_weights(path)

    def check_sizes(self) -> None:
        """Raises CheckpointError, naming the file, if one is missing or not as long as written."""
        for file, stated in self.manifest["files"].items():
            path = self.path / file
            size = path.stat().st_size if path.is_file() else None
            if size != stated["bytes"]:
                found = "is missing" if size is None else f"is damaged: {size} bytes"
                raise CheckpointError(
                    f"{path} {found}, {stated['bytes']} were written; "
                    "remove this checkpoint's folder to fall back on an older one"
                )

    def check_fits(self, description: Mapping[str, Any]) -> None:
        """Raises CheckpointError, naming the first difference, unless it is of this model and
        partition."""
        if difference := next(differences(self.manifest["model"], description), None):
            key, stored, value = difference
            raise CheckpointError(
                f"{self.path} holds a model with {key} {stored}, the configuration says {value}; "
                "use its own configuration or another run_dir"
            )


def find_checkpoint(run_dir: Path, step: int | None = None) -> Checkpoint | None:
    """The complete checkpoint of this step, or the newest; None where there is none."""
    folder = run_dir / "checkpoints"
    complete = {step_of(path): path for path in complete_folders(folder)}
    if step is not None and step not in complete:
        raise CheckpointError(
            f"{folder} has no checkpoint of step {step}; it has {sorted(complete) or 'none'}"
        )
    if not complete:
        return None
    path = complete[step if step is not None else max(complete)]
    return Checkpoint(path, read_manifest(path))


def find_blocks(run_dir: Path, blocks: Iterable[int]) -> Checkpoint | None:
    """The newest step that all these blocks have saved, whatever the others have: a checkpoint of
    these blocks alone. None where there is none."""
    wanted = set(blocks)
    for path in sorted(step_folders(run_dir / "checkpoints"), key=step_of, reverse=True):
        if wanted <= set(blocks_in(path)):
            return Checkpoint(path, {**_HEAD, **assemble(path, sorted(wanted))})
        if (path / MANIFEST).is_file():
            checkpoint = Checkpoint(path, read_manifest(path))
            if all(checkpoint.has(block_file(block)) for block in wanted):
                return checkpoint
    return None


def newest_steps(run_dir: Path, num_blocks: int) -> list[int | None]:
    """The newest step that each block has saved; None for one that has none."""
    steps: list[int | None] = [None] * num_blocks
    for path in sorted(step_folders(run_dir / "checkpoints"), key=step_of):
        has_manifest = (path / MANIFEST).is_file()
        for block in range(num_blocks) if has_manifest else blocks_in(path):
            if block < num_blocks:
                steps[block] = step_of(path)
    return steps


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a step's folder: manifest.json, or what the parts of all blocks are together.
    Raises CheckpointError for a damaged one."""
    if not (path / MANIFEST).is_file():
        if not has_all(path):
            raise CheckpointError(f"{path} is incomplete: it has neither {MANIFEST} nor all parts")
        return {**_HEAD, **assemble(path)}
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        readable = manifest["format"] == FORMAT and manifest["version"] == VERSION
        readable = (
            readable and manifest["step"] == step_of(path) and isinstance(manifest["model"], dict)
        )
        for entry in manifest["files"].values():
            readable = (
                readable and isinstance(entry["bytes"], int) and isinstance(entry["sha256"], str)
            )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        readable = False
        manifest = {}
    if not readable:
        raise CheckpointError(
            f"{path / MANIFEST} is damaged, of another step or not {FORMAT} version {VERSION}; "
            "remove this folder to fall back on an older checkpoint"
        )
    return manifest


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def step_folders(folder: Path) -> list[Path]:
    """Folders named like checkpoints, complete or not."""
    try:
        return [p for p in folder.iterdir() if p.is_dir() and FOLDER.fullmatch(p.name)]
    except (FileNotFoundError, NotADirectoryError):
        return []


def step_of(path: Path) -> int:
    """Of a folder that is named like a checkpoint."""
    return int(path.name.removeprefix("step-"))


def is_complete(path: Path) -> bool:
    """Whether a step's folder holds all blocks: by its manifest, or by a part of each."""
    return (path / MANIFEST).is_file() or has_all(path)


def complete_folders(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    return sorted((path for path in step_folders(folder) if is_complete(path)), key=step_of)
