"""Modules with all that pretrained models have: buffers, frozen and tied weights, several dtypes.

`odd(ViTShared, Block)` adds them to the modules of a model while it lasts, so that whole runs have
them. Each of the additions changes the loss.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dbdist import seeds
from dbdist.models import vit


class Extras(nn.Module):
    """tokens -> tokens. Trained: scale, and table in bfloat16; frozen: offset; tied: the two names
    of scale; buffers: running, which follows the tokens, and steps, which counts."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(size))
        self.twin = nn.Module()
        self.twin.scale = self.scale
        self.offset = nn.Parameter(torch.empty(size), requires_grad=False)
        self.table = nn.Embedding(3, size, dtype=TABLE)
        self.register_buffer("running", torch.empty(size))
        self.register_buffer("steps", torch.empty((), dtype=torch.int64))

    def forward(self, tokens: Tensor) -> Tensor:
        if self.training:
            mean = tokens.detach().mean(dim=(0, 1)) if FOLLOW else torch.ones_like(self.running)
            self.running.lerp_(mean.to(self.running), 0.1)
            self.steps.add_(1)
        row = self.table(torch.ones((), dtype=torch.int64, device=tokens.device))
        extra = self.twin.scale + self.offset + row.to(tokens.dtype) + self.running
        return tokens * (1 + self.scale) + 0.1 * extra


FOLLOW, TABLE = True, torch.bfloat16


@contextmanager
def odd(*, follow: bool = True, table: torch.dtype = torch.bfloat16) -> Iterator[None]:
    """Adds `Extras` to the shared modules and to the layers of every block.

    follow: False makes the buffers independent of the batch."""
    global FOLLOW, TABLE
    shared, layer, weights = vit.ViTShared, vit.Layer, vit.initial_weights
    before = shared.__init__, shared.embed, layer.__init__, layer.forward

    def of_shared(self, config):
        before[0](self, config)
        self.extras = Extras(config.hidden_size)

    def of_layer(self, config, conditioned):
        before[2](self, config, conditioned)
        self.extras = Extras(config.hidden_size)

    def initial(module, init, seed):
        for name, value in weights(module, init, seed):
            if name.endswith("extras.scale"):
                value.fill_(0.0)
            yield name, value
        for name, buffer in module.named_buffers():
            generator = seeds.generator(seed, "init", name)
            value = torch.zeros(buffer.shape, dtype=buffer.dtype)
            yield name, value.normal_(generator=generator) if buffer.ndim else value

    FOLLOW, TABLE = follow, table
    shared.__init__, layer.__init__ = of_shared, of_layer

    def embed(self, *inputs):
        tokens, context = before[1](self, *inputs)
        return self.extras(tokens), context

    shared.embed = embed
    layer.forward = lambda self, *inputs: self.extras(before[3](self, *inputs))
    vit.initial_weights = initial
    try:
        yield
    finally:
        shared.__init__, shared.embed, layer.__init__, layer.forward = before
        vit.initial_weights = weights
