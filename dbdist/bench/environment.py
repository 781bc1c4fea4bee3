"""Says on what a measurement was made: machine, driver, torch, code and command."""

import platform
import shlex
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import torch

from dbdist.version import commit, digest_of_code


def environment(device: str, command: Sequence[str]) -> dict[str, Any]:
    """Facts for the JSON of a measurement. device: as the configuration says."""
    is_on_gpu = device != "cpu" and torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if is_on_gpu else platform.machine(),
        "num_devices": torch.cuda.device_count() if is_on_gpu else 0,
        "driver": driver() if is_on_gpu else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "code": digest_of_code()[:12],
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": shlex.join(command),
    }


def driver() -> str | None:
    """The version of the GPU's driver, where it can be asked for."""
    words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(words, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return told.stdout.splitlines()[0].strip() if told.stdout.strip() else None
