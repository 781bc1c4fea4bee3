"""An optimizer's state by parameter name goes to a file and back to another optimizer."""

import itertools

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from dbdist.parallel.optimizer_state import flatten, load_state, state_of, unflatten


def model():
    generator = torch.Generator().manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, 2))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(generator=generator)
    return module


def steps(module, optimizer, num_steps, start=0):
    """The last layer never has a gradient."""
    for step in range(start, start + num_steps):
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        module[:2](x).square().sum().backward()
        optimizer.step()


MAKERS = {
    "adamw": lambda p: torch.optim.AdamW(p, 0.05, weight_decay=0.1),
    "adamw-fused": lambda p: torch.optim.AdamW(p, 0.05, fused=True),
    "adamw-amsgrad": lambda p: torch.optim.AdamW(p, 0.05, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, 1e-4),
    "nesterov": lambda p: torch.optim.SGD(p, 1e-4, momentum=0.9, nesterov=True),
}


@pytest.mark.parametrize(("kind", "prefix"), list(itertools.product(MAKERS, ["", "shared."])))
def test_an_optimizer_goes_on_where_it_was_saved_bit_for_bit(tmp_path, kind, prefix):
    straight = model()
    optimizer = MAKERS[kind](straight.parameters())
    steps(straight, optimizer, 3)
    saved = flatten(state_of(optimizer, dict(straight.named_parameters())), prefix)
    save_file(saved, tmp_path / "o.safetensors")
    weights = {k: v.clone() for k, v in straight.state_dict().items()}
    steps(straight, optimizer, 3, start=3)

    resumed = model()
    resumed.load_state_dict(weights)
    other = MAKERS[kind](resumed.parameters())
    read = unflatten(load_file(tmp_path / "o.safetensors"), prefix)
    load_state(other, dict(resumed.named_parameters()), read)
    steps(resumed, other, 3, start=3)
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_an_optimizers_state_is_named_by_parameter_and_never_stepped_ones_have_none():
    module = model()
    optimizer = MAKERS["adamw"](module.parameters())
    parameters = dict(module.named_parameters())
    assert state_of(optimizer, parameters) == {}
    steps(module, optimizer, 1)
    names = flatten(state_of(optimizer, parameters), "shared.").keys()
    assert names == {
        f"shared.{layer}.{leaf}/{key}"
        for layer in (0, 1)
        for leaf in ("weight", "bias")
        for key in ("step", "exp_avg", "exp_avg_sq")
    }


def test_restoring_keeps_the_learning_rate_of_the_new_optimizer_and_copies_the_state():
    module = model()
    optimizer = MAKERS["adamw"](module.parameters())
    parameters = dict(module.named_parameters())
    steps(module, optimizer, 2)
    saved = {k: v.clone() for k, v in flatten(state_of(optimizer, parameters)).items()}
    other = torch.optim.AdamW(module.parameters(), 0.5, weight_decay=0.0)
    load_state(other, parameters, unflatten(saved))
    assert (other.param_groups[0]["lr"], other.param_groups[0]["weight_decay"]) == (0.5, 0.0)
    before = {k: v.clone() for k, v in saved.items()}
    steps(module, other, 1)
    assert all(torch.equal(saved[k], before[k]) for k in saved)


def test_a_parameter_whose_name_begins_like_anothers_keeps_its_own_state():
    parameters = {"a": nn.Parameter(torch.zeros(2)), "a.b": nn.Parameter(torch.zeros(3))}
    optimizer = torch.optim.SGD(parameters.values(), 0.1, momentum=0.9)
    for value, parameter in enumerate(parameters.values()):
        parameter.grad = torch.full_like(parameter, value + 1.0)
    optimizer.step()
    saved = flatten(state_of(optimizer, parameters))
    other = torch.optim.SGD(parameters.values(), 0.1, momentum=0.9)
    load_state(other, parameters, unflatten(saved))
    for value, parameter in enumerate(parameters.values()):
        assert (other.state[parameter]["momentum_buffer"] == value + 1.0).all()
