"""An optimizer's state by parameter name, nested (name -> kind -> tensor) or flat (`NAME/KIND`).

Names, not positions: a state is given to another optimizer that holds the same parameters in
another order, or split among ranks.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

State = Mapping[str, Mapping[str, Tensor]]
"""Parameter name -> kind, such as exp_avg -> tensor. Parameters never stepped are absent."""


def state_of(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> State:
    """The optimizer's own tensors."""
    return {
        name: {k: torch.as_tensor(v) for k, v in state.items() if v is not None}
        for name, parameter in parameters.items()
        if (state := optimizer.state.get(parameter))
    }


def load_state(optimizer: Optimizer, parameters: Mapping[str, Tensor], state: State) -> None:
    """The inverse of `state_of`; copies."""
    names = {id(p): name for name, p in parameters.items()}
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    by_index = {
        i: {kind: tensor.clone() for kind, tensor in state[name].items()}
        for i, name in enumerate(order)
        if name in state
    }
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": by_index, "param_groups": groups})


def flatten(state: State, prefix: str = "") -> dict[str, Tensor]:
    """For a file: `PREFIXname/kind` -> tensor."""
    return {
        f"{prefix}{name}/{kind}": tensor
        for name, own in state.items()
        for kind, tensor in own.items()
    }


def unflatten(tensors: Mapping[str, Tensor], prefix: str = "") -> State:
    """The inverse of `flatten`, of the names that begin with the prefix."""
    state: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith(prefix):
            name, _, kind = key.removeprefix(prefix).rpartition("/")
            state.setdefault(name, {})[kind] = tensor
    return state
