"""What a run records on the way: sums over the steps since the last record, brought to rank 0.

The trainer adds steps; on rank 0 the records of all ranks arrive at the monitor.
"""

import time
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from dbdist.config.config import Config
from dbdist.data import BatchStream
from dbdist.monitor.histogram import SigmaHistogram
from dbdist.monitor.monitor import Monitor
from dbdist.monitor.ownership import peak_memory_mb
from dbdist.parallel.mailbox import Mailbox
from dbdist.parallel.shared_sync import SharedSync
from dbdist.parallel.topology import Topology
from dbdist.training.numerics import LossSpikes
from dbdist.training.rank_state import OwnedBlock


@dataclass
class Trainee:
    """A block in training: where it is in its data, and what is not yet recorded."""

    owned: OwnedBlock
    steps_done: int
    batches: BatchStream
    totals: Tensor
    """Sums of loss, cross-entropy, gradient norm and steps since the last record, on the device,
    without the steps that were skipped."""
    histogram: SigmaHistogram | None
    seconds: float = 0.0
    num_skipped: int = 0
    """Steps skipped since the last record."""
    skipped_in_a_row: int = 0
    spikes: LossSpikes = field(default_factory=LossSpikes)


@dataclass
class StepResult:
    """What one step of a block has come to, over the parts of its batch."""

    loss: Tensor
    cross_entropy_N: list[Tensor]
    sigma_N: list[Tensor]


@dataclass(frozen=True)
class _Marks:
    """Readings at the last record."""

    step: int
    moved: int = 0
    wait_s: float = 0.0


class Records:
    """This rank's records, and on rank 0 everybody's."""

    def __init__(
        self,
        config: Config,
        topology: Topology,
        sync: SharedSync,
        trainees: list[Trainee],
        start_step: int,
    ) -> None:
        self.config, self.topology, self.sync, self.trainees = config, topology, sync, trainees
        self.monitor: Monitor | None = None
        """On rank 0, once training begins."""
        self._mailbox = Mailbox(topology, "metrics")
        self._marks = _Marks(step=start_step)

    def note(self, trainee: Trainee, done: StepResult, loss: float, grad_norm: float) -> None:
        """Adds a finite step to what the next record says."""
        trainee.skipped_in_a_row = 0
        cross_entropy_N = torch.cat(done.cross_entropy_N)
        trainee.totals[0] += done.loss
        trainee.totals[1] += cross_entropy_N.mean()
        trainee.totals[2] += grad_norm
        trainee.totals[3] += 1
        if trainee.histogram is not None and done.sigma_N:
            trainee.histogram.add(torch.cat(done.sigma_N), cross_entropy_N)
        if told := trainee.spikes.add(loss):
            place = f"block {trainee.owned.index}, step {trainee.steps_done + 1}"
            self.warn(f"{place}: {told} (gradient norm {grad_norm:.4g})")

    def warn(self, text: str) -> None:
        """A line in the log, from the block's first replica."""
        if self.topology.replica == 0:
            self._mailbox.post({"warning": text})

    def measure(self, step: int) -> dict[str, float]:
        """This rank's scalars since the last record; none for the same step again. Collective among
        the replicas of a block."""
        rank, marks, meter = self.topology.rank, self._marks, self.topology.meter
        if step == marks.step:  # it has been recorded
            return {}
        scalars: dict[str, float] = {}
        for trainee in self.trainees:
            scalars |= self._measure_block(trainee, step)
        num_steps = max(1, step - marks.step)
        moved, waited = meter.training_bytes(), self.sync.wait_s
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
        num_skipped, trainee.num_skipped = trainee.num_skipped, 0
        if topology.replica > 0:
            return {}
        counts: dict[str, float] = {}
        if self.config.train.nonfinite == "skip":
            counts = {f"train/skipped/block{block}": num_skipped}
        if num_steps == 0:
            return counts
        samples = self.config.train.batch_size * (num_steps + num_skipped)
        return counts | {
            f"train/loss/block{block}": loss / num_steps,
            f"train/cross_entropy/block{block}": cross_entropy / num_steps,
            f"train/grad_norm/block{block}": norm / num_steps,
            f"train/lr/block{block}": trainee.owned.engine.optimizer.param_groups[0]["lr"],
            f"perf/step_ms/block{block}": 1e3 * seconds / (num_steps + num_skipped),
            f"perf/samples_per_s/block{block}": samples / seconds,
        }

    def post(self, step: int, scalars: dict[str, float], with_histograms: bool) -> None:
        """Leaves a record for rank 0."""
        histograms = [t.histogram for t in self.trainees if t.histogram and with_histograms]
        for histogram in histograms or [None]:
            content = histogram.to_dict() if histogram else None
            self._mailbox.post({"step": step, "scalars": scalars, "histogram": content})
            scalars = {}
            if histogram:
                histogram.reset()

    def collect(self) -> None:
        """On rank 0: hands the records that have arrived to the monitor."""
        if not self.topology.is_coordinator:
            return
        for rank, record in self._mailbox.collect():
            if self.monitor is None:
                continue
            if "warning" in record:
                self.monitor.warn(record["warning"])
            else:
                self.monitor.record(rank, record["step"], record["scalars"], record["histogram"])

    def has(self, step: int) -> bool:
        """On rank 0: whether metrics.jsonl holds what every rank recorded up to this step."""
        self.collect()
        return self.monitor is None or self.monitor.has_recorded(step)
