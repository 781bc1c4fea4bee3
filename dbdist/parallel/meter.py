"""Counts the bytes that this rank sends and receives, by kind.

Every tensor that dbdist puts on a wire passes here.
"""

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Meter:
    """Payload bytes of tensors since the start, by kind.

    Kinds: `shared` (gradients and parameters of shared modules), `replica` (gradients among the
    copies of a block), `chain` (states at inference), `metrics` (sums over ranks).
    """

    sent: Counter[str] = field(default_factory=Counter)
    received: Counter[str] = field(default_factory=Counter)

    def training_bytes(self) -> int:
        """Bytes in both directions that training itself caused."""
        return sum(
            way[kind] for way in (self.sent, self.received) for kind in ("shared", "replica")
        )
