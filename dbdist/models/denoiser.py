"""D(z), the denoiser of one block: EDM preconditioning around the shared modules and that block's
layers.

Takes the condition, a noisy state and its noise levels; gives the head's output. Knows nothing of
tasks or processes. Coefficients are computed in the state's precision, outside autocast's half
precision.
"""

from jaxtyping import Float
from torch import Tensor, nn

from dbdist.models.vit import ViTShared
from dbdist.processes.gaussian import NoiseSchedule


class Denoiser(nn.Module):
    """Shared modules and one block, as one module. Source: EDM (2206.00364) equation 7, with the
    head's output in place of D, because the task turns logits into a denoised state."""

    def __init__(self, shared: ViTShared, block: nn.Module, schedule: NoiseSchedule) -> None:
        """block: a `Block`, or what stands for one among its replicas."""
        super().__init__()
        self.shared = shared
        self.block = block
        self.schedule = schedule

    def forward(
        self,
        condition: Float[Tensor, "n ..."],
        z: Float[Tensor, "n ..."],
        sigma_N: Float[Tensor, " n"],
    ) -> Float[Tensor, "n ..."]:
        """The head's output for noisy states z at levels sigma_N, in z's precision."""
        coefficients = self.schedule.preconditioning(sigma_N.to(z.dtype))
        c_skip, c_out, c_in = (_like(c, z) for c in coefficients[:3])
        level = self.shared.embed_noise(coefficients.c_noise)
        tokens = self.block(self.shared.embed(condition, c_in * z), level)
        state = c_skip * z + c_out * self.shared.read(tokens).to(z.dtype)
        return self.shared.logits(state, level).to(z.dtype)


def noised(
    z0: Float[Tensor, "n ..."], sigma_N: Float[Tensor, " n"], noise: Float[Tensor, "n ..."]
) -> Float[Tensor, "n ..."]:
    """z = z0 + sigma * noise."""
    return z0 + _like(sigma_N.to(z0.dtype), z0) * noise


def _like(coefficient_N: Tensor, z: Tensor) -> Tensor:
    """The coefficient of each sample, shaped to multiply a state of any trailing shape."""
    return coefficient_N.reshape(-1, *[1] * (z.ndim - 1))
