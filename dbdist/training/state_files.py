"""How what a rank trains becomes the files of a checkpoint, and comes back.

Files hold whole tensors by block and parameter name, so any topology reads what any other wrote.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from dbdist.checkpoint.manifest import Checkpoint
from dbdist.checkpoint.names import (
    PREFIX,
    SHARED,
    Files,
    block_file,
    ema_file,
    optimizer_file,
    split_private,
)
from dbdist.checkpoint.weights import check_weights, fill
from dbdist.config.config import Config
from dbdist.errors import CheckpointError
from dbdist.parallel.optimizer_state import (
    ADAMW,
    SGD,
    State,
    check_state,
    flatten,
    load_state,
    state_of,
    unflatten,
)
from dbdist.parallel.shared_sync import Averaged, Sharded, has_outer_step
from dbdist.parallel.topology import Topology
from dbdist.tensors import form_of, named_tensors
from dbdist.training.rank_state import OwnedBlock, RankState, prefixed


def files_of(state: RankState) -> Files:
    """Returns what this rank writes. Collective, where something is split among ranks.

    That is its blocks if it is their first replica (with its copy of the shared modules if that is
    private), and on the coordinator the shared modules of all.
    """
    state.settle()
    files: dict[str, dict[str, Tensor]] = {}
    for owned in state.blocks:
        files.update(_block_files(state, owned))
    if not state.topology.is_leader:
        files = {}
    sync, shared = state.sync, state.shared_tensors.parameters
    shared_optimizer = optimizer_file(SHARED)
    if isinstance(sync, Sharded):  # collective
        files[shared_optimizer] = flatten(sync.optimizer_state())
    if not state.topology.is_coordinator:
        files.pop(shared_optimizer, None)
        return files
    if isinstance(sync, Averaged):
        files[SHARED] = named_tensors(state.shared) | sync.anchor
        if sync.outer is not None:
            files[shared_optimizer] = flatten(state_of(sync.outer, sync.anchor))
    elif not state.config.has_copies:
        files[SHARED] = named_tensors(state.shared)
        if not isinstance(sync, Sharded):
            files[shared_optimizer] = flatten(_shared_state(state))
        if state.ema:
            files[ema_file(SHARED)] = named_tensors(state.shared) | {
                name: state.ema.averages[PREFIX + name] for name in shared
            }
    return files


def _block_files(state: RankState, owned: OwnedBlock) -> dict[str, dict[str, Tensor]]:
    name, engine = block_file(owned.index), owned.engine
    weights, moments = engine.weights(), flatten(engine.optimizer_state())
    averages: dict[str, Tensor] = {}
    if state.ema:  # what is not trained has none but its value
        averages = weights | {
            k: engine.whole(p, state.ema.averages[k]) for k, p in owned.trained.items()
        }
    if state.config.has_copies:
        shared = prefixed(named_tensors(state.shared))
        weights |= shared
        moments |= flatten(_shared_state(state), PREFIX)
        if state.ema:
            of_shared = prefixed(state.shared_tensors.parameters)
            averages |= shared | {k: state.ema.averages[k] for k in of_shared}
    files = {name: weights, optimizer_file(name): moments}
    if state.ema:
        files[ema_file(name)] = averages
    return files


def _shared_state(state: RankState) -> State:
    """Of this rank's own optimizer of the shared modules; empty where nothing is trained."""
    optimizer = state.sync.optimizer
    return {} if optimizer is None else state_of(optimizer, state.shared_tensors.parameters)


def restore(state: RankState, checkpoint: Checkpoint) -> None:
    """The inverse of `files_of`, whichever topology wrote the files. Collective.

    Everything that this rank needs is read and checked, on all ranks, before the first weight
    changes. Raises CheckpointError.
    """
    topology, indices = state.topology, [owned.index for owned in state.blocks]
    with topology.agree("reading the checkpoint"):
        checkpoint.check_fits(state.setup.describe())
        has_common = checkpoint.has(SHARED)
        needed = files_to_restore(state.config, topology, indices, has_common=has_common)
        read: dict[str, dict[str, Tensor]] = {}
        if isinstance(state.sync, Averaged) and topology.is_coordinator and not has_common:
            read[SHARED] = mean_shared(checkpoint, state.config.num_blocks)
        read |= {file: checkpoint.tensors(file) for file in needed}
        _check(state, checkpoint.path, read)
    sync, shared = state.sync, state.shared_tensors.parameters
    shared_optimizer = optimizer_file(SHARED)
    if SHARED in read:
        fill(state.shared, read.pop(SHARED), checkpoint.path / SHARED)
    if isinstance(sync, Averaged):
        sync.take_over()
        if sync.outer is not None and shared_optimizer in read:
            load_state(sync.outer, sync.anchor, unflatten(read.pop(shared_optimizer)))
    elif shared_optimizer in read:
        moments = unflatten(read.pop(shared_optimizer))
        if isinstance(sync, Sharded):
            sync.set_optimizer_state(moments)
        elif sync.optimizer is not None:
            load_state(sync.optimizer, shared, moments)
    if state.ema and ema_file(SHARED) in read:
        averages = read.pop(ema_file(SHARED))
        state.ema.load(prefixed({name: averages[name] for name in shared}))
    for owned in state.blocks:
        _restore_block(state, checkpoint, owned, read)


