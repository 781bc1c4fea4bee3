"""The training loop, the same for all modes.

    batch → target → noise → denoise → loss → backward → reduce → step → record

Each rank owns one block (block_parallel), every block (sequential) or the whole model as one block
(end_to_end), and a copy of the shared modules, which `parallel.shared_sync` keeps up to date. All
that is random is a function of (seed, purpose, block, step), so the state of a run is its weights,
optimizers and step.
"""

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from dbdist import log, seeds
from dbdist.build import Setup
from dbdist.checkpoint.manifest import Checkpoint
from dbdist.checkpoint.same_data import data_entry
from dbdist.data.base import Dataset
from dbdist.data.found import identity_of
from dbdist.monitor.levels import levels_of
from dbdist.monitor.monitor import Monitor
from dbdist.parallel.health.stopping import Stop
from dbdist.parallel.topology import Topology
from dbdist.run.folder import place_of
from dbdist.sampling.evaluation import Evaluation, check_test_set, evaluate
from dbdist.tasks.base import Draws, Loss, draws_of_step, to_device
from dbdist.training.due import Due, due_after
from dbdist.training.nonfinite import bad_step
from dbdist.training.rank_state import RankState, own_blocks
from dbdist.training.records import Records, StepResult, Trainee
from dbdist.training.saving import Saving
from dbdist.training.state_files import restore
from dbdist.training.stop import MAX_APART_S, any_fault, save_and_stop
from dbdist.training.trainees import block_order, build_trainees


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
        monitor: Monitor | None = None,
    ) -> None:
        """Builds what this rank trains. Raises ConfigError, CheckpointError or TopologyError.

        checkpoint: where to continue. blocks: to train; None: those of the mode and the
        topology. monitor: on rank 0, if records are kept.
        """
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
        self.stopping = topology.watch.stopping
        self._order = block_order(config, len(self.state.blocks), self.max_steps)
        done = self._order[: self.start_step]
        self.trainees = build_trainees(
            config, topology, self.state.blocks, train_set, self.levels, done
        )
        self.records = Records(
            config, topology, self.state.sync, self.trainees, self.start_step, monitor
        )
        self.saving = Saving(
            config, topology, self.state, self._about, self.start_step, self.records.has
        )
        self.stop: Stop | None = None
        """Why training ended before its last step."""
        self.step = self.start_step
        """Steps done by every block."""
        self._place: tuple[int, int] | None = None
        """Of the run directory, while there is one."""

    def fit(self) -> Evaluation | None:
        """Trains to the last step and evaluates, if all blocks are here.

        Returns None without all blocks, or if it was asked to stop before (`stop` says why); what
        was trained is saved then. Raises Fault where something is wrong, UserError for a mistake.
        """
        if self.topology.is_coordinator:
            is_averaged = self.config.shared == "averaged"
            self.saving.writer.clean(self.start_step if is_averaged else None)
        self.topology.barrier()
        self._place = place_of(Path(self.config.run_dir))
        self.state.set_training(True)
        if self.config.shared == "private":
            self.stopping.max_apart_s = MAX_APART_S
        try:
            evaluation = self._train()
        finally:
            self.close()
        self.records.collect()
        return evaluation

    def _train(self) -> Evaluation | None:
        evaluation = None
        for step in range(self.start_step, self.max_steps):
            self.stop = self.stopping.may_begin(step)
            if self.stop is not None:
                self._save_and_stop(self.stop)
                return None
            log.set_step(step + 1)
            self.train_step(step)
            self.step = step + 1
            evaluation = self._after_step(self.step)
        if self.stop is not None:
            return None
        if evaluation is None and self.config.is_joint:  # there was nothing left to train
            evaluation = self.evaluate(self.start_step)
        self.saving.finish()
        return evaluation

    def train_step(self, step: int) -> None:
        """Takes a step of every block of this rank; of random ones in sequential mode."""
        for turn, block in enumerate(order := self._order[step]):
            self.state.set_lr(step + turn / len(order), self.max_steps)
            self._step_block(self.trainees[block])
        if not self.trainees:
            self.state.set_lr(float(step), self.max_steps)
            self._step_shared_alone(step + 1)

    def evaluate(self, step: int) -> Evaluation:
        """The test set through the chain, with averaged weights if there are any. Collective."""
        self._settle(is_read=True)
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
        self.saving.writer.close()

    # The step

    def _step_block(self, trainee: Trainee) -> None:
        """Takes one optimizer step, in phases that torch's profiler shows."""
        start = time.perf_counter()
        owned, state, parts = trainee.owned, self.state, self.config.train.accumulation_steps
        with self._phase("load"):
            batch = self._next_batch(trainee)
        with self._phase("noise"):
            draws = self._draws(trainee)
            self._seed_dropout(trainee)
        self._settle()
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
            num_updates = sum(other.steps_done for other in self.trainees)
            state.step_shared(trainee.steps_done, num_updates, is_skipped=not is_finite)
        trainee.seconds += time.perf_counter() - start

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """Labels a phase for the profiler, and for the other ranks' watch."""
        topology = self.topology
        waits = name == "sync"
        if topology.layout.num_replicas > 1:
            is_whole = not any(owned.engine.split.weights for owned in self.state.blocks)
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
        shared = self.state.shared_parameters
        bad = bad_step(trainee, done, topology, shared, self.levels, loss, grad_norm)
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
        self.saving.refusal = "its numbers are wrong"
        row = f" in {limit + 1} steps in a row (train.max_skipped)" if policy == "skip" else ""
        self.stopping.ask(
            f"{text}{row}; see {report}; continue with --train.nonfinite skip, or start again with "
            "a lower train.lr",
            is_fault=True,
        )

    def _step_shared_alone(self, steps_done: int) -> None:
        self._settle()
        with self._phase("sync"):
            self.state.sync.begin()
            self.state.step_shared(steps_done, steps_done)

    def _settle(self, *, is_read: bool = False) -> None:
        """Waits for what the last step has left on its way.

        is_read: weights and buffers are about to be saved, scored or compared; then collective.
        """
        with self._phase("sync"):
            self.state.settle()
            if is_read:
                self.state.share_buffers()

    def _next_batch(self, trainee: Trainee) -> dict[str, Tensor]:
        return to_device(next(trainee.batches), self.topology.device, self.state.dtype)

    def _draws(self, trainee: Trainee) -> Draws:
        """This replica's rows of what the block's step draws."""
        num_samples = self.config.train.batch_size
        draws = draws_of_step(
            self.setup.task,
            self.setup.process,
            condition_dropout=0.0 if self.config.is_plain else self.config.task.condition_dropout,
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

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.config.train.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.topology.device.type, torch.bfloat16)

    # Between steps

    def _after_step(self, step: int) -> Evaluation | None:
        due = due_after(step, self.max_steps, self.config)
        if due.record:
            self._check_folder()
        if due.check or due.save or step == self.max_steps:
            self._settle(is_read=True)
        if due.check:
            self._compare_weights(step)
        if step == self.max_steps:
            return self._finish_run(step, due)
        scalars = self.records.measure(step) if due.record else {}
        if due.save:
            self.saving.save(step)
        else:
            self.saving.writer.poll()
        return self._evaluate_and_record(step, due, scalars)

    def _finish_run(self, step: int, due: Due) -> Evaluation | None:
        """What comes after the last step; None if it ends in a stop all the same."""
        if self.config.has_copies:  # each saves its own block, and waits for nobody before
            scalars = self.records.measure(step)
            self.saving.save(step)
            self.topology.watch.at("waiting for the others", waits=True)
            self.stop = self.stopping.wait_for_all()
            if self.stop is not None:
                self.records.post(step, scalars, with_histograms=True)
                self._save_and_stop(self.stop)
                return None
            self._stop_for_any_fault()
        else:
            self._stop_for_any_fault()
            scalars = self.records.measure(step)
            self.saving.save(step)
        return self._evaluate_and_record(step, due, scalars)

    def _evaluate_and_record(
        self, step: int, due: Due, scalars: dict[str, float]
    ) -> Evaluation | None:
        try:
            evaluation = self.evaluate(step) if due.evaluate else None
            scalars |= self.records.of_evaluation(step, evaluation)
        except Exception:  # what was trained is no worse for it: without a record it was lost
            with suppress(RuntimeError):  # the store is gone too
                self._record(step, scalars, due)
            raise
        self.topology.watch.at("recording")
        self._record(step, scalars, due)
        return evaluation

    def _record(self, step: int, scalars: dict[str, float], due: Due) -> None:
        if due.record:
            is_last = step == self.max_steps
            self.records.post(step, scalars, with_histograms=due.evaluate or is_last)

    def _stop_for_any_fault(self) -> None:
        """At the end, where no rank asks any more whether to go on. Collective."""
        if fault := any_fault(self.topology):
            self._save_and_stop(fault)

    def _save_and_stop(self, stop: Stop) -> None:
        """Saves what may be saved. Raises Fault if something is wrong."""
        save_and_stop(stop, self.step, self.topology, self.saving, self._save_and_record)

    def _save_and_record(self, step: int) -> None:
        """Saves a step that all ranks stop after."""
        self._settle(is_read=True)
        scalars = self.records.measure(step)
        self.saving.save(step)
        self.records.post(step, scalars, with_histograms=False)

    def _check_folder(self) -> None:
        """Stops the run where its folder was removed or replaced: it would be lost at the end."""
        run_dir = Path(self.config.run_dir)
        if self._place is not None and place_of(run_dir) != self._place:
            self.saving.refusal = "its run directory is gone"
            self.stopping.ask(
                f"{run_dir} was removed or replaced while it was trained", is_fault=True
            )

    def _compare_weights(self, step: int) -> None:
        """Stops the run where ranks no longer have the same weights."""
        if difference := self.state.find_drift():
            self.saving.refusal = "its numbers are wrong"
            self.stopping.ask(
                f"step {step}: weights that must be alike are not: {difference}; continue from a "
                "checkpoint before this step",
                is_fault=True,
            )

    @cached_property
    def _identity(self) -> dict[str, Any]:
        """What tells the data from other data."""
        return identity_of(self.train_set, self.test_set)

    def _about(self, step: int) -> dict[str, Any]:
        """What a checkpoint's manifest and parts say beside their files."""
        return {
            "samples_seen": step * self.config.train.batch_size * self.config.num_blocks,
            "seed": self.config.seed,
            "data": data_entry(self._identity),
            "model": self.setup.describe(),
            "config": asdict(self.config),
        }
