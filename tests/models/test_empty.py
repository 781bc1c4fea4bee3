"""Memory for modules that were built on the meta device."""

import torch
from torch import nn

from dbdist.models.empty import to_empty


class Odd(nn.Module):
    """Two tied weights, a frozen one, a buffer, another that is not saved, two dtypes."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.table.weight
        self.again = self.table.weight
        self.frozen = nn.Parameter(torch.empty(2, dtype=torch.bfloat16), requires_grad=False)
        self.register_buffer("mean", torch.empty(3, 4).T)
        self.register_buffer("cache", torch.empty(2, dtype=torch.int64), persistent=False)


def test_ties_buffers_dtypes_strides_and_frozen_parameters_stay_as_they_were():
    with torch.device("meta"):
        found, meta = Odd(), Odd()
    to_empty(found, torch.device("cpu"))
    assert found.head.weight is found.table.weight is found.again
    names = [*dict(meta.named_parameters()), *dict(meta.named_buffers())]
    assert names == [*dict(found.named_parameters()), *dict(found.named_buffers())]
    assert set(found.state_dict()) == set(meta.state_dict())
    for name in names:
        a, b = (getattr(m, name.split(".")[0]) if "." not in name else m.get_parameter(name)
                for m in (found, meta))  # fmt: skip
        assert a.device.type == "cpu"
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
        assert (type(a), a.requires_grad) == (type(b), b.requires_grad)
