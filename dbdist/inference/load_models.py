"""Models from checkpoints: one block at a time, or all as tensors of an exported model."""

from typing import Any

import torch
from torch import Tensor

from dbdist.build import Setup
from dbdist.checkpoint.manifest import Checkpoint
from dbdist.checkpoint.names import SHARED, block_file, ema_file, split_private
from dbdist.checkpoint.weights import fill, in_precision_of
from dbdist.config.config import Config
from dbdist.data.sources import dataset_spec, stored_spec
from dbdist.models.denoiser import Denoiser


def load_block(setup: Setup, checkpoint: Checkpoint, block: int, device: torch.device) -> Denoiser:
    """One block with its shared modules, averaged weights if the run kept any.

    Nothing else is read.
    """
    layers, shared, source = _weights(checkpoint, block)
    modules, module = setup.shared(None, device), setup.block(block, None, device)
    model = setup.denoiser(in_precision_of(shared, modules), in_precision_of(layers, module))
    fill(module, layers, checkpoint.path / block_file(block))
    fill(modules, shared, checkpoint.path / source)
    return model.eval()


def spec_of_checkpoint(config: Config, checkpoint: Checkpoint) -> Any:
    """What a model must know of the data it was trained on.

    Of the checkpoint; of the data set's files where an older version has not written it.
    """
    stored = checkpoint.manifest.get("data", {})
    if "spec" in stored:
        return stored_spec(stored["spec"], config.data)
    return dataset_spec(config.data)


def files_of_block(config: Config, checkpoint: Checkpoint, block: int) -> list[str]:
    """The files that `load_block` reads."""
    files = [block_file(block), *([] if config.has_copies else [SHARED])]
    return [_averaged(checkpoint, file) for file in files]


def export_weights(config: Config, checkpoint: Checkpoint) -> tuple[dict[str, Tensor], bool]:
    """(tensors of the exported model, whether blocks keep shared modules of their own)."""
    weights: dict[str, Tensor] = {}
    shared_of_block: list[dict[str, Tensor]] = []
    for block in range(config.num_blocks):
        layers, shared, _ = _weights(checkpoint, block)
        weights |= layers
        shared_of_block.append(shared)
    first = shared_of_block[0]
    is_private = any(
        not torch.equal(first[k], other[k]) for other in shared_of_block for k in first
    )
    for block, shared in enumerate(shared_of_block if is_private else [first]):
        prefix = f"block-{block}.shared." if is_private else "shared."
        weights |= {f"{prefix}{name}": tensor for name, tensor in shared.items()}
    return weights, is_private


def _weights(
    checkpoint: Checkpoint, block: int
) -> tuple[dict[str, Tensor], dict[str, Tensor], str]:
    """(the block's tensors, its shared modules', the file these come from)."""
    file = _averaged(checkpoint, block_file(block))
    tensors = checkpoint.tensors(file)
    layers, private = split_private(tensors)
    if private:
        return layers, private, file
    shared_file = _averaged(checkpoint, SHARED)
    return layers, checkpoint.tensors(shared_file), shared_file


def _averaged(checkpoint: Checkpoint, file: str) -> str:
    return ema_file(file) if checkpoint.has(ema_file(file)) else file
