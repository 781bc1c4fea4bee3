"""What each engine splits among the copies of a block, for engines and `dbdist plan`."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Split:
    """What lies on a rank as its shard alone. What is not split, every copy holds whole."""

    weights: bool = False
    gradients: bool = False
    optimizer: bool = False
    master: bool = False
    """Whether the optimizer steps a copy of the weights, of which each rank has its shard."""

    def values(self, num_weights: int, num_copies: int, num_averages: int) -> float:
        """Numbers that a rank holds of a block of so many weights, with AdamW's two moments.

        num_averages: 1 with averaged weights, else 0.
        """
        return num_weights * (
            (1 + num_averages) / (num_copies if self.weights else 1)
            + 1 / (num_copies if self.gradients else 1)
            + (2 + self.master) / (num_copies if self.optimizer else 1)
        )

    def wire_values(self, num_weights: int, num_trained: int) -> int:
        """Numbers that a pass over a batch moves: a ring passes on (R - 1) / R of them.

        Whole copies reduce-scatter and all-gather gradients, or stepped weights; split weights are
        gathered in forward and backward, and their gradients reduce-scattered.
        """
        return 2 * num_weights + num_trained if self.weights else 2 * num_trained


DDP = Split()
FSDP = Split(weights=True, gradients=True, optimizer=True)
ZERO = {
    1: Split(optimizer=True, master=True),
    2: Split(gradients=True, optimizer=True, master=True),
    3: Split(weights=True, gradients=True, optimizer=True),
}
"""By stage."""
