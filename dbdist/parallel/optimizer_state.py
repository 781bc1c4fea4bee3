"""An optimizer's state by parameter name: nested (name -> kind -> tensor), or flat.

In the flat form a key is `NAME/KIND`. Names, not positions: a state is given to another optimizer
that holds the same parameters in another order, or split among ranks.
"""

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import Optimizer

from dbdist.errors import CheckpointError

State = Mapping[str, Mapping[str, Tensor]]
"""Parameter name -> kind, such as exp_avg -> tensor. Parameters never stepped are absent."""
ADAMW = ("step", "exp_avg", "exp_avg_sq")
SGD = ("momentum_buffer",)
"""Kinds: `step` is one number, all others have the parameter's shape."""


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


def check_state(
    state: State,
    shapes: Mapping[str, torch.Size],
    kinds: Collection[str],
    source: Path,
    together: Collection[str] = (),
) -> None:
    """Raises CheckpointError, naming the tensor, unless the state is one of these parameters.

    Names and kinds are known, shapes right, every value floating-point. together: parameters that
    have a state all or none.
    """
    wanted = set(kinds)
    for name, own in state.items():
        if name not in shapes:
            raise CheckpointError(
                f"{source} has a state of {name[:100]!r}, which is no parameter: "
                "it belongs to another model"
            )
        if odd := own.keys() ^ wanted:
            raise CheckpointError(
                f"{source}: the state of {name} has {sorted(own)}, the optimizer needs "
                f"{sorted(wanted)} ({min(odd)!r} differs)"
            )
        for kind, tensor in own.items():
            shape = torch.Size() if kind == "step" else shapes[name]
            if tensor.shape != shape or not tensor.is_floating_point():
                raise CheckpointError(
                    f"{source}: {kind} of {name} is {tensor.dtype} of shape {list(tensor.shape)}, "
                    f"the optimizer needs floating-point numbers of shape {list(shape)}"
                )
    missing = set(together) - state.keys()
    if missing and len(missing) < len(together):
        raise CheckpointError(f"{source} lacks the state of {min(missing)}")
