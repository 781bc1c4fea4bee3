"""Exponential moving average of weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class Ema:
    """average <- decay * average + (1 - decay) * weights after each step.

    It starts at the initial weights, which a ramp makes it forget: early on the half-life is a
    fraction of the steps so far. Averages of short floats are kept in float32, in which small
    changes count. Source of the ramp: EDM (2206.00364), its training code.
    """

    def __init__(self, decay: float, parameters: Mapping[str, Tensor], rampup: float = 0.0) -> None:
        """parameters: sharing the memory of the weights. rampup: that fraction; 0: no ramp."""
        self.decay, self.rampup = decay, rampup
        self._parameters = {name: p.detach() for name, p in parameters.items()}
        self.averages: dict[str, Tensor] = {
            name: p.to(torch.promote_types(p.dtype, torch.float32), copy=True)
            for name, p in self._parameters.items()
        }

    def decay_at(self, step: int) -> float:
        """The decay of this step, from 1."""
        if self.rampup == 0:
            return self.decay
        return min(self.decay, 0.5 ** (1 / (self.rampup * step)))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights after this step, from 1."""
        weights = [p.to(self.averages[name].dtype) for name, p in self._parameters.items()]
        if not weights:
            return
        torch._foreach_lerp_(list(self.averages.values()), weights, 1 - self.decay_at(step))

    @torch.no_grad()
    def load(self, averages: Mapping[str, Tensor]) -> None:
        """Replaces averages by name."""
        for name, tensor in averages.items():
            self.averages[name].copy_(tensor)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The averages in place of the weights."""
        kept = self._show()
        try:
            yield
        finally:
            self._show(kept)

    @torch.no_grad()
    def _show(self, kept: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Exchanges averages for weights, or back.

        Returns the averages that the weights cannot hold, for the way back.
        """
        longer: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            weights, average = parameter.clone(), self.averages[name]
            parameter.copy_(average)
            if kept is None and average.dtype != weights.dtype:
                longer[name] = average.clone()
            average.copy_((kept or {}).get(name, weights))
        return longer
