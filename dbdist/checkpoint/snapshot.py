"""Tensors copied into host memory in the layout of a safetensors file, and written from it.

Our own few lines instead of safetensors' `save_file`, because of what that was seen to do: up to
0.7 it holds the interpreter's lock while it writes (0.2 s for 84 MB, in which no step can run), 0.8
makes files that only their owner may read, and a full disk is no OSError there.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dbdist.errors import ConfigError

CHUNK_BYTES = 2**22
NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What safetensors calls a dtype."""


def check_dtypes(place: str, tensors: Mapping[str, Tensor]) -> None:
    """Raises ConfigError for a tensor of a dtype that no checkpoint can hold."""
    for name, tensor in tensors.items():
        if tensor.dtype not in NAMES:
            raise ConfigError(
                f"{place}: {name} is of {tensor.dtype}, which no checkpoint can hold; keep it in "
                f"one of {', '.join(str(dtype).removeprefix('torch.') for dtype in NAMES)}"
            )


class Snapshot:
    """Host memory for the tensors of one file, in the file's order.

    It is allocated once and filled for each checkpoint; page-locked if tensors lie on a GPU.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._form = _form(tensors)
        # Larger elements first, so that each tensor is aligned.
        names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
        header: dict[str, dict[str, Any]] = {}
        end = 0
        for name in names:
            tensor = tensors[name]
            begin, end = end, end + tensor.numel() * tensor.element_size()
            header[name] = {
                "dtype": NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [begin, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._header = len(text).to_bytes(8, "little") + text
        is_on_gpu = any(tensor.is_cuda for tensor in tensors.values())
        self._data = torch.empty(end, dtype=torch.uint8, pin_memory=is_on_gpu)
        self._views = {
            name: self._data[slice(*header[name]["data_offsets"])]
            .view(tensors[name].dtype)
            .view(tensors[name].shape)
            for name in names
        }

    def fits(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether it is made for tensors of these names, shapes, dtypes and places."""
        return self._form == _form(tensors)

    @torch.no_grad()
    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Copies the tensors' values.

        GPU tensors are copied asynchronously: synchronise their stream before `write`.
        """
        for name, tensor in tensors.items():
            self._views[name].copy_(tensor, non_blocking=tensor.is_cuda)

    def write(self, path: Path) -> dict[str, Any]:
        """Writes the file whole or not at all; returns its size and SHA-256.

        Other threads run meanwhile. Raises OSError.
        """
        partial = path.with_name(path.name + ".partial")
        digest = hashlib.sha256()
        try:
            # Unbuffered: a process that forks meanwhile must not inherit bytes to write.
            with partial.open("wb", buffering=0) as file:
                for chunk in self._chunks():
                    digest.update(chunk)
                    while chunk:
                        chunk = chunk[file.write(chunk) :]
                os.fsync(file.fileno())
            os.replace(partial, path)
        except OSError:
            with suppress(OSError):  # the first error is the one to tell
                partial.unlink()
            raise
        return {"bytes": len(self._header) + self._data.nbytes, "sha256": digest.hexdigest()}

    def _chunks(self) -> Iterator[memoryview]:
        yield memoryview(self._header)
        for chunk in self._data.split(CHUNK_BYTES):
            yield chunk.numpy().data


def _form(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Any, ...]]:
    return {name: (t.dtype, t.shape, t.is_cuda) for name, t in tensors.items()}
