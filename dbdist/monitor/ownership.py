"""What one rank holds, for the table of who owns what."""

import math
import resource
import sys
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Ownership:
    """What one rank holds and trains."""

    rank: int
    block: str  # "-": a coordinator, which has the shared modules and no block
    replica: int
    layers: str  # "0-1", "all" or "-"
    sigma: tuple[float, float] | None
    parameters: int  # without the shared ones
    shared_parameters: int
    optimizer_bytes: int
    device: str
    owns_shared: bool


def human_bytes(num_bytes: float | int) -> str:
    """1536 -> "1.5 KiB"."""
    power = min(int(math.log2(max(num_bytes, 1))) // 10, 4)
    unit = ("B", "KiB", "MiB", "GiB", "TiB")[power]
    return f"{num_bytes / 1024**power:.{1 if power else 0}f} {unit}"


def peak_memory_mb(device: torch.device) -> float:
    """Most memory so far in MiB: of tensors on a CUDA device, of the whole process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    units_per_mb = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / units_per_mb
