"""Exponential moving average of weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class Ema:
    """average <- decay * average + (1 - decay) * weights after each step.

    It starts at the initial weights. Averages of short floats are kept in float32, in which small
    changes count.
    """

    def __init__(self, decay: float, parameters: Mapping[str, Tensor]) -> None:
        """parameters: sharing the memory of the weights."""
        self.decay = decay
        self._parameters = {name: p.detach() for name, p in parameters.items()}
        self.averages: dict[str, Tensor] = {
            name: p.to(torch.promote_types(p.dtype, torch.float32), copy=True)
            for name, p in self._parameters.items()
        }

    @torch.no_grad()
    def update(self) -> None:
        weights = [p.to(self.averages[name].dtype) for name, p in self._parameters.items()]
        if not weights:
            return
        torch._foreach_lerp_(list(self.averages.values()), weights, 1 - self.decay)

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
