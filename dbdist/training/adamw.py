"""AdamW for ranks that start quickly."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer


class AdamW(torch.optim.AdamW):
    """torch's AdamW without the wrappers that import `torch._dynamo`.

    They prepare for torch.compile, which no optimizer here is given, and their import takes each
    rank seconds at its first step. Step hooks are among what is left out.
    """

    add_param_group = inspect.unwrap(Optimizer.add_param_group)
    state_dict = inspect.unwrap(Optimizer.state_dict)
    load_state_dict = inspect.unwrap(Optimizer.load_state_dict)
    zero_grad = inspect.unwrap(Optimizer.zero_grad)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        return _step(self, closure)


_step = inspect.unwrap(torch.optim.AdamW.step)
