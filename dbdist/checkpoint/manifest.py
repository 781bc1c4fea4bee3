"""RUN/checkpoints: one folder a step, one safetensors file a block, the manifest last.

Files are named by block, never by rank, and tensors by parameter, so any topology may read what any
other wrote. The manifest holds every file's size and SHA-256; a folder without one, and without the
parts of all blocks (`parts`), is no checkpoint. Nothing that is read can execute code. Here is the
reading; `writer` writes.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from dbdist import whole_files
from dbdist.checkpoint.names import FILE, MANIFEST, blocks_in, step_folders, step_of
from dbdist.checkpoint.older import upgraded_model
from dbdist.checkpoint.parts import assemble, differences, has_all
from dbdist.checkpoint.weights import load_weights
from dbdist.errors import CheckpointError, OtherModelError
from dbdist.whole_files import open_file, read_file, sync_folder, write_json

FORMAT = "dbdist-checkpoint"
VERSION = 1
_HEAD = {"format": FORMAT, "version": VERSION}


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    manifest: dict[str, Any]
    _verified: dict[str, tuple[int, int]] = field(default_factory=dict, compare=False)
    """Length and time of change of the files whose SHA-256 was right: none is hashed twice."""
    _held: list[int] = field(default_factory=list, compare=False)
    """The descriptor that keeps other processes from removing it."""

    @property
    def step(self) -> int:
        return self.manifest["step"]

    def close(self) -> None:
        """Lets a run that goes on remove it again."""
        while self._held:
            os.close(self._held.pop())

    def has(self, file: str) -> bool:
        return file in self.manifest["files"]

    def tensors(self, file: str) -> dict[str, Tensor]:
        """A file's tensors, after its size and SHA-256. Raises CheckpointError naming the file."""
        self.check(file)
        return load_weights(self.path / file)

    def check(self, file: str) -> None:
        """Raises CheckpointError unless the file's size and SHA-256 are the manifest's.

        The message names the file, and says where it holds the content of another one.
        """
        path = self.path / file
        if not self.has(file):
            raise CheckpointError(
                f"{path} is not part of this checkpoint ({MANIFEST} does not list it)"
            )
        stated, size = self.manifest["files"][file], self._size(file)
        try:
            now = size, path.stat().st_mtime_ns
            if self._verified.get(file) == now:
                return
            digest = _sha256(path)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error.strerror})") from None
        if size == stated["bytes"] and digest == stated["sha256"]:
            self._verified[file] = now
            return
        for other, entry in self.manifest["files"].items():
            if digest == entry["sha256"]:
                raise CheckpointError(f"{path} is damaged: it holds the content of {other}")
        if size != stated["bytes"]:
            raise self._wrong_size(file, size)
        raise CheckpointError(
            f"{path} is damaged: its SHA-256 is not the one that {MANIFEST} states"
        )

    def check_sizes(self) -> None:
        """Raises CheckpointError, naming the file, if one is missing or not as long as written.

        Another file of this checkpoint in its place is left to `check`, which says so.
        """
        for file, stated in self.manifest["files"].items():
            if (size := self._size(file)) != stated["bytes"]:
                if size in {entry["bytes"] for entry in self.manifest["files"].values()}:
                    self.check(file)
                raise self._wrong_size(file, size)

    def check_fits(self, description: Mapping[str, Any]) -> None:
        """Raises OtherModelError, naming the first difference, for another model or partition."""
        stored = self.manifest["model"]
        if "inputs" not in stored:  # of an older version
            description = {k: v for k, v in description.items() if k != "inputs"}
        if difference := next(differences(stored, description), None):
            key, stored, value = difference
            raise OtherModelError(
                f"{self.path} holds a model with {key} {_shown(stored)}, the configuration says "
                f"{value}; use its own configuration or another run_dir"
            )

    def _size(self, file: str) -> int:
        path = self.path / file
        try:
            return path.stat().st_size
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing") from None
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error.strerror})") from None

    def _wrong_size(self, file: str, size: int) -> CheckpointError:
        written = self.manifest["files"][file]["bytes"]
        return CheckpointError(
            f"{self.path / file} is damaged: {size} bytes, {written} were written"
        )


