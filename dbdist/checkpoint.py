"""RUN/checkpoints: one folder a step, one safetensors file a block, the manifest last.

Files are named by block, never by rank, and tensors by parameter, so any topology may read what any
other wrote. Every rank writes its own files and tells the coordinator (through the mailbox: nobody
waits), which writes the manifest, with sizes and SHA-256, when all have arrived. A folder without a
manifest is no checkpoint. Nothing that is read can execute code.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import dbdist
from dbdist.errors import CheckpointError
from dbdist.inference import load_weights
from dbdist.parallel.mailbox import Mailbox
from dbdist.parallel.topology import Topology

FORMAT = "dbdist-checkpoint"
VERSION = 1
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
                f"{path} is not part of this checkpoint (manifest.json does not list it)"
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
                "content; "
                "remove this checkpoint's folder to fall back on an older one"
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


def differences(old: Any, new: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, old value, new value) of everything in `new` that `old` has otherwise."""
    if isinstance(old, dict) and isinstance(new, Mapping):
        for name, value in new.items():
            yield from differences(old.get(name), value, f"{key}.{name}" if key else name)
    elif old != new:
        yield key, old, new


def find_checkpoint(run_dir: Path, step: int | None = None) -> Checkpoint | None:
    """The complete checkpoint of this step, or the newest; None where there is none."""
    folder = run_dir / "checkpoints"
    found = {int(m[1]): p for p in _folders(folder) if (m := FOLDER.fullmatch(p.name))}
    complete = [s for s, path in found.items() if (path / "manifest.json").is_file()]
    if step is not None and step not in complete:
        raise CheckpointError(
            f"{folder} has no checkpoint of step {step}; it has {sorted(complete) or 'none'}"
        )
    if not complete:
        return None
    path = found[step if step is not None else max(complete)]
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        readable = manifest["format"] == FORMAT and manifest["version"] == VERSION
        readable = (
            readable
            and manifest["step"] == (step if step is not None else max(complete))
            and isinstance(manifest["model"], dict)
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
            f"{path}/manifest.json is damaged, of another step or not {FORMAT} version {VERSION}; "
            "remove this folder to fall back on an older checkpoint"
        )
    return Checkpoint(path, manifest)


class CheckpointWriter:
    """Writes this rank's part of each checkpoint; on the coordinator also completes and retires
    them."""

    def __init__(
        self, run_dir: Path, topology: Topology, writers: set[int], keep_last: int
    ) -> None:
        """writers: the ranks that write files, known to all."""
        self.folder = run_dir / "checkpoints"
        self.keep_last = keep_last
        self._topology = topology
        self._writers = writers
        self._mailbox = Mailbox(topology, "checkpoints")
        self._arrived: dict[int, dict[int, dict[str, Any]]] = {}
        self._about: dict[int, dict[str, Any]] = {}

    def clean(self) -> None:
        """Removes what an interrupted run left incomplete. On the coordinator, before anybody
        writes."""
        for path in _folders(self.folder):
            if not (path / "manifest.json").is_file():
                shutil.rmtree(path)

    def save(self, step: int, files: Files, about: dict[str, Any]) -> None:
        """Writes this rank's files of a step. about: the rest of the manifest, used on the
        coordinator."""
        path = self.folder / f"step-{step:08d}"
        entries = {}
        try:
            path.mkdir(parents=True, exist_ok=True)
            for name, tensors in files.items():
                entries[name] = _write(path / name, tensors)
        except OSError as error:
            raise CheckpointError(
                f"{path} cannot be written ({error.strerror}); earlier checkpoints are untouched"
            ) from None
        if self._topology.is_coordinator:
            self._about[step] = about
        if self._topology.rank in self._writers:
            self._mailbox.post({"step": step, "files": entries})
        self.poll()

    def poll(self) -> None:
        """On the coordinator: completes every checkpoint whose parts have all arrived."""
        if not self._about:
            return
        for rank, message in self._mailbox.collect():
            self._arrived.setdefault(message["step"], {})[rank] = message["files"]
        for step in sorted(self._arrived):
            if self._arrived[step].keys() >= self._writers and step in self._about:
                self._complete(step, self._arrived.pop(step), self._about.pop(step))

    def finish(self, timeout_s: float) -> None:
        """On the coordinator: waits for the parts that are still being written."""
        deadline = time.monotonic() + timeout_s
        while self._topology.is_coordinator and self._about:
            self.poll()
            if time.monotonic() > deadline:
                step = min(self._about)
                missing = sorted(self._writers - self._arrived.get(step, {}).keys())
                raise CheckpointError(
                    f"checkpoint of step {step}: rank {missing[0]} did not write its part"
                )
            time.sleep(0.01)

    def _complete(self, step: int, parts: dict[int, dict[str, Any]], about: dict[str, Any]) -> None:
        path = self.folder / f"step-{step:08d}"
        files = {name: entry for rank in sorted(parts) for name, entry in parts[rank].items()}
        for name, entry in files.items():
            if not (path / name).is_file() or (path / name).stat().st_size != entry["bytes"]:
                raise CheckpointError(
                    f"{path / name} was written by another rank but is not here; "
                    "run_dir must be one folder that all nodes share"
                )
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "step": step,
            **about,
            "dbdist": dbdist.__version__,
            "torch": torch.__version__,
            "commit": commit(),
            "files": dict(sorted(files.items())),
        }
        partial = path / "manifest.json.partial"
        with partial.open("w") as out:
            json.dump(manifest, out, indent=2)
            out.flush()
            os.fsync(out.fileno())
        os.replace(partial, path / "manifest.json")
        complete = [p for p in _folders(self.folder) if (p / "manifest.json").is_file()]
        complete.sort(key=lambda p: int(p.name.removeprefix("step-")))
        for old in complete[: -self.keep_last]:
            (old / "manifest.json").unlink()  # from here on it is no checkpoint
            shutil.rmtree(old)


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor], prefix: str = ""
) -> dict[str, Tensor]:
    """An optimizer's state by parameter name: `NAME/exp_avg`, …. Parameters never stepped have
    none."""
    state = optimizer.state
    return {
        f"{prefix}{name}/{key}": torch.as_tensor(value)
        for name, parameter in parameters.items()
        for key, value in state.get(parameter, {}).items()
        if value is not None
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    prefix: str = "",
) -> None:
    """The inverse of `optimizer_tensors`."""
    order = [p for group in optimizer.param_groups for p in group["params"]]
    names = {id(p): name for name, p in parameters.items()}
    state: dict[int, dict[str, Tensor]] = {}
    for index, parameter in enumerate(order):
        start = f"{prefix}{names[id(parameter)]}/"
        own = {k.removeprefix(start): t.clone() for k, t in tensors.items() if k.startswith(start)}
        if own:
            state[index] = own
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


@cache
def commit() -> str | None:
    """The commit of the source tree this package runs from, if it is one."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        told = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return told.stdout.strip() or None


def _write(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Writes under another name first; returns the manifest's entry."""
    partial = path.with_name(path.name + ".partial")
    save_file({k: t.detach().cpu().contiguous().clone() for k, t in tensors.items()}, partial)
    with partial.open("rb") as written:
        os.fsync(written.fileno())
    os.replace(partial, path)
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _folders(folder: Path) -> list[Path]:
    try:
        return [p for p in folder.iterdir() if p.is_dir() and FOLDER.fullmatch(p.name)]
    except (FileNotFoundError, NotADirectoryError):
        return []
