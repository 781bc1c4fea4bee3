"""What one rank trains: shared modules, its block or blocks, their optimizers, averaged weights.
Built empty of everything that belongs to other ranks. `state_files` makes files of it, and back.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dbdist.build import Setup
from dbdist.checkpoint.names import PREFIX
from dbdist.config.config import Config
from dbdist.models.base import Block
from dbdist.models.denoiser import Denoiser
from dbdist.monitor.ownership import Ownership
from dbdist.parallel.agreement import digest_of, find_difference
from dbdist.parallel.engines.ddp import Whole
from dbdist.parallel.engines.engine import Engine, SharedGradients, check_engine, clip
from dbdist.parallel.shared_sync import Averaged, Coordinated, Local, Sharded, SharedSync
from dbdist.parallel.topology import Topology
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
    shapes: dict[str, torch.Size]
    """Of the whole parameters, whatever part of them is here."""

    @property
    def num_parameters(self) -> int:
        return sum(shape.numel() for shape in self.shapes.values())

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.module.named_parameters())


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
        self.blocks: list[OwnedBlock] = []
        check_engine(config.parallel.replica_engine, topology)
        for index in indices:
            module, engine, shapes = self._build_engine(index, seed)
            model = setup.denoiser(self.shared, engine.module)
            objective = setup.objective(model)
            self.blocks.append(OwnedBlock(index, module, model, objective, engine, shapes))
        self.sync = self._build_sync()
        self._shared_gradients = SharedGradients(topology, self.shared_parameters)
        self.ema: Ema | None = None
        is_bystander = config.has_copies and not self.blocks
        if config.train.ema_decay > 0 and not is_bystander:
            self.ema = Ema(config.train.ema_decay, self.parameters)

    @property
    def parameters(self) -> dict[str, Tensor]:
        """All that lies on this rank of all parameters, by name; shares their memory."""
        own = {
            name: owned.engine.part(parameter)
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
        self.shared.zero_grad()

    def clip_gradients(self, owned: OwnedBlock, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Averages the shared gradients over the replicas and holds the global norm of block and
        shared modules to `train.clip_norm`.

        Returns that norm before, and the factor that the block's step has still to apply. The norm
        is the same on all replicas, and not finite if any gradient, or any replica's loss, is not.
        """
        some = next(p.grad for p in self.shared.parameters() if p.grad is not None)
        with torch.no_grad():  # a loss that is not finite adds nan, which all replicas see
            some[(0,) * some.ndim] += 0 * loss
        self._shared_gradients.average()
        return clip(owned.engine, self.shared.parameters(), self.config.train.clip_norm)

    def drop_gradients(self, owned: OwnedBlock) -> None:
        """Makes a step one that the block takes no part in: its shared gradients count as zeros."""
        owned.engine.skip()
        for parameter in self.shared.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()

    def describe_parameters(self) -> dict[str, list[int]]:
        """Shape of every whole parameter, by `block 1: name`."""
        found = {f"shared modules: {n}": list(p.shape) for n, p in self.shared_parameters.items()}
        for owned in self.blocks:
            found |= {f"block {owned.index}: {n}": list(s) for n, s in owned.shapes.items()}
        return found

    def find_drift(self) -> str | None:
        """The first difference between weights that several ranks hold alike: copies of a block,
        and of the shared modules where all have the same. Collective among those ranks."""
        topology = self.topology
        is_common = not self.config.has_copies
        ranks = range(topology.world_size) if is_common else topology.copies
        if len(ranks) == 1:
            return None
        facts = {"shared modules": digest_of(self.shared_parameters)}
        for owned in self.blocks:
            if owned.engine.is_whole:
                facts[f"block {owned.index}"] = digest_of(owned.parameters)
        return find_difference(facts, ranks, None if is_common else topology.replica_group)

    def set_lr(self, progress: float, last_step: int) -> None:
        """Linear warm-up, then constant or half a cosine. progress: steps of each block done
        before. last_step: where the cosine ends unless the configuration says."""
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
        optimized = sum(owned.engine.num_optimized for owned in self.blocks)
        if self.sync.optimizer is not None:
            groups = self.sync.optimizer.param_groups
            optimized += sum(p.numel() for group in groups for p in group["params"])
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
            optimizer_bytes=2 * optimized * self.dtype.itemsize,
            device=str(topology.device),
            owns_shared=topology.is_coordinator or isinstance(self.sync, Local),
        )

    def _build_engine(
        self, index: int, seed: int | None
    ) -> tuple[Block, Engine, dict[str, torch.Size]]:
        """A block, the engine of its replicas, and the shapes of its whole parameters. seed: None
        leaves the weights empty."""
        config, topology = self.config, self.topology
        kind = config.parallel.replica_engine
        is_split = kind == "fsdp"  # from the start: the block is never whole on any rank
        place, own_seed = (torch.device("meta"), None) if is_split else (topology.device, seed)
        module = self.setup.block(index, own_seed, place)
        shapes = {name: p.shape for name, p in module.named_parameters()}
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
            engine = Whole(module, topology, self._adamw)
        return module, engine, shapes

    def _adamw(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        t = self.config.train
        is_deepspeed = self.config.parallel.replica_engine == "deepspeed"
        kind = torch.optim.AdamW if is_deepspeed else AdamW  # DeepSpeed refuses a subclass
        return kind(parameters, t.lr, t.betas, t.eps, weight_decay=t.weight_decay, fused=True)

    def _build_sync(self) -> SharedSync:
        topology, kind = self.topology, self.config.shared
        if kind == "sharded":
            return Sharded(topology, self.shared, self._adamw)
        if kind == "averaged":
            optimizer = self._adamw(self.shared.parameters()) if self.blocks else None
            return Averaged(topology, self.shared, optimizer, self.config.parallel)
        if kind == "private" or not topology.layout.needs_coordinator:
            return Local(self._adamw(self.shared.parameters()))
        optimizer = self._adamw(self.shared.parameters()) if topology.is_coordinator else None
        return Coordinated(topology, self.shared, optimizer)


def own_blocks(config: Config, topology: Topology) -> list[int]:
    """The blocks that this rank trains: its own, or all in sequential mode."""
    if config.mode == "sequential":
        return list(range(config.num_blocks))
    named = config.trained_blocks or range(config.num_blocks)
    return [] if topology.block is None else [named[topology.block]]


def prefixed(tensors: dict[str, Any]) -> dict[str, Any]:
    return {PREFIX + name: tensor for name, tensor in tensors.items()}
