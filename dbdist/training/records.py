"""What a run records: sums over the steps since the last record, brought to rank 0.

The trainer adds steps; on rank 0 the records of all ranks arrive at the monitor.
"""

import time
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from dbdist import log
from dbdist.config.config import Config
from dbdist.monitor.histogram import LevelHistogram
from dbdist.monitor.monitor import Monitor
from dbdist.monitor.ownership import peak_memory_mb
from dbdist.parallel.mailbox import Mailbox
from dbdist.parallel.shared_sync import SharedSync
from dbdist.parallel.topology import Topology
from dbdist.sampling.evaluation import Evaluation
from dbdist.training.batches import StoppingBatches
from dbdist.training.numerics import LossSpikes
from dbdist.training.rank_state import OwnedBlock


@dataclass
class Trainee:
    """A block in training: where it is in its data, and what is not yet recorded."""

    owned: OwnedBlock
    steps_done: int
    batches: StoppingBatches
    histogram: LevelHistogram | None
    totals: dict[str, Tensor] = field(default_factory=dict)
    """Sums over the steps since the last record that were not skipped, on the device, by name."""
    num_noted: int = 0
    """Steps in these sums."""
    seconds: float = 0.0
    num_skipped: int = 0
    """Steps skipped since the last record."""
    skipped_in_a_row: int = 0
    spikes: LossSpikes = field(default_factory=LossSpikes)


@dataclass
class StepResult:
    """What one step of a block has come to, over the micro-batches of its batch."""

    loss: Tensor
    per_sample: list[dict[str, Tensor]]
    """What the task records of each sample (n,), by its own names."""
    level_N: list[Tensor]
    """Empty without levels."""

    def values(self) -> dict[str, Tensor]:
        """What the task records of all samples, by name."""
        names = self.per_sample[0]
        return {name: torch.cat([part[name] for part in self.per_sample]) for name in names}


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
        monitor: Monitor | None = None,
    ) -> None:
        """monitor: on rank 0, if records are kept."""
        self.config, self.topology, self.sync, self.trainees = config, topology, sync, trainees
        self.monitor = monitor
        self._mailbox = Mailbox(topology, "metrics")
        self._marks = _Marks(step=start_step)

    def note(self, trainee: Trainee, done: StepResult, loss: float, grad_norm: float) -> None:
        """Adds a finite step to what the next record says."""
        trainee.skipped_in_a_row = 0
        trainee.num_noted += 1
        values = done.values()
        step = {name: value_N.detach().mean() for name, value_N in values.items()}
        for name, value in {**step, "loss": done.loss, "grad_norm": grad_norm}.items():
            total = trainee.totals.setdefault(name, torch.zeros_like(done.loss))
            total += value
        if trainee.histogram is not None and done.level_N:
            trainee.histogram.add(torch.cat(done.level_N), values)
        if told := trainee.spikes.add(loss):
            place = f"block {trainee.owned.index}, step {trainee.steps_done + 1}"
            self.warn(f"{place}: {told} (gradient norm {grad_norm:.4g})")

    def warn(self, text: str) -> None:
        """A line in the log, from the block's first replica."""
        if self.topology.replica == 0:
            self._mailbox.post({"warning": text, "place": log.place()})

    def measure(self, step: int) -> dict[str, float]:
        """Returns this rank's scalars since the last record; none for the same step again.

        Collective among the replicas of a block.
        """
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
        block = trainee.owned.index
        start = time.perf_counter()
        means = self._means(trainee)
        seconds = trainee.seconds + time.perf_counter() - start
        num_steps, num_skipped = trainee.num_noted + trainee.num_skipped, trainee.num_skipped
        trainee.seconds, trainee.num_noted, trainee.num_skipped = 0.0, 0, 0
        if self.topology.replica > 0:
            return {}
        scalars: dict[str, float] = {}
        if self.config.train.nonfinite == "skip":
            scalars = {f"train/skipped/block{block}": num_skipped}
        if not means:
            return scalars
        scalars |= {f"train/{name}/block{block}": mean for name, mean in means.items()}
        return scalars | {
            f"train/lr/block{block}": trainee.owned.engine.optimizer.param_groups[0]["lr"],
            f"perf/step_ms/block{block}": 1e3 * seconds / num_steps,
            f"perf/samples_per_s/block{block}": self.config.train.batch_size * num_steps / seconds,
        }

    def _means(self, trainee: Trainee) -> dict[str, float]:
        """Means over the steps since the last record, by name; empties the sums.

        Collective among the replicas of a block, whose sums have the same names.
        """
        topology, totals = self.topology, trainee.totals
        trainee.totals = {}
        if not totals:
            return {}
        sums = torch.stack(list(totals.values()))
        if topology.replica_group is not None:
            sums = sums.to(topology.wire_device)
            dist.all_reduce(sums, group=topology.replica_group)
            topology.meter.sent["metrics"] += sums.nbytes
            topology.meter.received["metrics"] += sums.nbytes
            sums /= topology.layout.num_replicas
        means = sums / trainee.num_noted
        return dict(zip(totals, means.tolist(), strict=True))  # waits for a GPU's queued steps

    def post(self, step: int, scalars: dict[str, float], with_histograms: bool) -> None:
        """Leaves a record for rank 0, which takes what has arrived."""
        histograms = [t.histogram for t in self.trainees if t.histogram and with_histograms]
        for histogram in histograms or [None]:
            content = histogram.to_dict() if histogram else None
            self._mailbox.post({"step": step, "scalars": scalars, "histogram": content})
            scalars = {}
            if histogram:
                histogram.reset()
        self.collect()

    def collect(self) -> None:
        """On rank 0: hands the records that have arrived to the monitor."""
        if not self.topology.is_coordinator:
            return
        for rank, record in self._mailbox.collect():
            if "warning" in record:
                log.warning(record["warning"], at=record["place"])
            elif self.monitor is not None:
                self.monitor.record(rank, record["step"], record["scalars"], record["histogram"])

    def of_evaluation(self, step: int, evaluation: Evaluation | None) -> dict[str, float]:
        """What goes into rank 0's record; some answers are shown at once."""
        if evaluation is None or not self.topology.is_coordinator:
            return {}
        if self.monitor is not None and evaluation.preview is not None:
            self.monitor.preview(step, evaluation.preview)
        return evaluation.scalars()

    def has(self, step: int) -> bool:
        """On rank 0: whether metrics.jsonl holds what every rank recorded up to this step."""
        self.collect()
        return self.monitor is None or self.monitor.has_recorded(step)
