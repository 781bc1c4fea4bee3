"""The training loop, the same for all modes:
batch → target → noise → denoise → loss → backward → reduce → step → record.

Each rank owns one block (block_parallel), every block (sequential) or the whole model as one block
(end_to_end), and a copy of the shared modules, which `parallel.coordinator` keeps up to date. All
that is random is a function of (seed, purpose, block, step), so the state of a run is its weights,
optimizers and step.
"""

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from dbdist import seeds
from dbdist.build import Setup
from dbdist.checkpoint.manifest import Checkpoint
from dbdist.checkpoint.names import PREFIX
from dbdist.checkpoint.writer import CheckpointWriter
from dbdist.data.base import Dataset
from dbdist.data.loader import BatchStream
from dbdist.errors import CheckpointError, Fault
from dbdist.monitor.histogram import LevelHistogram
from dbdist.monitor.levels import levels_of
from dbdist.monitor.monitor import Monitor
from dbdist.parallel.health.stopping import GONE, Stop
from dbdist.parallel.topology import Topology
from dbdist.sampling.evaluation import Evaluation, check_test_set, evaluate
from dbdist.tasks.base import Draws, Loss, draws_of_step, to_device
from dbdist.training.numerics import BadStep, norms_of
from dbdist.training.rank_state import OwnedBlock, RankState, own_blocks
from dbdist.training.records import Records, StepResult, Trainee
from dbdist.training.state_files import files_of, restore

MAX_APART_S = 15.0
"""Blocks that never wait for each other stop after a common step if all can come to it in this
time. Launchers kill a rank 30 s after its SIGTERM."""


