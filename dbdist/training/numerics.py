"""When numbers go wrong: what is kept of a step that is not finite, and losses that jump.

Does not communicate.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pstdev

import torch
from torch import Tensor

from dbdist.checkpoint.names import step_folder
from dbdist.whole_files import write_json

WINDOW = 100
"""Steps that a loss is compared with."""
WARM_UP = 30
SIGMAS = 6.0


@dataclass(frozen=True)
class BadStep:
    """A step of one block, on one rank, whose loss or gradient is not finite."""

    step: int
    """From 1."""
    block: int
    rank: int
    replica: int
    loss: float
    grad_norm: float
    """Over the block and its shared modules, averaged over its replicas."""
    indices: Sequence[int]
    """Of this rank's samples in the training set."""
    per_sample: Mapping[str, Tensor]
    """What is known of each sample (n,): what the task records, by its names, and its level."""
    grad_norms: Mapping[str, float]
    """By parameter, of what lies on this rank."""
    lr: float

    def __str__(self) -> str:
        return f"loss {self.loss:g}, gradient norm {self.grad_norm:g}"

    def write(self, run_dir: Path) -> Path:
        """RUN/nonfinite/step-…-block-B-rank-R.json. Raises OSError."""
        folder = run_dir / "nonfinite"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{step_folder(self.step)}-block-{self.block}-rank-{self.rank}.json"
        content = {
            "step": self.step,
            "block": self.block,
            "rank": self.rank,
            "replica": self.replica,
            "lr": self.lr,
            "loss": _plain(self.loss),
            "grad_norm": _plain(self.grad_norm),
            "batch_indices": list(self.indices),
            **{name: [*map(_plain, values.tolist())] for name, values in self.per_sample.items()},
            "grad_norms": {name: _plain(v) for name, v in self.grad_norms.items()},
        }
        write_json(path, content, indent=1)
        return path


def _plain(value: float) -> float | str:
    """JSON has no nan and no inf: they become strings."""
    return value if math.isfinite(value) else str(value)


def norms_of(gradients: Mapping[str, Tensor]) -> dict[str, float]:
    """Euclidean norm of each."""
    return {name: torch.linalg.vector_norm(g).item() for name, g in gradients.items()}


class LossSpikes:
    """Flags a loss that is far above those of the last steps."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=WINDOW)

    def add(self, loss: float) -> str | None:
        """Returns what is odd about this loss; None before there are 30.

        Odd is more than six standard deviations above the mean of the last 100 steps, and twice as
        high.
        """
        told = None
        if len(self._recent) >= WARM_UP:
            mean, deviation = fmean(self._recent), pstdev(self._recent)
            if loss > mean + SIGMAS * deviation and loss > 2 * mean:
                told = f"loss {loss:.4g}, after {mean:.4g} on average in {len(self._recent)} steps"
        self._recent.append(loss)
        return told
