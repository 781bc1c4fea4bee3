"""The training loop, the same for all modes: batch → target → noise → denoise → loss → backward →
reduce → step → record.

Each rank owns one block (block_parallel), every block (sequential) or the whole model as one block
(end_to_end), and a copy of the shared modules, which `parallel.coordinator` keeps up to date.
Everything random is a function of (seed, purpose, block, step), so the state of a run is its
weights, optimizers and step.
"""

import math
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import record_function

from dbdist import build, seeds
from dbdist.checkpoint import (
    SHARED,
    Checkpoint,
    CheckpointWriter,
    block_file,
    ema_file,
    optimizer_file,
    optimizer_tensors,
    restore_optimizer,
)
from dbdist.config import Config
from dbdist.data import BatchStream, ImageDataset
from dbdist.ema import Ema
from dbdist.errors import ConfigError, TopologyError, UserError
from dbdist.evaluation import Evaluation, Model, evaluate
from dbdist.histogram import SigmaHistogram
from dbdist.inference import fill
from dbdist.models.vit import Block
from dbdist.monitor import Monitor, Ownership, peak_memory_mb
from dbdist.parallel.coordinator import Averaged, Coordinated, Private, SharedSync
from dbdist.parallel.mailbox import Mailbox
from dbdist.parallel.replicas import Replicas
from dbdist.parallel.topology import Layout, Topology
from dbdist.tasks.classification import Draws, Loss, sample_draws


@dataclass
class OwnedBlock:
    """A block that this rank trains: weights, objective, optimizer, data, and what is not yet
    recorded."""

    index: int
    module: Block
    model: Model
    replicas: Replicas
    optimizer: torch.optim.Optimizer
    steps_done: int
    batches: BatchStream
    totals: Tensor
    """Sums of loss, cross-entropy, gradient norm and steps since the last record, on the device."""
    histogram: SigmaHistogram | None
    seconds: float = 0.0


def layout_of(config: Config, world_size: int) -> Layout:
    """Which ranks this configuration wants; end_to_end takes every process as a replica.
    Raises TopologyError or ConfigError when the mode cannot use this many."""
    if config.mode == "block_parallel":
        return Layout(config.num_blocks, config.parallel.replicas, config.parallel.coordinator)
    if config.mode == "sequential" and world_size > 1:
        raise TopologyError(
            f"mode sequential trains in one process, {world_size} were started; "
            "start it without torchrun, or use mode block_parallel"
        )
    parts = world_size * config.train.accumulation_steps
    if config.train.batch_size % parts:
        raise ConfigError(
            f"train.batch_size {config.train.batch_size} is not a multiple of processes x "
            f"train.accumulation_steps = {parts}"
        )
    return Layout(1, world_size)