def find_checkpoint(run_dir: Path, step: int | None = None) -> Checkpoint | None:
    """Returns the complete checkpoint of this step, or the newest; None where there is none.

    Raises CheckpointError if its manifest is damaged.
    """
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


def saved_folders(folder: Path, blocks: Sequence[int] | None = None) -> list[Path]:
    """The folders that hold these blocks (None: a whole checkpoint), oldest first."""
    if blocks is None:
        return complete_folders(folder)
    found = [
        path
        for path in step_folders(folder)
        if (path / MANIFEST).is_file() or set(blocks) <= set(blocks_in(path))
    ]
    return sorted(found, key=step_of)


def open_folder(path: Path, blocks: Sequence[int] | None = None, hold: bool = False) -> Checkpoint:
    """The checkpoint in one of `saved_folders`; raises CheckpointError for a damaged one.

    hold: a run that goes on shall not remove it before `Checkpoint.close`. Raises OSError then.
    """
    held = [whole_files.hold(path)] if hold else []
    try:
        if blocks is not None and set(blocks) <= set(blocks_in(path)):
            return Checkpoint(path, {**_HEAD, **assemble(path, blocks)}, _held=held)
        return Checkpoint(path, read_manifest(path), _held=held)
    except BaseException:
        Checkpoint(path, {}, _held=held).close()
        raise


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
    """Reads the manifest of a step's folder: manifest.json, or the joined parts of all blocks.

    Raises CheckpointError for one that is damaged, of another format, version or step, or names
    files outside the folder.
    """
    file = path / MANIFEST
    if not file.exists():
        if not has_all(path):
            raise CheckpointError(f"{path} is incomplete: it has neither {MANIFEST} nor all parts")
        return {**_HEAD, **assemble(path)}
    try:
        manifest = json.loads(read_file(file))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{file} is damaged: it is no JSON") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{file} is damaged or foreign: its format is not {FORMAT}")
    if manifest.get("version") != VERSION:
        raise CheckpointError(
            f"{file} is of version {_shown(manifest.get('version'))}; this dbdist reads version "
            f"{VERSION}"
        )
    if type(step := manifest.get("step")) is not int or step != step_of(path):
        raise CheckpointError(f"{file} is damaged: it states step {_shown(step)}")
    files = manifest.get("files")
    if not isinstance(manifest.get("model"), dict) or not isinstance(files, dict):
        raise CheckpointError(f"{file} is damaged: model or files is missing")
    if not isinstance(manifest.get("data", {}), dict):
        raise CheckpointError(f"{file} is damaged: data is no object")
    for name, entry in files.items():
        if not FILE.fullmatch(name):
            raise CheckpointError(f"{file} is damaged: {_shown(name)} is no name of a file")
        sound = isinstance(entry, dict) and type(entry.get("bytes")) is int
        if not sound or not isinstance(entry.get("sha256"), str):
            raise CheckpointError(f"{file} is damaged: {name} has no size and SHA-256")
    return {**manifest, "model": upgraded_model(manifest["model"])}


def write_manifest(
    path: Path, content: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]]
) -> None:
    """Makes a step's folder a checkpoint, whose files are on disk already.

    files: size and SHA-256 by name. Raises OSError, and CheckpointError for a file that is not
    here.
    """
    for name, entry in files.items():
        if not (path / name).is_file() or (path / name).stat().st_size != entry["bytes"]:
            raise CheckpointError(
                f"{path / name} was written by another rank but is not here; "
                "run_dir must be one folder that all nodes share"
            )
    write_json(path / MANIFEST, {**_HEAD, **content, "files": dict(sorted(files.items()))})
    for folder in (path, path.parent, path.parent.parent):
        sync_folder(folder)


def _shown(value: object) -> str:
    """A value from a file that may be damaged, in one line that is not too long."""
    try:
        text = " ".join(str(value).split())
    except (RecursionError, ValueError):  # nested too deeply; a number of too many digits
        return "unreadable"
    return text if len(text) <= 100 else f"{text[:99]}…"


def _sha256(path: Path) -> str:
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_complete(path: Path) -> bool:
    """Whether a step's folder holds all blocks: by its manifest, or by a part of each."""
    return (path / MANIFEST).is_file() or has_all(path)


def complete_folders(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    return sorted((path for path in step_folders(folder) if is_complete(path)), key=step_of)
