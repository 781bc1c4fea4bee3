"""The training loop, the same for all modes:
batch → target → noise → denoise → loss → backward → reduce → step → record.

Each rank owns one block (block_parallel), every block (sequential) or the whole model as one block
(end_to_end), and a copy of the shared modules, which `parallel.coordinator` keeps up to date. All
that is random is a function of (seed, purpose, block, step), so the state of a run is its weights,
optimizers and step.
"""

import math
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from dbdist import seeds
from dbdist.checkpoint import Checkpoint
from dbdist.checkpoint_writer import CheckpointWriter
from dbdist.config import Config
from dbdist.data import BatchStream, ImageDataset
from dbdist.errors import ConfigError, TopologyError, UserError
from dbdist.evaluation import Evaluation, check_test_set, evaluate
from dbdist.histogram import SigmaHistogram
from dbdist.monitor import Monitor, peak_memory_mb
from dbdist.parallel.mailbox import Mailbox
from dbdist.parallel.topology import Layout, Topology
from dbdist.rank_state import OwnedBlock, RankState, describe_model
from dbdist.tasks.classification import Draws, Loss, sample_draws


@dataclass
class Trainee:
    """A block in training: where it is in its data, and what is not yet recorded."""

    owned: OwnedBlock
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
        num_blocks = len(config.trained_blocks or range(config.num_blocks))
        return Layout(num_blocks, config.parallel.replicas, config.parallel.coordinator)
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
        blocks: list[int] | None = None,
    ) -> None:
        """checkpoint: where to continue. blocks: to train; None: those of the mode and the
        topology. Raises ConfigError, CheckpointError or TopologyError."""
        self.config, self.topology = config, topology
        self.train_set, self.test_set = train_set, test_set
        check_test_set(config, test_set)
        self.schedule = None if config.mode == "end_to_end" else config.noise_schedule()
        self.max_steps = config.max_steps(len(train_set))
        self.start_step = checkpoint.step if checkpoint else 0
        if blocks is None:
            named = config.trained_blocks or range(config.num_blocks)
            blocks = [] if topology.block is None else [named[topology.block]]
            blocks = list(range(config.num_blocks)) if config.mode == "sequential" else blocks
        is_empty = checkpoint is not None
        self.state = RankState(config, topology, train_set.spec, blocks, is_empty=is_empty)
        if checkpoint is not None:
            with topology.agree("reading the checkpoint"):
                self.state.restore(checkpoint)
        self._order = self._block_order()
        self.trainees = [self._trainee(owned) for owned in self.state.blocks]
        self.writer = CheckpointWriter(
            Path(config.run_dir),
            topology,
            self._writers(),
            config.checkpoint.keep_last,
            self._own_part(),
            config.trained_blocks,
        )
        self.monitor: Monitor | None = None
        self._mailbox = Mailbox(topology, "metrics")
        self._marks = _Marks(step=self.start_step)

    def fit(self, monitor: Monitor | None) -> Evaluation | None:
        """Trains to the last step and evaluates, if all blocks are here. monitor: on rank 0."""
        self.monitor = monitor
        if monitor is not None:
            self.writer.warn = monitor.warn
        if self.topology.is_coordinator:
            self.writer.clean()
        self.topology.barrier()
        self.state.set_training(True)
        evaluation = None
        try:
            for step in range(self.start_step, self.max_steps):
                self.train_step(step)
                evaluation = self._after_step(step + 1)
            if evaluation is None and self.has_all_blocks:  # there was nothing left to train
                evaluation = self.evaluate(self.start_step)
            with self.topology.agree():
                self.writer.finish(self.config.parallel.timeout_s)
        finally:
            self.close()
        self._collect()
        return evaluation

    def train_step(self, step: int) -> None:
        """One step of every block: of this rank's, or in sequential mode of num_blocks random ones.
        A dedicated coordinator has none; it only reduces, steps and broadcasts."""
        for turn, block in enumerate(order := self._order[step]):
            self._set_lr(step + turn / len(order))
            self._step_block(self.trainees[block])
        if not self.trainees:
            self._set_lr(float(step))
            self._step_shared_alone(step + 1)

    def evaluate(self, step: int) -> Evaluation:
        """The test set through the chain, with averaged weights if there are any. Collective."""
        models = {owned.index: owned.model for owned in self.state.blocks}
        ema = self.state.ema
        with ema.swapped() if ema else nullcontext():
            self.state.set_training(False)
            evaluation = evaluate(
                self.config, self.topology, self.test_set, models.__getitem__, step
            )
            self.state.set_training(True)
        return evaluation

    def close(self) -> None:
        """Ends the workers that load data, and what is still being saved."""
        for trainee in self.trainees:
            trainee.batches.close()
        self.writer.close()

    # The step

    def _step_block(self, trainee: Trainee) -> None:
        """One optimizer step. The labelled phases show in torch's profiler and
        `dbdist.bench.step`."""
        start = time.perf_counter()
        owned, state, parts = trainee.owned, self.state, self.config.train.accumulation_steps
        with record_function("dbdist::load"):
            images, labels_N = self._next_batch(trainee)
        with record_function("dbdist::noise"):
            draws = self._draws(trainee)
            self._seed_dropout(trainee)
        state.zero_gradients(owned)
        size = len(labels_N) // parts
        for first in range(0, len(labels_N), size):
            rows = slice(first, first + size)
            part = draws and draws.part(first, first + size)
            with owned.engine.accumulate(is_last=first + size == len(labels_N)):
                with record_function("dbdist::forward"), self._autocast():
                    inputs = (images[rows], labels_N[rows], *((part,) if part else ()))
                    loss: Loss = owned.objective(*inputs)
                with record_function("dbdist::backward"):
                    owned.engine.backward(loss.value / parts)
            self._note(trainee, loss, part)
        with record_function("dbdist::optimizer"):
            norm, scale = state.clip_gradients(owned)
        with record_function("dbdist::sync"):
            state.sync.begin()
        with record_function("dbdist::optimizer"):
            owned.engine.step(scale)
            trainee.steps_done += 1
        with record_function("dbdist::sync"):
            state.sync.finish(trainee.steps_done)
        if state.ema:
            state.ema.update()
        trainee.totals[2] += norm.detach()
        trainee.totals[3] += 1
        trainee.seconds += time.perf_counter() - start

    def _step_shared_alone(self, steps_done: int) -> None:
        self.state.sync.begin()
        self.state.sync.finish(steps_done)
        if self.state.ema:
            self.state.ema.update()

    def _next_batch(self, trainee: Trainee) -> tuple[Tensor, Tensor]:
        images, labels_N = next(trainee.batches)
        device, dtype = self.topology.device, self.state.shared.positions.dtype
        return images.to(device, dtype, non_blocking=True), labels_N.to(device, non_blocking=True)

    def _draws(self, trainee: Trainee) -> Draws | None:
        """This replica's part of what the block's step draws; None without noise."""
        if self.schedule is None:
            return None
        num_samples = self.config.train.batch_size
        draws = sample_draws(
            self.config.task,
            self.schedule,
            seed=self.config.seed,
            block=trainee.owned.index,
            step=trainee.steps_done,
            num_samples=num_samples,
            hidden_size=self.config.model.hidden_size,
        )
        size = num_samples // self.topology.layout.num_replicas
        first = self.topology.replica * size
        return draws.part(first, first + size).to(self.topology.device)

    def _seed_dropout(self, trainee: Trainee) -> None:
        """Makes the step's dropout a function of its name alone."""
        m = self.config.model
        if m.dropout > 0 or m.attention_dropout > 0:
            place = trainee.owned.index, self.topology.replica, trainee.steps_done
            torch.manual_seed(seeds.at(self.config.seed, "dropout", *place))

    def _set_lr(self, progress: float) -> None:
        self.state.set_lr(progress, self.max_steps)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.config.train.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.topology.device.type, torch.bfloat16)

    # Between steps

    def _after_step(self, step: int) -> Evaluation | None:
        """What is due after a step of every block: checkpoint, evaluation, record."""
        config, is_last = self.config, step == self.max_steps
        is_eval = self.has_all_blocks and (is_last or _is_due(step, config.eval.every_steps))
        is_save = is_last or _is_due(step, config.checkpoint.every_steps)
        is_log = is_eval or is_save or _is_due(step, config.train.log_every) or step == 1
        scalars = self._measure(step) if is_log else {}
        if is_save:
            self.writer.save(step, self.state.files(), self._about(step))
        else:
            self.writer.poll()
        evaluation = self.evaluate(step) if is_eval else None
        if evaluation is not None and self.topology.is_coordinator:
            scalars |= evaluation.scalars()
        if is_log:
            self._post(step, scalars, with_histograms=is_eval or is_last)
            self._collect()
        return evaluation

    def _note(self, trainee: Trainee, loss: Loss, draws: Draws | None) -> None:
        share = 1 / self.config.train.accumulation_steps
        trainee.totals[0] += loss.value.detach() * share
        trainee.totals[1] += loss.cross_entropy_N.mean() * share
        if trainee.histogram is not None and draws is not None:
            trainee.histogram.add(draws.sigma_N, loss.cross_entropy_N)

    def _measure(self, step: int) -> dict[str, float]:
        """This rank's scalars since the last record. Collective among the replicas of a block."""
        rank, marks, meter = self.topology.rank, self._marks, self.topology.meter
        scalars: dict[str, float] = {}
        for trainee in self.trainees:
            scalars |= self._measure_block(trainee, step)
        num_steps = max(1, step - marks.step)
        moved, waited = meter.training_bytes(), self.state.sync.wait_s
        self._marks = _Marks(step, moved, waited)
        return scalars | {
            f"perf/sync_wait_ms/rank{rank}": 1e3 * (waited - marks.wait_s) / num_steps,
            f"memory/peak_mb/rank{rank}": peak_memory_mb(self.topology.device),
            f"comm/bytes_per_step/rank{rank}": (moved - marks.moved) / num_steps,
        }

    def _measure_block(self, trainee: Trainee, step: int) -> dict[str, float]:
        topology, block = self.topology, trainee.owned.index
        start = time.perf_counter()
        totals = trainee.totals.clone()
        if topology.replica_group is not None:
            totals = totals.to(topology.wire_device)
            dist.all_reduce(totals, group=topology.replica_group)
            topology.meter.sent["metrics"] += totals.nbytes
            topology.meter.received["metrics"] += totals.nbytes
            totals /= topology.layout.num_replicas
        loss, cross_entropy, norm, num_steps = totals.tolist()  # waits for a GPU's queued steps
        seconds = trainee.seconds + time.perf_counter() - start
        trainee.totals.zero_()
        trainee.seconds = 0.0
        if not math.isfinite(loss + norm):
            raise UserError(
                f"rank {topology.rank}, block {block}, step {step}: since the last record the mean "
                f"loss is {loss / num_steps} and the gradient norm {norm / num_steps}; lower "
                "train.lr or set train.clip_norm, and continue from the last checkpoint"
            )
        if num_steps == 0 or topology.replica > 0:
            return {}
        samples = self.config.train.batch_size * num_steps
        return {
            f"train/loss/block{block}": loss / num_steps,
            f"train/cross_entropy/block{block}": cross_entropy / num_steps,
            f"train/grad_norm/block{block}": norm / num_steps,
            f"train/lr/block{block}": trainee.owned.engine.optimizer.param_groups[0]["lr"],
            f"perf/step_ms/block{block}": 1e3 * seconds / num_steps,
            f"perf/samples_per_s/block{block}": samples / seconds,
        }

    def _post(self, step: int, scalars: dict[str, float], with_histograms: bool) -> None:
        """Leaves a record for rank 0."""
        histograms = [t.histogram for t in self.trainees if t.histogram and with_histograms]
        for histogram in histograms or [None]:
            content = histogram.to_dict() if histogram else None
            self._mailbox.post({"step": step, "scalars": scalars, "histogram": content})
            scalars = {}
            if histogram:
                histogram.reset()

    def _collect(self) -> None:
        """On rank 0: hands the records that have arrived to the monitor."""
        if not self.topology.is_coordinator:
            return
        for rank, record in self._mailbox.collect():
            if self.monitor is not None:
                self.monitor.record(rank, record["step"], record["scalars"], record["histogram"])

    def _about(self, step: int) -> dict[str, Any]:
        """What a checkpoint's manifest and parts say beside their files."""
        spec = self.train_set.spec
        return {
            "samples_seen": step * self.config.train.batch_size * self.config.num_blocks,
            "seed": self.config.seed,
            "data": {"name": spec.name, "class_names": spec.class_names},
            "model": describe_model(self.config, spec),
            "config": asdict(self.config),
        }

    # Set-up

    @property
    def has_all_blocks(self) -> bool:
        """Whether this run has the whole model, or some of its blocks by themselves."""
        return self.config.trained_blocks is None

    def _own_part(self) -> int | None:
        """The block whose part of each checkpoint this rank writes: its own, if that needs nothing
        of other ranks."""
        is_private = self.config.mode == "block_parallel" and self.config.parallel.sync != "step"
        return self.state.blocks[0].index if is_private and self.topology.is_leader else None

    def _trainee(self, owned: OwnedBlock) -> Trainee:
        config, device, block = self.config, self.topology.device, owned.index
        steps_done = self.start_step
        if config.mode == "sequential":
            steps_done = sum(turns.count(block) for turns in self._order[: self.start_step])
        histogram = None
        if self.schedule is not None:
            low, high = self.schedule.block_range(block)
            histogram = SigmaHistogram(block, low, high, device=device)
        batches = BatchStream(
            self.train_set,
            config.train.batch_size,
            config.seed,
            block,
            self.topology.replica,
            self.topology.layout.num_replicas,
            start_step=steps_done,
            num_workers=config.data.num_workers,
            pin_memory=device.type == "cuda",
        )
        totals = torch.zeros(4, dtype=torch.float64, device=device)
        return Trainee(owned, steps_done, batches, totals, histogram)

    def _block_order(self) -> list[list[int]]:
        """The blocks trained in each step: this rank's, or num_blocks random ones in sequential
        mode."""
        if self.config.mode != "sequential":
            return [list(range(len(self.state.blocks)))] * self.max_steps
        num_blocks = self.config.num_blocks
        generator = seeds.generator(self.config.seed, "block")
        return [
            torch.randint(num_blocks, (num_blocks,), generator=generator).tolist()
            for _ in range(self.max_steps)
        ]

    def _writers(self) -> set[int]:
        """Ranks that write a part of each checkpoint: the coordinator and each block's leader."""
        layout = self.topology.layout
        return {0, *(layout.rank_of(block, 0) for block in range(layout.num_blocks))}


@dataclass(frozen=True)
class _Marks:
    """Readings at the last record."""

    step: int
    moved: int = 0
    wait_s: float = 0.0


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
