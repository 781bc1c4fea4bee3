"""A module's parameters and buffers by name: what is made, filled, stored and sent of it.

A tensor with several names (tied weights) counts once, under its first name. Every buffer counts,
also one that torch calls non-persistent: a module that was built without memory has no values but
those it is given.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from dbdist.errors import ConfigError

Named = Iterable[tuple[str, Tensor]]


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer, once; they share the module's memory."""
    return {n: t.detach() for n, t in (*module.named_parameters(), *module.named_buffers())}


def buffers_of(module: nn.Module) -> dict[str, Tensor]:
    """Every buffer, once; they share the module's memory."""
    return dict(module.named_buffers())


def trained_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter that training moves, once: those that are not frozen."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def form_of(module: nn.Module) -> dict[str, Tensor]:
    """Shape and dtype of every parameter and buffer, as tensors without memory."""
    return {n: torch.empty_like(t, device="meta") for n, t in named_tensors(module).items()}


def ties_of(module: nn.Module) -> dict[str, str]:
    """Other name -> first name, of every tensor that has several."""
    first: dict[int, str] = {}
    parameters = module.named_parameters(remove_duplicate=False)
    buffers = module.named_buffers(remove_duplicate=False)
    return {
        name: first[id(tensor)]
        for name, tensor in (*parameters, *buffers)
        if first.setdefault(id(tensor), name) != name
    }


def tie(module: nn.Module, ties: Mapping[str, str]) -> None:
    """Makes names one tensor again. ties: of `ties_of`, from before memory was allocated."""
    for other, name in ties.items():
        owner, _, leaf = name.rpartition(".")
        tensor = getattr(module.get_submodule(owner), leaf)
        owner, _, leaf = other.rpartition(".")
        setattr(module.get_submodule(owner), leaf, tensor)


@torch.no_grad()
def fill_all(module: nn.Module, values: Named) -> None:
    """Copies values into a module by name.

    Raises ConfigError unless every tensor gets one, of its own shape.
    """
    own = named_tensors(module)
    for name, value in complete(values, own):
        if value.shape != own[name].shape:
            raise ConfigError(
                f"the model's weights give {name} the shape {tuple(value.shape)}, the module has "
                f"{tuple(own[name].shape)}"
            )
        own[name].copy_(value)


def complete(values: Named, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    """The values as they come. Raises ConfigError for a name that is unknown or got no value."""
    missing = dict.fromkeys(names)
    for name, value in values:
        if name not in missing:
            raise ConfigError(
                f"the model's weights give a value for {name}, which the module lacks or has got"
            )
        del missing[name]
        yield name, value
    if missing:
        raise ConfigError(
            f"the model's weights give no value for {', '.join(sorted(missing))}; every parameter "
            "and buffer needs one"
        )
