"""Which code this is: its version, its commit and a digest of its sources."""

import hashlib
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

__version__ = "0.1.0"


def versions() -> dict[str, Any]:
    """For manifests: versions of dbdist and torch, and the commit."""
    import torch  # late: `dbdist --version` does without

    return {"dbdist": __version__, "torch": torch.__version__, "commit": commit()}


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


def digest_of_code() -> str:
    """SHA-256 of the package's source files."""
    root, digest = Path(__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()
