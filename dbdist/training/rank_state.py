"""What one rank trains: shared modules, its blocks, their optimizers, averaged weights.

It is built empty of everything that belongs to other ranks. `state_files` makes files of it, and
back.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dbdist.build import Setup
from dbdist.checkpoint.names import PREFIX
from dbdist.checkpoint.snapshot import check_dtypes
from dbdist.config.config import Config
from dbdist.errors import ConfigError
from dbdist.models.base import Block
from dbdist.models.denoiser import Denoiser
from dbdist.monitor.ownership import Ownership
from dbdist.parallel.agreement import digest_of, find_difference
from dbdist.parallel.engines.ddp import Ddp
from dbdist.parallel.engines.engine import Engine, check_engine, clip, num_bytes
from dbdist.parallel.shared_sync import Averaged, Coordinated, Local, Sharded, SharedSync
from dbdist.parallel.shared_tensors import SharedTensors, take_leaders_buffers
from dbdist.parallel.topology import Topology
from dbdist.tensors import buffers_of, form_of, named_tensors, trained_of
from dbdist.training.adamw import AdamW
from dbdist.training.ema import Ema


@dataclass(frozen=True)
class OwnedBlock:
    """A block that this rank trains."""

    index: int
    module: Block
    model: Denoiser
    """The block joined with this rank's shared modules: what runs at inference."""
    objective: nn.Module
    """The training objective around it."""
    engine: Engine
    """The block among its replicas, and its optimizer."""
    form: dict[str, Tensor]
    """Whole parameters and buffers without memory, whatever shard of them is here."""

    @property
    def num_parameters(self) -> int:
        return sum(self.form[name].numel() for name in self.parameters)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.module.named_parameters())

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that are not frozen."""
        return trained_of(self.module)


class RankState:
    """Everything on this rank that a step changes. Building one is collective."""

    def __init__(
        self,
        config: Config,
        topology: Topology,
        setup: Setup,
        indices: list[int],
        *,
        is_empty: bool = False,
    ) -> None:
        """indices: the blocks to own. is_empty: leave the weights to `state_files.restore`."""
        self.config, self.topology, self.setup = config, topology, setup
        seed = None if is_empty else config.seed
        device = topology.device
        self.shared = setup.shared(seed, device)
        check_dtypes("the shared modules", form_of(self.shared))
        fills = topology.world_size if config.shared == "sharded" else 1
        self.shared_tensors = SharedTensors(topology, self.shared, fills)
        self.blocks: list[OwnedBlock] = []
        check_engine(config.parallel.replica_engine, topology)
        for index in indices:
            module, engine, form = self._build_engine(index, seed)
            model = setup.denoiser(self.shared, engine.module)
            objective = setup.objective(model)
            self.blocks.append(OwnedBlock(index, module, model, objective, engine, form))
        self.sync = self._build_sync()
        self._is_settled, self._num_updates = True, 0
        self.ema: Ema | None = None
        is_bystander = config.has_copies and not self.blocks
        if config.train.ema_decay > 0 and not is_bystander:
            of_shared = prefixed(self.shared_tensors.parameters)
            of_blocks = {n: o.engine.shard(p) for o in self.blocks for n, p in o.trained.items()}
            averaged = {**of_shared, **of_blocks}
            self.ema = Ema(config.train.ema_decay, averaged, config.train.ema_rampup)

    @property
    def parameters(self) -> dict[str, Tensor]:
        """All that lies on this rank of all parameters, by name; shares their memory."""
        own = {
            name: owned.engine.shard(parameter)
            for owned in self.blocks
            for name, parameter in owned.parameters.items()
        }
        shared = {name: p.detach() for name, p in self.shared_parameters.items()}
        return {**prefixed(shared), **own}

    @property
    def shared_parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.shared.named_parameters())

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point type of the shared modules, in which states are kept."""
        return next(p.dtype for p in self.shared.parameters() if p.is_floating_point())

    def set_training(self, mode: bool) -> None:
        for owned in self.blocks:
            owned.objective.train(mode)

    def zero_gradients(self, owned: OwnedBlock) -> None:
        """Before a step."""
        owned.engine.zero_grad()
        self.shared_tensors.zero_gradients()

    def clip_gradients(self, owned: OwnedBlock, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Averages the shared gradients over the replicas and clips the global norm.

        The norm of block and shared modules is held to `train.clip_norm`. Returns that norm before,
        and the factor that the block's step has still to apply. The norm is the same on all
        replicas, and not finite if any gradient, or any replica's loss, is not.
        """
        self.shared_tensors.note_loss(loss)
        self.shared_tensors.average_gradients()
        return clip(owned.engine, self.shared_tensors, self.config.train.clip_norm)

    def drop_gradients(self, owned: OwnedBlock) -> None:
        """Makes a step one that the block takes no part in: its shared gradients count as zeros."""
        owned.engine.skip()
        self.shared_tensors.zero_gradients()

    def step_shared(self, steps_done: int, num_updates: int, is_skipped: bool = False) -> None:
        """After `sync.begin`: the shared modules' step. Its result is here after `settle`.

        steps_done: of the block. num_updates: steps of all blocks here, after each of which the
        averages follow.
        """
        self.sync.step(steps_done, is_skipped)
        self._num_updates = num_updates
        self._is_settled = False

    def settle(self) -> None:
        """Ends a step: its shared modules are here, and averages follow.

        Once, before the next forward pass or anything else that reads weights or clears gradients.
        """
        if self._is_settled:
            return
        self._is_settled = True
        self.sync.finish()
        if self.ema:
            self.ema.update(self._num_updates)

    def share_buffers(self) -> None:
        """Gives every copy of a module its leader's buffers. Collective.

        For shared modules that all blocks have in common, these are block 0's. Before anything is
        saved, scored or compared.
        """
        topology, has_copies = self.topology, self.config.has_copies
        shared = buffers_of(self.shared)
        if not has_copies:
            take_leaders_buffers(topology, shared, topology.layout.rank_of(0, 0))
        if topology.replica_group is not None:
            own = prefixed(shared) if has_copies else {}
            for owned in self.blocks:
                own |= buffers_of(owned.module)
            take_leaders_buffers(topology, own, topology.copies[0], topology.replica_group)

    def describe_parameters(self) -> dict[str, str]:
        """Shape and dtype of every whole parameter and buffer, by `block 1: name`; their number."""
        forms = {"shared modules": form_of(self.shared)}
        forms |= {f"block {owned.index}": owned.form for owned in self.blocks}
        numbers = {f"{place}: number of tensors": str(len(form)) for place, form in forms.items()}
        return numbers | {
            f"{place}: {name}": f"{list(t.shape)} {str(t.dtype).removeprefix('torch.')}"
            for place, form in forms.items()
            for name, t in form.items()
        }

    def find_drift(self) -> str | None:
        """Returns the first difference between weights that several ranks hold in common.

        These are copies of a block, and the shared modules where all have the same. Collective
        among those ranks.
        """
        topology = self.topology
        is_common = not self.config.has_copies
        ranks = range(topology.world_size) if is_common else topology.copies
        if len(ranks) == 1:
            return None
        facts = {"shared modules": digest_of(named_tensors(self.shared))}
        for owned in self.blocks:
            if not owned.engine.split.weights:
                facts[f"block {owned.index}"] = digest_of(named_tensors(owned.module))
        return find_difference(facts, ranks, None if is_common else topology.replica_group)

    def set_lr(self, progress: float, last_step: int) -> None:
        """Sets the learning rate: linear warm-up, then constant or half a cosine.

        progress: steps of each block done before. last_step: where the cosine ends unless the
        configuration says.
        """
        t = self.config.train
        factor = 1.0
        if progress < t.warmup_steps:
            factor = (progress + 1) / (t.warmup_steps + 1)
        elif t.schedule == "cosine":
            last = t.schedule_steps or last_step
            done = min(1.0, (progress - t.warmup_steps) / max(1, last - t.warmup_steps))
            cosine = (1 + math.cos(math.pi * done)) / 2
            factor = t.min_lr_ratio + (1 - t.min_lr_ratio) * cosine
        for optimizer in (*(owned.engine.optimizer for owned in self.blocks), self.sync.optimizer):
            for group in optimizer.param_groups if optimizer else ():
                group["lr"] = t.lr * factor

    def ownership(self) -> Ownership:
        """This rank's row in the table of who owns what."""
        config, topology = self.config, self.topology
        own = sum(owned.num_parameters for owned in self.blocks)
        shared = sum(p.numel() for p in self.shared.parameters())
        stepped = sum(owned.engine.num_stepped_bytes for owned in self.blocks)
        if self.sync.optimizer is not None:
            groups = self.sync.optimizer.param_groups
            stepped += num_bytes(p for group in groups for p in group["params"])
        layers = [i for owned in self.blocks for i in config.layers_of_block[owned.index]]
        levels = None
        partition = self.setup.process.partition
        if partition is not None and self.blocks:
            ranges = [partition.block_range(owned.index) for owned in self.blocks]
            levels = min(low for low, _ in ranges), max(high for _, high in ranges)
        return Ownership(
            rank=topology.rank,
            block=", ".join(str(owned.index) for owned in self.blocks) or "-",
            replica=topology.replica,
            layers=f"{layers[0]}-{layers[-1]}" if layers else "-",
            levels=levels,
            parameters=own,
            shared_parameters=shared,
            optimizer_bytes=2 * stepped,
            device=str(topology.device),
            owns_shared=topology.is_coordinator or isinstance(self.sync, Local),
        )

    def _build_engine(
        self, index: int, seed: int | None
    ) -> tuple[Block, Engine, dict[str, Tensor]]:
        """Builds a block, the engine of its replicas, and the form of its whole tensors.

        seed: None leaves the weights empty.
        """
        config, topology = self.config, self.topology
        kind = config.parallel.replica_engine
        is_split = kind == "fsdp"  # from the start: the block is never whole on any rank
        place, own_seed = (torch.device("meta"), None) if is_split else (topology.device, seed)
        module = self.setup.block(index, own_seed, place)
        form = form_of(module)
        check_dtypes(f"block {index}", form)
        if not trained_of(module):
            raise ConfigError(
                f"block {index} has no parameter to train: the model freezes all of them; leave "
                "some free"
            )
        engine: Engine
        if kind == "fsdp":
            from dbdist.parallel.engines.fsdp import Fsdp

            engine = Fsdp(module, topology, self._adamw)
            if seed is not None:
                engine.set_weights(self.setup.model.weights(module, seed))
        elif kind == "deepspeed":
            from dbdist.parallel.engines import zero
            from dbdist.parallel.engines.zero_settings import settings

            engine = zero.Zero(
                module, topology, self._adamw, settings(config, topology.layout.num_replicas)
            )
        else:
            engine = Ddp(module, topology, self._adamw)
        return module, engine, form

    def _adamw(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        t = self.config.train
        is_deepspeed = self.config.parallel.replica_engine == "deepspeed"
        kind = torch.optim.AdamW if is_deepspeed else AdamW  # DeepSpeed refuses a subclass
        by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}  # engines want groups of one
        for parameter in parameters:
            by_dtype.setdefault(parameter.dtype, []).append(parameter)
        groups = [{"params": same} for same in by_dtype.values()]
        return kind(groups, t.lr, t.betas, t.eps, weight_decay=t.weight_decay, fused=True)

    def _build_sync(self) -> SharedSync:
        topology, kind, shared = self.topology, self.config.shared, self.shared_tensors
        if kind == "sharded" and shared.parameters:
            return Sharded(topology, shared, self._adamw)
        is_local = kind == "private" or not topology.layout.needs_coordinator
        steps = self.blocks if kind == "averaged" else is_local or topology.is_coordinator
        optimizer = self._adamw(shared.parameters.values()) if steps and shared.parameters else None
        if kind == "averaged":
            return Averaged(topology, shared, optimizer, self.config.parallel)
        if is_local or not shared.parameters:
            return Local(optimizer)
        return Coordinated(topology, shared, optimizer)


def own_blocks(config: Config, topology: Topology) -> list[int]:
    """The blocks that this rank trains: its own, or all in sequential mode."""
    if config.mode == "sequential":
        return list(range(config.num_blocks))
    named = config.trained_blocks or range(config.num_blocks)
    return [] if topology.block is None else [named[topology.block]]


def prefixed(tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {PREFIX + name: tensor for name, tensor in tensors.items()}
