"""AdamW without the wrappers of torch.compile."""

import subprocess
import sys

import torch
from torch import nn

from dbdist.training.adamw import AdamW


def trained(kind, stops=()):
    """Weights and state after five steps; after those in `stops` another optimizer continues."""
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    optimizer = kind(layer.parameters(), lr=0.1, weight_decay=0.1, fused=True)
    for step in range(5):
        optimizer.zero_grad()
        layer(torch.full((1, 3), float(step))).square().sum().backward()
        optimizer.step()
        if step in stops:
            state, optimizer = optimizer.state_dict(), kind(layer.parameters(), fused=True)
            optimizer.load_state_dict(state)
    return [*layer.parameters(), *(s["exp_avg_sq"] for s in optimizer.state.values())]


def test_it_steps_as_torchs_also_after_its_state_was_loaded():
    expected = trained(torch.optim.AdamW)
    for found in (trained(AdamW), trained(AdamW, stops=(1, 3))):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_closure_is_called_with_gradients():
    parameter = nn.Parameter(torch.ones(2))
    optimizer = AdamW([parameter])

    def closure():
        loss = parameter.sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 2
    assert parameter.grad is not None
    assert (parameter < 1).all()


def test_steps_of_a_module_from_the_meta_device_import_neither_dynamo_nor_sympy():
    code = """
import sys, torch
from dbdist.models.empty import to_empty
from dbdist.training.adamw import AdamW
with torch.device("meta"):
    layer = torch.nn.Linear(3, 2)
to_empty(layer, torch.device("cpu"))
optimizer = AdamW(layer.parameters(), fused=True)
layer(torch.ones(1, 3)).sum().backward()
optimizer.step()
optimizer.zero_grad()
optimizer.load_state_dict(optimizer.state_dict())
print({"torch._dynamo", "sympy"} & set(sys.modules))
"""
    command = [sys.executable, "-c", code]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed == "set()\n"
