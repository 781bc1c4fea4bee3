"""Reads weights files as other programs write them, without their wrappers and prefixes.

Lightning, DDP, torch.compile, timm and plain torch.save put the same tensors under other names.
Nothing in a file is executed: a class that torch does not know is replaced by an empty one.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from dbdist.checkpoint.weights import load_weights
from dbdist.errors import CheckpointError

WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
"""Keys under which a file holds the model beside its optimizer; the first one counts."""
_INSERTED = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
_DANGEROUS = re.compile(
    r"(builtins\.(getattr|setattr|delattr|eval|exec|compile|open|input|breakpoint|__import__)"
    r"|(os|posix|nt|sys|subprocess|shutil|socket|runpy|importlib|ctypes|webbrowser)\..*)"
)


@dataclass(frozen=True)
class ForeignWeights:
    """The tensors of one model in a file."""

    tensors: dict[str, Tensor]
    """By the model's own names, without wrappers and prefixes."""
    beside: Any
    """What the file says of the model, e.g. Lightning's hyper_parameters."""
    ignored: tuple[str, ...] = ()
    """Names of other tensors in the file: averaged copies, metrics, losses."""


class Absent:
    """Stands for an object of a class that is not loaded."""

    def __init__(self, *_: object, **__: object) -> None:
        self.values: Any = None

    def __new__(cls, *_: object, **__: object) -> "Absent":
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        self.values = state


def read_weights(path: Path, anchor: str) -> ForeignWeights:
    """Reads a safetensors file or one of torch.save, whatever its name.

    anchor: the name of a tensor that every model of this kind has; it tells the prefix. Raises
    CheckpointError for a file that is missing, damaged or of another kind.
    """
    try:
        with path.open("rb") as file:
            start = file.read(2)
    except OSError as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"({error.strerror})"
        raise CheckpointError(f"{path} {reason}") from None
    if start[:1] != b"\x80" and start != b"PK":
        tensors = load_weights(path)
        with safe_open(path, "pt") as file:
            beside = file.metadata() or {}
        return unwrapped(path, tensors, anchor, beside)
    content = _unpacked(path)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds {type(content).__name__}, not a state dict")
    state: Any = content
    others: list[str] = []
    while (name := next((n for n in WRAPPERS if _holds(state, n)), None)) is not None:
        others += [f"{k}.*" for k in state if k != name and _has_tensors(state[k])]
        state = state[name]
    found = unwrapped(path, state, anchor, content.get("hyper_parameters"))
    return replace(found, ignored=(*found.ignored, *others))


def unwrapped(
    path: Path, state: Mapping[Any, Any], anchor: str, beside: Any = None
) -> ForeignWeights:
    """The tensors of the model that has the anchor, by its own names."""
    tensors = {
        _INSERTED.sub("", name): tensor
        for name, tensor in state.items()
        if isinstance(name, str) and isinstance(tensor, Tensor)
    }
    prefixes = [name[: -len(anchor)] for name in tensors if name.endswith(anchor)]
    prefixes = [p for p in prefixes if not p or p.endswith(".")]
    if not prefixes:
        found = ", ".join(sorted(map(str, state))[:3]) or "nothing"
        raise CheckpointError(
            f"{path} is not a published ViT: {anchor!r} is missing, under any prefix (it has "
            f"{found}, …)"
        )
    prefix = min(prefixes, key=lambda p: ("ema" in p or "average" in p, len(p)))
    others = tuple(p for p in prefixes if p != prefix and p.startswith(prefix))
    own = {
        name: tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix) and not name.startswith(others)
    }
    ignored = tuple(name for name in tensors if name not in own)
    return ForeignWeights({n[len(prefix) :]: t for n, t in own.items()}, beside, ignored)


def _holds(state: Any, name: str) -> bool:
    """Whether a mapping is a wrapper around another one of this name."""
    return isinstance(state, Mapping) and isinstance(state.get(name), Mapping)


def _has_tensors(value: Any) -> bool:
    """Whether it is a state dict too, e.g. of averaged weights."""
    return isinstance(value, Mapping) and any(isinstance(v, Tensor) for v in value.values())


def _unpacked(path: Path) -> Any:
    """The content of a file of torch.save, with `Absent` for objects of unknown classes."""
    try:
        with path.open("rb") as file, _absent_classes(path):  # torch.load trusts a path's suffix
            return torch.load(file, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # torch.load raises many types for a damaged or unsafe pickle
        found = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it needs {found[1]}" if found else _first_sentence(error)
        raise CheckpointError(
            f"{path} cannot be read as plain tensors ({reason}); nothing in it was executed, save "
            "its state_dict as safetensors instead"
        ) from None


@contextmanager
def _absent_classes(path: Path) -> Iterator[None]:
    """torch.load makes an `Absent` of every class that it does not know."""
    try:
        with path.open("rb") as file:
            names = get_unsafe_globals_in_checkpoint(file)
    except ValueError:  # the format of before 2020
        names = []
    if dangerous := [name for name in names if _DANGEROUS.fullmatch(name)]:
        raise CheckpointError(
            f"{path} cannot be read as plain tensors (it calls {dangerous[0]}); nothing in it was "
            "executed, do not trust it"
        )
    with safe_globals([(Absent, name) for name in names]):
        yield


def _first_sentence(error: Exception) -> str:
    """What an error says first, without the colours of a terminal."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    return re.split(r"(?<=[.!])\s|\n", text)[0][:160] or type(error).__name__
