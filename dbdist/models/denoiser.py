"""D(z), the denoiser of one block: a process around shared modules and layers.

Takes the condition, a noisy state and its noise levels; gives the head's output. Knows nothing of
tasks; the process scales states and output, outside autocast's half precision.
"""

from typing import Any, cast

from torch import Tensor, nn

from dbdist.models.base import Shared
from dbdist.processes.base import Combine, Process


class Denoiser(nn.Module):
    """Shared modules and one block, as one module. Source: EDM (2206.00364) equation 7."""

    def __init__(self, shared: nn.Module, block: nn.Module, process: Process) -> None:
        """shared: a `Shared`. block: a `Block`, or what stands for one among its replicas."""
        super().__init__()
        self.shared = shared
        self.block = block
        self.process = process

    def forward(self, condition: Any, z: Tensor, level_N: Tensor | None) -> Tensor:
        """The head's output for corrupted states z at these levels, in z's precision."""
        shared = cast(Shared, self.shared)

        def network(z_in: Tensor, level_in: Tensor | None, combine: Combine) -> Tensor:
            tokens, context = shared.embed(condition, z_in, level_in)
            return shared.output(self.block(tokens, context), combine, context)

        return self.process.denoise(network, z, level_N)
