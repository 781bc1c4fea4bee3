"""What one rank trains: shared modules, its block or blocks, their optimizers, averaged weights;
and how all this becomes the files of a checkpoint and comes back. Built empty of everything that
belongs to other ranks.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dbdist import build
from dbdist.checkpoint import (
    PREFIX,
    SHARED,
    Checkpoint,
    Files,
    block_file,
    ema_file,
    optimizer_file,
    optimizer_tensors,
    restore_optimizer,
    split_private,
)
from dbdist.config import Config
from dbdist.data import DatasetSpec
from dbdist.ema import Ema
from dbdist.evaluation import Model
from dbdist.inference import fill
from dbdist.models.vit import Block
from dbdist.monitor import Ownership
from dbdist.parallel.coordinator import Averaged, Coordinated, Private, SharedSync
from dbdist.parallel.replicas import Replicas
from dbdist.parallel.topology import Topology


@dataclass(frozen=True)
class OwnedBlock:
    """A block that this rank trains."""

    index: int
    module: Block
    model: Model
    """The block joined with this rank's shared modules: what runs at inference."""
    replicas: Replicas
    """The training objective around it."""
    optimizer: torch.optim.Optimizer

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.module.named_parameters())


class RankState:
    """Everything on this rank that a step changes. Building one is collective."""

    def __init__(
        self,
        config: Config,
        topology: Topology,
        spec: DatasetSpec,
        indices: list[int],
        *,
        is_empty: bool = False,
    ) -> None:
        """indices: the blocks to own. is_empty: leave the weights to `restore`."""
        self.config, self.topology, self.spec = config, topology, spec
        sizes = build.architecture(config, spec)
        seed = None if is_empty else config.seed
        device = topology.device
        self.shared = build.build_shared(config, sizes, seed, device)
        self.blocks: list[OwnedBlock] = []
        for index in indices:
            module = build.build_block(config, sizes, index, seed, device)
            model = build.join(config, self.shared, module)
            objective = build.build_objective(config, model)
            replicas = Replicas(objective, topology)
            self.blocks.append(OwnedBlock(index, module, model, replicas, self._adamw(module)))
        self.sync = self._build_sync()
        self.ema: Ema | None = None
        is_bystander = self._is_private and not self.blocks
        if config.train.ema_decay > 0 and not is_bystander:
            self.ema = Ema(config.train.ema_decay, self.parameters)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """All parameters on this rank by name."""
        own = {name: p for owned in self.blocks for name, p in owned.parameters.items()}
        return {**_prefixed(self.shared_parameters), **own}

    @property
    def shared_parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.shared.named_parameters())

    def set_training(self, mode: bool) -> None:
        for owned in self.blocks:
            owned.replicas.objective.train(mode)

    def clip_gradients(self, owned: OwnedBlock) -> Tensor:
        """Scales the gradients of a block and of the shared modules to `train.clip_norm` at most;
        returns their global norm before."""
        parameters = [*owned.module.parameters(), *self.shared.parameters()]
        return nn.utils.clip_grad_norm_(parameters, self.config.train.clip_norm or math.inf)

    def set_lr(self, progress: float, last_step: int) -> None:
        """Linear warm-up, then constant or half a cosine. progress: steps of each block done
        before;
        last_step: where the cosine ends unless the configuration says."""
        t = self.config.train
        factor = 1.0
        if progress < t.warmup_steps:
            factor = (progress + 1) / (t.warmup_steps + 1)
        elif t.schedule == "cosine":
            last = t.schedule_steps or last_step
            done = min(1.0, (progress - t.warmup_steps) / max(1, last - t.warmup_steps))
            cosine = (1 + math.cos(math.pi * done)) / 2
            factor = t.min_lr_ratio + (1 - t.min_lr_ratio) * cosine
        for optimizer in (*(owned.optimizer for owned in self.blocks), self.sync.optimizer):
            for group in optimizer.param_groups if optimizer else ():
                group["lr"] = t.lr * factor

    def ownership(self) -> Ownership:
        """This rank's row in the table of who owns what."""
        config, topology = self.config, self.topology
        own = sum(p.numel() for owned in self.blocks for p in owned.module.parameters())
        shared = sum(p.numel() for p in self.shared.parameters())
        optimized = own + (shared if self.sync.optimizer is not None else 0)
        layers = [i for owned in self.blocks for i in config.layers_of_block[owned.index]]
        sigma = None
        if config.mode != "end_to_end" and self.blocks:
            schedule = config.noise_schedule()
            ranges = [schedule.block_range(owned.index) for owned in self.blocks]
            sigma = min(low for low, _ in ranges), max(high for _, high in ranges)
        return Ownership(
            rank=topology.rank,
            block=", ".join(str(owned.index) for owned in self.blocks) or "-",
            replica=topology.replica,
            layers=f"{layers[0]}-{layers[-1]}" if layers else "-",
            sigma=sigma,
            parameters=own,
            shared_parameters=shared,
            optimizer_bytes=2 * optimized * self.shared.positions.element_size(),
            device=str(topology.device),
            owns_shared=topology.is_coordinator or isinstance(self.sync, Private),
        )

    # Checkpoints

    def files(self) -> Files:
        """What this rank writes: its blocks if it is their first replica (with its copy of the
        shared modules if that is private), and on the coordinator the shared modules of all."""
        files: dict[str, dict[str, Tensor]] = {}
        sync, shared = self.sync, self.shared_parameters
        if self.topology.is_leader:
            for owned in self.blocks:
                name = block_file(owned.index)
                files[name] = {
                    **owned.parameters,
                    **(_prefixed(shared) if self._is_private else {}),
                }
                state = optimizer_tensors(owned.optimizer, owned.parameters)
                if self._is_private and sync.optimizer is not None:
                    state |= optimizer_tensors(sync.optimizer, shared, PREFIX)
                files[optimizer_file(name)] = state
                if self.ema:
                    files[ema_file(name)] = {k: self.ema.averages[k] for k in files[name]}
        if self.topology.is_coordinator:
            if isinstance(sync, Averaged):
                files[SHARED] = dict(sync.anchor)
                if sync.outer is not None:
                    files[optimizer_file(SHARED)] = optimizer_tensors(sync.outer, sync.anchor)
            elif not self._is_private:
                assert sync.optimizer is not None
                files[SHARED] = {**shared}
                files[optimizer_file(SHARED)] = optimizer_tensors(sync.optimizer, shared)
                if self.ema:
                    files[ema_file(SHARED)] = {k: self.ema.averages[PREFIX + k] for k in shared}
        return files

    def restore(self, checkpoint: Checkpoint) -> None:
        """The inverse of `files`, whichever topology wrote them. Raises CheckpointError."""
        checkpoint.check_fits(describe_model(self.config, self.spec))
        sync, shared = self.sync, self.shared_parameters
        if isinstance(sync, Averaged) or not self._is_private:
            fill(self.shared, checkpoint.tensors(SHARED), checkpoint.path / SHARED)
        if isinstance(sync, Averaged):
            with torch.no_grad():
                for name, tensor in sync.anchor.items():
                    tensor.copy_(shared[name])
            if sync.outer is not None:
                state = checkpoint.tensors(optimizer_file(SHARED))
                restore_optimizer(sync.outer, sync.anchor, state)
        elif not self._is_private and sync.optimizer is not None:
            state = checkpoint.tensors(optimizer_file(SHARED))
            restore_optimizer(sync.optimizer, shared, state)
        if self.ema and not self._is_private:
            self.ema.load(_prefixed(checkpoint.tensors(ema_file(SHARED))))
        for owned in self.blocks:
            self._restore_block(checkpoint, owned)

    def _restore_block(self, checkpoint: Checkpoint, owned: OwnedBlock) -> None:
        name = block_file(owned.index)
        weights, state = checkpoint.tensors(name), checkpoint.tensors(optimizer_file(name))
        layers, private = split_private(weights)
        fill(owned.module, layers, checkpoint.path / name)
        restore_optimizer(owned.optimizer, owned.parameters, state)
        if self._is_private:
            fill(self.shared, private, checkpoint.path / name)
            assert self.sync.optimizer is not None
            restore_optimizer(self.sync.optimizer, self.shared_parameters, state, PREFIX)
        if self.ema:
            self.ema.load(checkpoint.tensors(ema_file(name)))

    @property
    def _is_private(self) -> bool:
        """Whether each block's copy of the shared modules has values and an optimizer of its
        own."""
        is_parallel = self.config.mode == "block_parallel"
        return is_parallel and not isinstance(self.sync, Coordinated)

    def _adamw(self, module: nn.Module) -> torch.optim.Optimizer:
        t = self.config.train
        return torch.optim.AdamW(
            module.parameters(), t.lr, t.betas, t.eps, weight_decay=t.weight_decay, fused=True
        )

    def _build_sync(self) -> SharedSync:
        p, topology = self.config.parallel, self.topology
        if self.config.mode != "block_parallel" or p.sync == "never":
            return Private(self._adamw(self.shared))
        if p.sync == "step":
            optimizer = self._adamw(self.shared) if topology.is_coordinator else None
            return Coordinated(topology, self.shared, optimizer)
        optimizer = self._adamw(self.shared) if self.blocks else None
        return Averaged(
            topology, self.shared, optimizer, p.sync_every, p.outer_lr, p.outer_momentum
        )


def describe_model(config: Config, spec: DatasetSpec) -> dict[str, Any]:
    """What a checkpoint must agree with: sizes, cut and partition of the model."""
    schedule = None if config.mode == "end_to_end" else config.noise_schedule()
    sizes = asdict(build.architecture(config, spec))
    for key in ("dropout", "attention_dropout", "init"):
        del sizes[key]
    return {
        "mode": "end_to_end" if schedule is None else "blocks",
        "architecture": sizes,
        "layers_per_block": [len(layers) for layers in config.layers_of_block],
        "boundaries": schedule.boundaries.tolist() if schedule else None,
        "noise": asdict(schedule) if schedule else None,
        "data": spec.name,
    }


def _prefixed(tensors: dict[str, Any]) -> dict[str, Any]:
    return {PREFIX + name: tensor for name, tensor in tensors.items()}