def _check(state: RankState, path: Path, read: Files) -> None:
    """Raises CheckpointError, naming file and tensor, unless `restore` can take what it needs."""
    shared = form_of(state.shared)
    trained = _shapes(state.shared_tensors.parameters)
    kinds = SGD if isinstance(state.sync, Averaged) else ADAMW
    together = trained if isinstance(state.sync, Sharded) else ()
    for file in (SHARED, ema_file(SHARED)):
        if file in read:
            check_weights(shared, read[file], path / file)
    if (file := optimizer_file(SHARED)) in read:
        check_state(unflatten(read[file]), trained, kinds, path / file, together)
    is_zero = state.config.parallel.replica_engine == "deepspeed"
    for owned in state.blocks:
        name, form = block_file(owned.index), dict(owned.form)
        shapes = own = {k: form[k].shape for k in owned.trained}
        if state.config.has_copies:
            form |= prefixed(shared)
            shapes = own | prefixed(trained)
        for file in (name, ema_file(name)):
            if file in read:
                check_weights(form, read[file], path / file)
        file, together = optimizer_file(name), own if is_zero else ()
        check_state(unflatten(read[file]), shapes, ADAMW, path / file, together)


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _restore_block(
    state: RankState, checkpoint: Checkpoint, owned: OwnedBlock, read: dict[str, dict[str, Tensor]]
) -> None:
    """read: what `_check` has accepted; the block's files are taken out of it."""
    name, engine = block_file(owned.index), owned.engine
    if state.ema:
        averages, private = split_private(read.pop(ema_file(name)))
        state.ema.load({k: engine.cut(p, averages[k]) for k, p in owned.trained.items()})
        if state.config.has_copies:
            state.ema.load(prefixed({k: private[k] for k in state.shared_tensors.parameters}))
    layers, private = split_private(read.pop(name))
    engine.set_weights(layers.items())
    tensors = read.pop(optimizer_file(name))
    engine.set_optimizer_state(unflatten(split_private(tensors)[0]))
    if state.config.has_copies:
        fill(state.shared, private, checkpoint.path / name)
        if state.sync.optimizer is not None:
            moments = unflatten(tensors, PREFIX)
            load_state(state.sync.optimizer, state.shared_tensors.parameters, moments)


def files_to_restore(
    config: Config, topology: Topology, blocks: list[int], *, has_common: bool = True
) -> list[str]:
    """Names the files of a checkpoint that `restore` reads on a rank that owns these blocks.

    has_common: whether it holds what all blocks share; blocks that were saved by themselves leave
    none.
    """
    has_ema, is_coordinator = config.train.ema_decay > 0, topology.is_coordinator
    optimizer = [optimizer_file(SHARED)]
    ema = [ema_file(SHARED)] if has_ema else []
    inner = optimizer if is_coordinator or not topology.layout.needs_coordinator else []
    outer = optimizer if is_coordinator and has_outer_step(config.parallel) else []
    of_shared = {
        "coordinated": [SHARED, *inner, *ema],
        "sharded": [SHARED, *optimizer, *ema],
        "averaged": [SHARED, *outer] if has_common else [],
        "private": [],
    }
    files = of_shared[config.shared]
    for name in map(block_file, blocks):
        files += [name, optimizer_file(name), *([ema_file(name)] if has_ema else [])]
    return files


def mean_shared(checkpoint: Checkpoint, num_blocks: int) -> dict[str, Tensor]:
    """Returns the mean of the blocks' private shared modules.

    These are the common parameters of blocks that were saved by themselves. Summed in block order,
    as `shared_sync` does. Raises CheckpointError.
    """
    first: dict[str, Tensor] = {}
    total: dict[str, Tensor] = {}
    same: set[str] = set()
    for block in range(num_blocks):
        _, private = split_private(checkpoint.tensors(block_file(block)))
        if not first:
            first, total, same = private, dict(private), set(private)
            continue
        if total.keys() != private.keys():
            path = checkpoint.path / block_file(block)
            raise CheckpointError(f"{path} has other shared modules than block 0's file")
        same = {name for name in same if torch.equal(private[name], first[name])}
        total = {name: tensor + private[name] for name, tensor in total.items()}
    return {
        # What is frozen, or counts, has no mean.
        name: first[name] if name in same or not tensor.is_floating_point() else tensor / num_blocks
        for name, tensor in total.items()
    }