class Trainer:
    """Trains what this rank owns. Building one is collective; so are `fit` and `evaluate`."""

    def __init__(
        self,
        setup: Setup,
        topology: Topology,
        train_set: Dataset,
        test_set: Dataset,
        checkpoint: Checkpoint | None = None,
        blocks: list[int] | None = None,
    ) -> None:
        """checkpoint: where to continue. blocks: to train; None: those of the mode and the
        topology. Raises ConfigError, CheckpointError or TopologyError."""
        config = setup.config
        self.setup, self.config, self.topology = setup, config, topology
        self.train_set, self.test_set = train_set, test_set
        check_test_set(config, test_set)
        self.levels = levels_of(setup.process.partition)
        self.max_steps = config.max_steps(len(train_set))
        self.start_step = checkpoint.step if checkpoint else 0
        blocks = own_blocks(config, topology) if blocks is None else blocks
        is_empty = checkpoint is not None
        self.state = RankState(config, topology, setup, blocks, is_empty=is_empty)
        if checkpoint is not None:
            with topology.agree("reading the checkpoint"):
                restore(self.state, checkpoint)
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
        self.stop: Stop | None = None
        """Why training ended before its last step."""
        self.step = self.start_step
        """Steps done by every block."""
        self._is_sound = True
        """Whether this rank's state may be saved."""
        self.records = Records(config, topology, self.state.sync, self.trainees, self.start_step)

    def fit(self, monitor: Monitor | None) -> Evaluation | None:
        """Trains to the last step and evaluates, if all blocks are here. monitor: on rank 0.

        Returns None without all blocks, or if it was asked to stop before (`stop` says why); what
        was trained is saved then. Raises Fault where something is wrong, UserError for a mistake.
        """
        self.records.monitor = monitor
        if monitor is not None:
            self.writer.warn = monitor.warn
            self.writer.is_recorded = self.records.has
        if self.topology.is_coordinator:
            is_averaged = self.config.shared == "averaged"
            self.writer.clean(self.start_step if is_averaged else None)
        self.topology.barrier()
        self.state.set_training(True)
        evaluation, stopping = None, self.topology.watch.stopping
        if self.config.shared == "private":
            stopping.max_apart_s = MAX_APART_S
        try:
            for step in range(self.start_step, self.max_steps):
                self.stop = stopping.may_begin(step)
                if self.stop is not None:
                    self._save_and_stop(self.stop)
                    break
                self.train_step(step)
                self.step = step + 1
                evaluation = self._after_step(self.step)
            if self.stop is None:
                if evaluation is None and self.config.is_joint:  # there was nothing left to train
                    evaluation = self.evaluate(self.start_step)
                self._finish_saving()
        finally:
            self.close()
        self.records.collect()
        return evaluation if self.stop is None else None

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
                self.setup, self.topology, self.test_set, models.__getitem__, step
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
        with self._phase("load"):
            batch = self._next_batch(trainee)
        with self._phase("noise"):
            draws = self._draws(trainee)
            self._seed_dropout(trainee)
        state.zero_gradients(owned)
        num_samples = len(next(iter(batch.values())))
        size = num_samples // parts
        done = StepResult(torch.zeros((), dtype=torch.float64, device=self.topology.device), [], [])
        for first in range(0, num_samples, size):
            last = first + size
            rows = {name: value[first:last] for name, value in batch.items()}
            drawn = draws.rows(first, last)
            with owned.engine.accumulate(is_last=last == num_samples):
                with self._phase("forward"), self._autocast():
                    loss: Loss = owned.objective(rows, drawn)
                with self._phase("backward"):
                    owned.engine.backward(loss.value / parts)
            done.loss += loss.value.detach() / parts
            done.per_sample.append(loss.per_sample)
            done.level_N += [] if drawn.level_N is None else [drawn.level_N]
        with self._phase("optimizer"):
            norm, scale = state.clip_gradients(owned, done.loss)
            loss_value, norm_value = torch.stack([done.loss, norm.to(done.loss)]).tolist()
            is_finite = math.isfinite(norm_value)  # the same on all replicas
            if not is_finite:
                self._handle_nonfinite(trainee, done, loss_value, norm_value)
        with self._phase("sync"):
            state.sync.begin()
        with self._phase("optimizer"):
            if is_finite:
                owned.engine.step(scale)
                self.records.note(trainee, done, loss_value, norm_value)
            trainee.steps_done += 1
        with self._phase("sync"):
            state.sync.finish(trainee.steps_done, is_skipped=not is_finite)
        if state.ema:
            state.ema.update()
        trainee.seconds += time.perf_counter() - start

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """Labels a phase for the profiler, and for the other ranks' watch."""
        topology = self.topology
        waits = name == "sync"
        if topology.layout.num_replicas > 1:
            is_whole = all(owned.engine.is_whole for owned in self.state.blocks)
            waits |= name in ("backward", "optimizer") or (name == "forward" and not is_whole)
        if topology.uses_nccl:  # a wait is queued, and shows where the host next asks for a number
            waits |= name != "load"
        topology.watch.at(name, waits)
        with record_function(f"dbdist::{name}"):
            yield

    def _handle_nonfinite(
        self, trainee: Trainee, done: StepResult, loss: float, grad_norm: float
    ) -> None:
        """Leaves the gradients out of this step, reports it, and stops all ranks if so wanted."""
        owned, topology, policy = trainee.owned, self.topology, self.config.train.nonfinite
        gradients = {n: p.grad for n, p in owned.parameters.items() if p.grad is not None}
        shared = {n: p.grad for n, p in self.state.shared_parameters.items() if p.grad is not None}
        bad = BadStep(
            step=trainee.steps_done + 1,
            block=owned.index,
            rank=topology.rank,
            replica=topology.replica,
            loss=loss,
            grad_norm=grad_norm,
            indices=trainee.batches.indices_of_step(trainee.steps_done),
            per_sample={**done.values(), **self._levels_of(done)},
            grad_norms=norms_of(gradients) | norms_of({PREFIX + n: g for n, g in shared.items()}),
            lr=owned.engine.optimizer.param_groups[0]["lr"],
        )
        try:
            report = str(bad.write(Path(self.config.run_dir)))
        except OSError as error:
            report = f"no report ({error.strerror})"
        self.state.drop_gradients(owned)
        trainee.num_skipped += 1
        trainee.skipped_in_a_row += 1
        limit = self.config.train.max_skipped
        text = f"rank {topology.rank}, block {bad.block}, step {bad.step}: {bad}"
        if policy == "skip" and trainee.skipped_in_a_row <= limit:
            self.records.warn(f"{text}; the step is skipped, see {report}")
            return
        self._is_sound = False
        row = f" in {limit + 1} steps in a row (train.max_skipped)" if policy == "skip" else ""
        topology.watch.stopping.ask(
            f"{text}{row}; see {report}; continue with --train.nonfinite skip, or start again with "
            "a lower train.lr",
            is_fault=True,
        )

    def _levels_of(self, done: StepResult) -> dict[str, Tensor]:
        """The samples' levels by what the process calls them; empty without levels."""
        return {self.levels.name: torch.cat(done.level_N)} if self.levels else {}

    def _step_shared_alone(self, steps_done: int) -> None:
        self.topology.watch.at("sync", waits=True)
        self.state.sync.begin()
        self.state.sync.finish(steps_done)
        if self.state.ema:
            self.state.ema.update()

    def _next_batch(self, trainee: Trainee) -> dict[str, Tensor]:
        return to_device(next(trainee.batches), self.topology.device, self.state.dtype)

    def _draws(self, trainee: Trainee) -> Draws:
        """This replica's rows of what the block's step draws."""
        num_samples = self.config.train.batch_size
        draws = draws_of_step(
            self.setup.task,
            self.setup.process,
            condition_dropout=self.config.task.condition_dropout,
            seed=self.config.seed,
            block=trainee.owned.index,
            step=trainee.steps_done,
            num_samples=num_samples,
        )
        size = num_samples // self.topology.layout.num_replicas
        first = self.topology.replica * size
        return draws.rows(first, first + size).to(self.topology.device)

    def _seed_dropout(self, trainee: Trainee) -> None:
        """Makes what the step's modules draw, such as dropout, a function of its name alone."""
        place = trainee.owned.index, self.topology.replica, trainee.steps_done
        torch.manual_seed(seeds.at(self.config.seed, "dropout", *place))

    def _set_lr(self, progress: float) -> None:
        self.state.set_lr(progress, self.max_steps)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.config.train.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.topology.device.type, torch.bfloat16)

    # Between steps

    def _save(self, step: int) -> None:
        refusal = None if self._is_sound else "its numbers are wrong"
        self.writer.save(step, files_of(self.state), self._about(step), refusal=refusal)

    def _stop_for_any_fault(self) -> None:
        """At the end, where no rank asks any more whether to go on. Collective."""
        if fault := self._any_fault():
            self._save_and_stop(fault)

    def _any_fault(self) -> Stop | None:
        """What the first of the ranks has found wrong. Collective."""
        self.topology.watch.at("waiting for the others", waits=True)
        faults = self.topology.gather(self.topology.watch.stopping.own_fault)
        return next((fault for fault in faults if isinstance(fault, Stop)), None)

    def _save_and_stop(self, stop: Stop) -> None:
        """Saves what may be saved. Raises Fault if something is wrong."""
        if stop.last_step is not None and not stop.is_fault:
            stop = self._any_fault() or stop
        is_new = self.step > self.start_step and self.step != self.writer.last_step
        told = ""
        if not stop.is_fault and stop.last_step is not None:
            if is_new:
                self._after_step(self.step, is_stop=True)
            self._finish_saving()
        elif is_new and self._is_sound and self._has_own_part():
            told = self._save_alone(stop)
        elif not stop.is_fault and stop.apart != GONE:
            self.writer.stay_alone()
            self.writer.finish(self.config.parallel.timeout_s)
        if stop.is_fault:
            raise Fault(stop.reason + told)
        if stop.last_step is None and stop.apart == GONE:
            raise Fault(f"{stop.reason}, but {GONE}{told or '; nothing new is saved'}")

    def _save_alone(self, stop: Stop) -> str:
        """Saves this rank's block without the others; what to say of it. Raises CheckpointError
        where there is nothing worse to tell."""
        self.topology.watch.at("saving")
        self.writer.save(self.step, files_of(self.state), self._about(self.step), is_alone=True)
        try:
            self.writer.finish(self.config.parallel.timeout_s)
        except CheckpointError as error:
            if not stop.is_fault and stop.apart != GONE:
                raise
            return f"; {error}"
        return f"; blocks {own_blocks(self.config, self.topology)} saved step {self.step}"

    def _finish_saving(self) -> None:
        with self.topology.agree():
            self.topology.watch.at("completing the checkpoint", waits=True)
            self.writer.finish(self.config.parallel.timeout_s)

    def _after_step(self, step: int, is_stop: bool = False) -> Evaluation | None:
        """What is due after a step of every block: checkpoint, evaluation, record. is_stop: all is
        done but the checkpoint."""
        config, is_last = self.config, step == self.max_steps
        is_eval = is_last or _is_due(step, config.eval.every_steps)
        is_eval = is_eval and config.is_joint and not is_stop
        is_save = is_last or _is_due(step, config.checkpoint.every_steps) or is_stop
        is_log = is_eval or is_save or _is_due(step, config.train.log_every) or step == 1
        if _is_due(step, config.parallel.check_every) and not is_stop:
            self._compare_weights(step)
        if is_last and not config.has_copies:
            self._stop_for_any_fault()
        scalars = self.records.measure(step) if is_log else {}
        if is_save:
            self.topology.watch.at("saving")
            self._save(step)
        else:
            self.writer.poll()
        if is_last and config.has_copies:  # each has saved its own, and waited for nobody
            self.topology.watch.at("waiting for the others", waits=True)
            self.stop = self.topology.watch.stopping.wait_for_all()
            if self.stop is not None:
                self.records.post(step, scalars, with_histograms=True)
                self._save_and_stop(self.stop)
                return None
            self._stop_for_any_fault()
        evaluation = self.evaluate(step) if is_eval else None
        if evaluation is not None and self.topology.is_coordinator:
            scalars |= evaluation.scalars()
        if is_log:
            self.topology.watch.at("recording")
            self.records.post(step, scalars, with_histograms=is_eval or is_last)
            self.records.collect()
        return evaluation

    def _compare_weights(self, step: int) -> None:
        """Stops the run where ranks no longer have the same weights."""
        if difference := self.state.find_drift():
            self._is_sound = False
            self.topology.watch.stopping.ask(
                f"step {step}: weights that must be alike are not: {difference}; continue from a "
                "checkpoint before this step",
                is_fault=True,
            )

    def _about(self, step: int) -> dict[str, Any]:
        """What a checkpoint's manifest and parts say beside their files."""
        spec = self.train_set.spec
        return {
            "samples_seen": step * self.config.train.batch_size * self.config.num_blocks,
            "seed": self.config.seed,
            "data": {
                "name": spec.name,
                "class_names": getattr(spec, "class_names", None),
                "spec": spec.identity(),
            },
            "model": self.setup.describe(),
            "config": asdict(self.config),
        }

    # Set-up

    def _own_part(self) -> int | None:
        """The block whose part of each checkpoint this rank writes: its own, if that needs nothing
        of other ranks."""
        is_writer = self._has_own_part() and self.topology.is_leader
        return self.state.blocks[0].index if is_writer else None

    def _has_own_part(self) -> bool:
        """Whether this rank can save its block without the other ranks."""
        return self.config.has_copies and bool(self.state.blocks)

    def _trainee(self, owned: OwnedBlock) -> Trainee:
        config, device, block = self.config, self.topology.device, owned.index
        steps_done = self.start_step
        if config.mode == "sequential":
            steps_done = sum(turns.count(block) for turns in self._order[: self.start_step])
        histogram = None
        if self.levels is not None:
            histogram = LevelHistogram.of(self.levels, block, device)
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
        return Trainee(owned, steps_done, batches, histogram)

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


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