class Trainer:
    """Trains what this rank owns. Building one is collective; so are `fit` and `evaluate`."""

    def __init__(
        self,
        config: Config,
        topology: Topology,
        train_set: ImageDataset,
        test_set: ImageDataset,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        """checkpoint: where to continue. Raises ConfigError, CheckpointError or TopologyError."""
        self.config, self.topology = config, topology
        self.train_set, self.test_set = train_set, test_set
        self.sizes = build.architecture(config, train_set.spec)
        self.schedule = None if config.mode == "end_to_end" else config.noise_schedule()
        self.num_replicas = topology.layout.num_replicas
        self.max_steps = config.max_steps(len(train_set))
        self.start_step = checkpoint.step if checkpoint else 0
        self.order = self._block_order()
        seed = None if checkpoint else config.seed
        self.shared = build.build_shared(config, self.sizes, seed, topology.device)
        self.blocks = [self._own(index, seed) for index in self._owned_indices()]
        self.sync = self._build_sync()
        self.ema = (
            Ema(config.train.ema_decay, self._all_parameters()) if config.train.ema_decay else None
        )
        if checkpoint is not None:
            with topology.agree("reading the checkpoint"):
                self._restore(checkpoint)
        self.run_dir = Path(config.run_dir)
        self.writer = CheckpointWriter(
            self.run_dir, topology, self._writers(), config.checkpoint.keep_last
        )
        self._mailbox = Mailbox(topology, "metrics")
        self._marks = _Marks()
        self.monitor: Monitor | None = None

    # -- the loop
    # --------------------------------------------------------------------------------------

    def fit(self, monitor: Monitor | None) -> Evaluation:
        """Trains to the last step and evaluates. monitor: on rank 0."""
        self.monitor = monitor
        if self.topology.is_coordinator:
            self.writer.clean()
        self.topology.barrier()
        self._set_training(True)
        evaluation = None
        for step in range(self.start_step, self.max_steps):
            evaluation = None
            for turn, owned in enumerate(self._turns(step)):
                self._train_step(owned, step + turn / len(self.order[step]))
            if not self.blocks:  # a dedicated coordinator only reduces, steps and broadcasts
                self._set_lr(float(step))
                self.sync.begin()
                self.sync.finish(step + 1)
            evaluation = self._after_step(step + 1)
        if evaluation is None:
            evaluation = self.evaluate(max(self.max_steps, self.start_step))
        self.writer.finish(self.config.parallel.timeout_s)
        for owned in self.blocks:
            owned.batches.close()
        self.topology.barrier()
        self._collect()
        return evaluation

    def _train_step(self, owned: OwnedBlock, progress: float) -> None:
        """One optimizer step of one block. progress: steps of the schedule, a fraction in
        sequential mode.

        The labelled phases show up in torch's profiler and in `dbdist.bench.step`.
        """
        start = time.perf_counter()
        with record_function("dbdist::load"):
            images, labels_N = next(owned.batches)
            dtype = self.shared.positions.dtype
            images = images.to(self.topology.device, dtype, non_blocking=True)
            labels_N = labels_N.to(self.topology.device, non_blocking=True)
        with record_function("dbdist::noise"):
            draws = self._draws(owned)
            self._seed_dropout(owned)
        self._zero_grad(owned)
        parts = self.config.train.accumulation_steps
        size = len(labels_N) // parts
        for first in range(0, len(labels_N), size):
            rows = slice(first, first + size)
            part = draws and draws.part(first, first + size)
            with owned.replicas.reduce_if(first + size == len(labels_N)):
                with record_function("dbdist::forward"), self._autocast():
                    loss = self._loss(owned, images[rows], labels_N[rows], part)
                with record_function("dbdist::backward"):
                    (loss.value / parts).backward()
            self._note(owned, loss, part)
        with record_function("dbdist::optimizer"):
            parameters = [*owned.module.parameters(), *self.shared.parameters()]
            norm = torch.nn.utils.clip_grad_norm_(
                parameters, self.config.train.clip_norm or math.inf
            )
            self._set_lr(progress)
        with record_function("dbdist::sync"):
            self.sync.begin()
        with record_function("dbdist::optimizer"):
            owned.optimizer.step()
            owned.steps_done += 1
        with record_function("dbdist::sync"):
            self.sync.finish(owned.steps_done)
        if self.ema:
            self.ema.update()
        owned.totals[2] += norm.detach()
        owned.totals[3] += 1
        owned.seconds += time.perf_counter() - start

    def _loss(
        self, owned: OwnedBlock, images: Tensor, labels_N: Tensor, draws: Draws | None
    ) -> Loss:
        inputs = (images, labels_N) if draws is None else (images, labels_N, draws)
        return owned.replicas.objective(*inputs)

    def _seed_dropout(self, owned: OwnedBlock) -> None:
        """Makes the step's dropout a function of its name alone."""
        m = self.config.model
        if m.dropout > 0 or m.attention_dropout > 0:
            replica, step = self.topology.replica, owned.steps_done
            torch.manual_seed(seeds.at(self.config.seed, "dropout", owned.index, replica, step))

    def _draws(self, owned: OwnedBlock) -> Draws | None:
        """This replica's part of what the block's step draws; None without noise."""
        if self.schedule is None:
            return None
        size = self.config.train.batch_size // self.num_replicas
        draws = sample_draws(
            self.config.task,
            self.schedule,
            seed=self.config.seed,
            block=owned.index,
            step=owned.steps_done,
            num_samples=self.config.train.batch_size,
            hidden_size=self.config.model.hidden_size,
        )
        first = self.topology.replica * size
        return draws.part(first, first + size).to(self.topology.device)

    def _after_step(self, step: int) -> Evaluation | None:
        """What is due after a step of every owned block: evaluation, record, checkpoint."""
        config, is_last = self.config, step == self.max_steps
        is_eval = is_last or _is_due(step, config.eval.every_steps)
        is_save = is_last or _is_due(step, config.checkpoint.every_steps)
        evaluation = None
        scalars: dict[str, float] = {}
        if is_eval or is_save or _is_due(step, config.train.log_every) or step == 1:
            scalars = self._measure(step)
        if is_eval:
            evaluation = self.evaluate(step)
            scalars |= evaluation.scalars() if self.topology.is_coordinator else {}
        if scalars or is_eval:
            self._post(step, scalars, with_histograms=is_eval)
        if is_save:
            about = self._about(step) if self.topology.is_coordinator else {}
            self.writer.save(step, self._files(), about)
        elif self.topology.is_coordinator:
            self.writer.poll()
        self._collect()
        return evaluation

    # -- evaluation
    # ------------------------------------------------------------------------------------

    def evaluate(self, step: int) -> Evaluation:
        """The test set through the chain, with averaged weights if there are any. Collective."""
        models = {owned.index: owned.model for owned in self.blocks}
        with self.ema.swapped() if self.ema else nullcontext():
            self._set_training(False)
            evaluation = evaluate(
                self.config, self.topology, self.test_set, models.__getitem__, step
            )
            self._set_training(True)
        return evaluation

    # -- records
    # ---------------------------------------------------------------------------------------

    def ownership(self) -> Ownership:
        """This rank's row in the table of who owns what."""
        config, topology = self.config, self.topology
        own = sum(p.numel() for owned in self.blocks for p in owned.module.parameters())
        shared = sum(p.numel() for p in self.shared.parameters())
        optimized = own + (shared if self.sync.optimizer is not None else 0)
        layers = [i for owned in self.blocks for i in config.layers_of_block[owned.index]]
        sigma = None
        if self.schedule and self.blocks:
            ranges = [self.schedule.block_range(owned.index) for owned in self.blocks]
            sigma = min(low for low, _ in ranges), max(high for _, high in ranges)
        return Ownership(
            rank=topology.rank,
            block=topology.block,
            replica=topology.replica,
            layers=f"{layers[0]}-{layers[-1]}" if layers else "-",
            sigma=sigma,
            parameters=own,
            shared_parameters=shared,
            optimizer_bytes=2 * optimized * self.shared.positions.element_size(),
            device=str(topology.device),
            owns_shared=self.sync.optimizer is not None,
        )

    def _note(self, owned: OwnedBlock, loss: Loss, draws: Draws | None) -> None:
        share = 1 / self.config.train.accumulation_steps
        owned.totals[0] += loss.value.detach() * share
        owned.totals[1] += loss.cross_entropy_N.mean() * share
        if owned.histogram is not None and draws is not None:
            owned.histogram.add(draws.sigma_N, loss.cross_entropy_N)

    def _measure(self, step: int) -> dict[str, float]:
        """This rank's scalars since the last record. Collective among the replicas of a block."""
        scalars: dict[str, float] = {}
        rank, topology, marks = self.topology.rank, self.topology, self._marks
        for owned in self.blocks:
            totals = owned.totals.clone()
            if topology.replica_group is not None:
                totals = totals.to(topology.wire_device)
                dist.all_reduce(totals, group=topology.replica_group)
                topology.meter.sent["metrics"] += totals.nbytes
                topology.meter.received["metrics"] += totals.nbytes
                totals /= self.num_replicas
            start = time.perf_counter()
            loss, cross_entropy, norm, steps = totals.tolist()  # waits for a GPU's queued steps
            seconds = owned.seconds + time.perf_counter() - start
            owned.seconds = 0.0
            owned.totals.zero_()
            if steps == 0:
                continue
            if not math.isfinite(loss):
                raise UserError(
                    f"rank {rank}, block {owned.index}, step {step}: the loss is {loss / steps}; "
                    "lower train.lr or set train.clip_norm, and continue from the last checkpoint"
                )
            if topology.replica == 0:
                b = owned.index
                scalars |= {
                    f"train/loss/block{b}": loss / steps,
                    f"train/cross_entropy/block{b}": cross_entropy / steps,
                    f"train/grad_norm/block{b}": norm / steps,
                    f"train/lr/block{b}": owned.optimizer.param_groups[0]["lr"],
                    f"perf/step_ms/block{b}": 1e3 * seconds / steps,
                    f"perf/samples_per_s/block{b}": self.config.train.batch_size * steps / seconds,
                }
        num_steps = max(1, step - max(marks.step, self.start_step))
        moved, waited = topology.meter.training_bytes(), self.sync.wait_s
        scalars |= {
            f"perf/sync_wait_ms/rank{rank}": 1e3 * (waited - marks.wait_s) / num_steps,
            f"memory/peak_mb/rank{rank}": peak_memory_mb(topology.device),
            f"comm/bytes_per_step/rank{rank}": (moved - marks.moved) / num_steps,
        }
        self._marks = _Marks(step, moved, waited)
        return scalars

    def _post(self, step: int, scalars: dict[str, float], with_histograms: bool) -> None:
        histograms = (
            [o.histogram.to_dict() for o in self.blocks if o.histogram] if with_histograms else []
        )
        for histogram in histograms or [None]:
            self._mailbox.post({"step": step, "scalars": scalars, "histogram": histogram})
            scalars = {}
        if with_histograms:
            for owned in self.blocks:
                if owned.histogram:
                    owned.histogram.reset()

    def _collect(self) -> None:
        """On rank 0: hands the records that have arrived to the monitor."""
        if not self.topology.is_coordinator:
            return
        for rank, record in self._mailbox.collect():
            if self.monitor is not None:
                self.monitor.record(rank, record["step"], record["scalars"], record["histogram"])

    # -- checkpoints
    # -----------------------------------------------------------------------------------

    def description(self) -> dict[str, Any]:
        """What a checkpoint must agree with to be continued or evaluated."""
        return describe_model(self.config, self.train_set)

    def _about(self, step: int) -> dict[str, Any]:
        return {
            "samples_seen": step * self.config.train.batch_size * self.config.num_blocks,
            "model": self.description(),
            "config": asdict(self.config),
        }

    def _files(self) -> dict[str, dict[str, Tensor]]:
        """What this rank writes: its block if it is the first replica, the shared modules if it
        owns them."""
        files: dict[str, dict[str, Tensor]] = {}
        topology, sync = self.topology, self.sync
        shared = dict(self.shared.named_parameters())
        private = isinstance(sync, Averaged) or (
            isinstance(sync, Private) and self._is_block_parallel
        )
        if topology.is_leader:
            for owned in self.blocks:
                name = block_file(owned.index)
                parameters = dict(owned.module.named_parameters())
                files[name] = {**parameters, **(_prefixed(shared) if private else {})}
                files[optimizer_file(name)] = optimizer_tensors(owned.optimizer, parameters)
                if private and sync.optimizer is not None:
                    files[optimizer_file(name)] |= optimizer_tensors(
                        sync.optimizer, shared, "shared."
                    )
                if self.ema:
                    files[ema_file(name)] = {k: self.ema.averages[k] for k in files[name]}
        if topology.is_coordinator and isinstance(sync, Averaged):
            files[SHARED] = dict(sync.anchor)
            if sync.outer is not None:
                files[optimizer_file(SHARED)] = optimizer_tensors(sync.outer, sync.anchor)
        elif topology.is_coordinator and not private:
            files[SHARED] = {**shared}
            assert sync.optimizer is not None
            files[optimizer_file(SHARED)] = optimizer_tensors(sync.optimizer, shared)
            if self.ema:
                files[ema_file(SHARED)] = {k: self.ema.averages[f"shared.{k}"] for k in shared}
        return files

    def _restore(self, checkpoint: Checkpoint) -> None:
        checkpoint.check_fits(self.description())
        shared = dict(self.shared.named_parameters())
        sync = self.sync
        if isinstance(sync, Averaged) or not (
            isinstance(sync, Private) and self._is_block_parallel
        ):
            fill(self.shared, checkpoint.tensors(SHARED), checkpoint.path / SHARED)
        if isinstance(sync, Averaged) and self.topology.is_coordinator:
            with torch.no_grad():
                for name, tensor in sync.anchor.items():
                    tensor.copy_(shared[name])
            if sync.outer is not None:
                restore_optimizer(
                    sync.outer, sync.anchor, checkpoint.tensors(optimizer_file(SHARED))
                )
        elif not self._is_private and sync.optimizer is not None:
            restore_optimizer(sync.optimizer, shared, checkpoint.tensors(optimizer_file(SHARED)))
        for owned in self.blocks:
            self._restore_block(checkpoint, owned, shared)
        if self.ema:
            for file in [SHARED] * (not self._is_private) + [
                block_file(o.index) for o in self.blocks
            ]:
                averages = checkpoint.tensors(ema_file(file))
                self.ema.load(_prefixed(averages) if file == SHARED else averages)

    def _restore_block(
        self, checkpoint: Checkpoint, owned: OwnedBlock, shared: dict[str, Any]
    ) -> None:
        name = block_file(owned.index)
        weights, state = checkpoint.tensors(name), checkpoint.tensors(optimizer_file(name))
        own = {k.removeprefix("shared."): t for k, t in weights.items() if k.startswith("shared.")}
        if own and self._is_private:
            fill(self.shared, own, checkpoint.path / name)
            assert self.sync.optimizer is not None
            restore_optimizer(self.sync.optimizer, shared, state, "shared.")
        block = {k: t for k, t in weights.items() if not k.startswith("shared.")}
        fill(owned.module, block, checkpoint.path / name)
        restore_optimizer(owned.optimizer, dict(owned.module.named_parameters()), state)

    # -- set-up
    # ----------------------------------------------------------------------------------------

    @property
    def _is_block_parallel(self) -> bool:
        return self.config.mode == "block_parallel"

    @property
    def _is_private(self) -> bool:
        """Whether each block's copy of the shared modules has values and an optimizer of its
        own."""
        return self._is_block_parallel and not isinstance(self.sync, Coordinated)

    def _owned_indices(self) -> list[int]:
        if self.config.mode == "sequential":
            return list(range(self.config.num_blocks))
        return [] if self.topology.block is None else [self.topology.block]

    def _block_order(self) -> list[list[int]]:
        """The blocks trained in each step: this rank's, or num_blocks random ones in sequential
        mode."""
        if self.config.mode != "sequential":
            return [[0]] * self.max_steps
        num_blocks = self.config.num_blocks
        generator = seeds.generator(self.config.seed, "block")
        return [
            torch.randint(num_blocks, (num_blocks,), generator=generator).tolist()
            for _ in range(self.max_steps)
        ]

    def _turns(self, step: int) -> list[OwnedBlock]:
        return [self.blocks[i] for i in self.order[step]] if self.blocks else []

    def _own(self, index: int, seed: int | None) -> OwnedBlock:
        config, device = self.config, self.topology.device
        module = build.build_block(config, self.sizes, index, seed, device)
        model = build.join(config, self.shared, module)
        objective = build.build_objective(config, model)
        steps_done = self.start_step
        if config.mode == "sequential":
            steps_done = sum(turn.count(index) for turn in self.order[: self.start_step])
        histogram = None
        if self.schedule is not None:
            low, high = self.schedule.block_range(index)
            histogram = SigmaHistogram(index, low, high, device=device)
        return OwnedBlock(
            index=index,
            module=module,
            model=model,
            replicas=Replicas(objective, self.topology),
            optimizer=self._build_optimizer(module),
            steps_done=steps_done,
            batches=BatchStream(
                self.train_set,
                config.train.batch_size,
                config.seed,
                index,
                self.topology.replica,
                self.num_replicas,
                start_step=steps_done,
                num_workers=config.data.num_workers,
                pin_memory=device.type == "cuda",
            ),
            totals=torch.zeros(4, dtype=torch.float64, device=device),
            histogram=histogram,
        )

    def _build_optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        t = self.config.train
        return torch.optim.AdamW(
            module.parameters(), t.lr, t.betas, t.eps, weight_decay=t.weight_decay, fused=True
        )

    def _build_sync(self) -> SharedSync:
        p, topology = self.config.parallel, self.topology
        if not self._is_block_parallel or p.sync == "never":
            return Private(self._build_optimizer(self.shared))
        if p.sync == "step":
            optimizer = self._build_optimizer(self.shared) if topology.is_coordinator else None
            return Coordinated(topology, self.shared, optimizer)
        optimizer = self._build_optimizer(self.shared) if self.blocks else None
        return Averaged(
            topology, self.shared, optimizer, p.sync_every, p.outer_lr, p.outer_momentum
        )

    def _writers(self) -> set[int]:
        """Ranks that write a part of each checkpoint: the coordinator and the first replica of each
        block."""
        layout = self.topology.layout
        return {0, *(layout.rank_of(block, 0) for block in range(layout.num_blocks))}

    def _all_parameters(self) -> dict[str, nn.Parameter]:
        own = {n: p for owned in self.blocks for n, p in owned.module.named_parameters()}
        return {**_prefixed(dict(self.shared.named_parameters())), **own}

    def _zero_grad(self, owned: OwnedBlock) -> None:
        for parameter in (*owned.module.parameters(), *self.shared.parameters()):
            parameter.grad = None

    def _set_training(self, mode: bool) -> None:
        for owned in self.blocks:
            owned.replicas.objective.train(mode)

    def _set_lr(self, progress: float) -> None:
        """Linear warm-up, then constant or half a cosine. progress: steps of each block done
        before."""
        t = self.config.train
        factor = 1.0
        if progress < t.warmup_steps:
            factor = (progress + 1) / (t.warmup_steps + 1)
        elif t.schedule == "cosine":
            last = t.schedule_steps or self.max_steps
            done = (progress - t.warmup_steps) / max(1, last - t.warmup_steps)
            factor = (
                t.min_lr_ratio + (1 - t.min_lr_ratio) * (1 + math.cos(math.pi * min(1.0, done))) / 2
            )
        optimizers = [owned.optimizer for owned in self.blocks]
        for optimizer in (
            optimizers if self.sync.optimizer is None else [*optimizers, self.sync.optimizer]
        ):
            for group in optimizer.param_groups:
                group["lr"] = t.lr * factor

    def _autocast(self) -> AbstractContextManager[Any]:
        is_bf16 = self.config.train.precision == "bf16"
        return (
            torch.autocast(self.topology.device.type, torch.bfloat16) if is_bf16 else nullcontext()
        )


@dataclass(frozen=True)
class _Marks:
    """Readings at the last record."""

    step: int = 0
    moved: int = 0
    wait_s: float = 0.0


def describe_model(config: Config, dataset: ImageDataset) -> dict[str, Any]:
    """Sizes, cut and partition of the model that this configuration trains."""
    schedule = None if config.mode == "end_to_end" else config.noise_schedule()
    sizes = asdict(build.architecture(config, dataset.spec))
    return {
        "mode": "end_to_end" if config.mode == "end_to_end" else "blocks",
        "architecture": {
            k: v for k, v in sizes.items() if k not in ("dropout", "attention_dropout", "init")
        },
        "layers_per_block": [len(layers) for layers in config.layers_of_block],
        "boundaries": schedule.boundaries.tolist() if schedule else None,
        "sigma_data": schedule.sigma_data if schedule else None,
        "data": dataset.spec.name,
    }


def _prefixed(tensors: dict[str, Any]) -> dict[str, Any]:
    return {f"shared.{name}": tensor for name, tensor in tensors.items()}


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
