"""Exponential moving average of weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class Ema:
    """average <- decay * average + (1 - decay) * weights after each step; starts at the initial
    weights."""

    def __init__(self, decay: float, parameters: Mapping[str, Tensor]) -> None:
        """parameters: sharing the memory of the weights."""
        self.decay = decay
        self._parameters = dict(parameters)
        self.averages: dict[str, Tensor] = {n: p.detach().clone() for n, p in parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        parameters: list[Tensor] = list(self._parameters.values())
        torch._foreach_lerp_(list(self.averages.values()), parameters, 1 - self.decay)

    @torch.no_grad()
    def load(self, averages: Mapping[str, Tensor]) -> None:
        """Replaces averages by name."""
        for name, tensor in averages.items():
            self.averages[name].copy_(tensor)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The averages in place of the weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self._parameters.items():
            weights = parameter.detach().clone()
            parameter.copy_(self.averages[name])
            self.averages[name].copy_(weights)
