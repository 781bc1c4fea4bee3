"""Accuracy on the test set, at the end of the chain and after every block.

`chain_answers` runs this rank's block on its replica's share of the images, `process_answers` all
blocks in turn in one process; both take the same steps on the same states. `evaluate` sums up over
ranks.
"""

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dbdist.config.config import Config
from dbdist.data import ImageDataset, num_test_samples, test_batches
from dbdist.errors import ConfigError
from dbdist.models.denoiser import Denoiser
from dbdist.models.vit import PlainViT
from dbdist.parallel.chain import Chain
from dbdist.parallel.topology import Topology
from dbdist.sampling.sampler import build_sampler
from dbdist.tasks.classification import ClassReadout

Model = Denoiser | PlainViT
Scores = Tensor
"""float64 (num_blocks, 2): correct answers and samples after each block."""


@dataclass(frozen=True)
class Evaluation:
    """The content of RUN/evaluation.json. The accuracy after a block is that of the chain if it
    ended there; the last one is the accuracy of the whole."""

    accuracy: float
    accuracy_after_block: list[float]
    num_samples: int
    world_size: int
    samples_per_s: float
    sampler: dict[str, Any]
    step: int

    def scalars(self) -> dict[str, float]:
        """For metrics.jsonl."""
        after = {
            f"val/accuracy_after_block/{b}": a for b, a in enumerate(self.accuracy_after_block)
        }
        return {
            "val/accuracy": self.accuracy,
            **after,
            "perf/eval_samples_per_s": self.samples_per_s,
        }


@dataclass(frozen=True)
class Answers:
    """A micro-batch after one block: labels, and class probabilities if the chain ended here."""

    labels_N: Tensor
    answer_NK: Tensor


def chain_answers(
    config: Config, topology: Topology, dataset: ImageDataset, denoiser: Denoiser
) -> list[Answers]:
    """This rank's link of the chain: its block's answers for its replica's share. Collective in the
    chain.

    What travels is a row a sample: the states of its draws and, where several blocks' answers are
    averaged, the sum of those so far.
    """
    assert topology.block is not None
    sampler, table = build_sampler(config), denoiser.shared.label_table
    task = ClassReadout(table, config.sampler.label_table == "normalized")
    accumulate = config.readout_blocks != (config.num_blocks - 1,)
    num_classes, width = table.shape
    state_size = config.sampler.num_draws * width
    micro = _MicroBatches(config, topology, dataset, table.dtype)
    results: list[Answers] = []

    def first(i: int) -> Tensor:
        if micro.is_idle(i):
            return torch.zeros(1, *shape, dtype=table.dtype, device=topology.device)
        batch_idx, start, stop = micro.places[i]
        z = micro.initial_state(sampler, batch_idx, (width,))
        rows = z.unflatten(0, (-1, sampler.num_draws)).flatten(1)[start:stop].to(topology.device)
        return torch.nn.functional.pad(rows, (0, num_classes if accumulate else 0))

    def work(i: int, rows: Tensor) -> Tensor:
        images, labels = micro.load(i)
        z, answer_sum = rows[:, :state_size].reshape(-1, width), rows[:, state_size:]
        z, answer = sampler.run_block(topology.block or 0, denoiser, task, images, z)
        answer_sum, answer = _read_out(config, topology.block or 0, answer, answer_sum)
        if not micro.is_idle(i):
            results.append(Answers(labels, answer))
        return torch.cat([z.reshape(len(labels), -1), answer_sum], dim=1)

    shape = (state_size + (num_classes if accumulate else 0),)
    Chain(topology).run(micro.sizes, shape, table.dtype, first, work)
    return results


def process_answers(
    config: Config,
    topology: Topology,
    dataset: ImageDataset,
    model_of_block: Callable[[int], Denoiser],
) -> Iterator[tuple[int, Answers]]:
    """(block, answers) of every block in turn, one resident at a time if `model_of_block` loads
    it."""
    sampler = build_sampler(config)
    states: dict[int, Tensor] = {}
    sums: dict[int, Tensor] = {}
    for block in range(config.num_blocks):
        denoiser = model_of_block(block)
        table = denoiser.shared.label_table
        task = ClassReadout(table, config.sampler.label_table == "normalized")
        micro = _MicroBatches(config, topology, dataset, table.dtype)
        for i, (batch_idx, start, stop) in enumerate(micro.places):
            images, labels = micro.load(i)
            if block == 0:
                z = micro.initial_state(sampler, batch_idx, table.shape[1:])
                draws = sampler.num_draws
                states[i] = z[start * draws : stop * draws].to(topology.device)
                sums[i] = torch.zeros(
                    len(labels), len(table), dtype=table.dtype, device=topology.device
                )
            states[i], answer = sampler.run_block(block, denoiser, task, images, states[i])
            sums[i], answer = _read_out(config, block, answer, sums[i])
            yield block, Answers(labels, answer)
        del denoiser, table, task


@torch.no_grad()
def evaluate(
    config: Config,
    topology: Topology,
    dataset: ImageDataset,
    model_of_block: Callable[[int], Model],
    step: int,
) -> Evaluation:
    """Scores the test set and sums up over all ranks. Collective.

    model_of_block: called with this rank's block; in one process with every block in turn.
    """
    topology.watch.at("evaluation", waits=True)
    topology.barrier()
    start = time.perf_counter()
    scores = torch.zeros(config.num_blocks, 2, dtype=torch.float64)
    is_bf16 = config.train.precision == "bf16"
    with torch.autocast(topology.device.type, torch.bfloat16, enabled=is_bf16):
        for block, answers in _answers(config, topology, dataset, model_of_block):
            _count(scores, block, answers)
    if topology.store is not None:
        dist.all_reduce(scores)
        topology.meter.sent["metrics"] += scores.nbytes
        topology.meter.received["metrics"] += scores.nbytes
    elapsed = time.perf_counter() - start
    accuracy = (scores[:, 0] / scores[:, 1]).tolist()
    num_samples = int(scores[-1, 1])
    return Evaluation(
        accuracy=accuracy[-1],
        accuracy_after_block=accuracy,
        num_samples=num_samples,
        world_size=topology.world_size,
        samples_per_s=num_samples / elapsed,
        sampler=_sampler_used(config),
        step=step,
    )


def check_test_set(config: Config, dataset: ImageDataset) -> None:
    """Raises ConfigError when eval.drop_last leaves no test image."""
    if num_test_samples(dataset, config.eval.batch_size, config.eval.drop_last) == 0:
        raise ConfigError(
            f"eval.drop_last drops all {len(dataset)} test images, fewer than eval.batch_size "
            f"{config.eval.batch_size}; lower it"
        )


def _answers(
    config: Config,
    topology: Topology,
    dataset: ImageDataset,
    model_of_block: Callable[[int], Model],
) -> Iterator[tuple[int, Answers]]:
    """(block, answers) of everything that this rank scores."""
    if config.mode == "end_to_end":
        yield from _plain_answers(config, topology, dataset, model_of_block(0))
    elif topology.world_size == 1:
        yield from process_answers(
            config, topology, dataset, lambda block: _denoiser(model_of_block(block))
        )
    elif topology.block is not None:
        denoiser = _denoiser(model_of_block(topology.block))
        for answers in chain_answers(config, topology, dataset, denoiser):
            yield topology.block, answers


def _plain_answers(
    config: Config, topology: Topology, dataset: ImageDataset, model: Model
) -> Iterator[tuple[int, Answers]]:
    assert isinstance(model, PlainViT)
    model.eval()
    micro = _MicroBatches(config, topology, dataset, model.shared.positions.dtype)
    for i in range(len(micro.sizes)):
        images, labels = micro.load(i)
        answer = model(images)
        if not micro.is_idle(i):
            yield 0, Answers(labels, answer)


def _sampler_used(config: Config) -> dict[str, Any]:
    """The sampler with its defaults resolved; empty for the plain ViT, which has none."""
    if config.mode == "end_to_end":
        return {}
    sampler = build_sampler(config)
    resolved = {"num_steps": sampler.num_steps, "sigma_start": sampler.sigmas[0].item()}
    return {**asdict(config.sampler), **resolved}


class _MicroBatches:
    """The test images of one replica, loaded batch by batch, as a list of micro-batches in order.

    Replicas that split a block's weights compute together, so all take as many micro-batches: those
    with fewer images end with idle ones, of one empty image.
    """

    def __init__(
        self, config: Config, topology: Topology, dataset: ImageDataset, dtype: torch.dtype
    ) -> None:
        e = config.eval
        self._config, self._device, self._dtype = config, topology.device, dtype
        num_samples = num_test_samples(dataset, e.batch_size, e.drop_last)
        self._image_shape = dataset.spec.channels, dataset.spec.image_size, dataset.spec.image_size
        self._sizes = {
            b: min(e.batch_size, num_samples - first)
            for b, first in enumerate(range(0, num_samples, e.batch_size))
        }
        num_replicas = topology.layout.num_replicas
        places: list[list[tuple[int, int, int]]] = [[] for _ in range(num_replicas)]
        for b, size in self._sizes.items():
            places[b % num_replicas] += [
                (b, start, min(start + e.micro_batch_size, size))
                for start in range(0, size, e.micro_batch_size)
            ]
        self.places = places[topology.replica]
        """(batch, first row, end row) of each micro-batch that is not idle."""
        num_idle = max(map(len, places)) - len(self.places)
        self.sizes = [stop - start for _, start, stop in self.places] + [1] * num_idle
        """Rows of each micro-batch."""
        self._batches = test_batches(
            dataset,
            e.batch_size,
            shard=topology.replica,
            num_shards=topology.layout.num_replicas,
            drop_last=e.drop_last,
            num_workers=config.data.num_workers,
        )
        self._batch: tuple[int, Tensor, Tensor] | None = None
        self._state: tuple[int, Tensor] | None = None

    def is_idle(self, i: int) -> bool:
        """Whether a micro-batch is there for the other replicas' sake."""
        return i >= len(self.places)

    def load(self, i: int) -> tuple[Tensor, Tensor]:
        """(images, labels) of a micro-batch; to be called in order."""
        if self.is_idle(i):
            images = torch.zeros(1, *self._image_shape, dtype=self._dtype, device=self._device)
            return images, torch.zeros(1, dtype=torch.int64, device=self._device)
        batch_idx, start, stop = self.places[i]
        if self._batch is None or self._batch[0] != batch_idx:
            batch, loaded = next(self._batches)
            images, labels = batch["image"], batch["label"]
            assert loaded == batch_idx, f"batch {loaded}, wanted {batch_idx}"
            self._batch = batch_idx, images.to(self._device, self._dtype), labels.to(self._device)
        return self._batch[1][start:stop], self._batch[2][start:stop]

    def initial_state(self, sampler: Any, batch_idx: int, shape: tuple[int, ...]) -> Tensor:
        """First states of a whole batch: what a sample starts from does not depend on
        micro-batches."""
        if self._state is None or self._state[0] != batch_idx:
            size = self._sizes[batch_idx]
            state = sampler.initial_state(
                size, tuple(shape), self._config.seed, batch_idx, self._dtype
            )
            self._state = batch_idx, state
        return self._state[1]


def _read_out(
    config: Config, block: int, answer: Tensor, answer_sum: Tensor
) -> tuple[Tensor, Tensor]:
    """(sum of the averaged blocks' answers so far, the answer if the chain ended with this block):
    their mean, or this block's own answer before the first of them."""
    readers = config.readout_blocks
    if readers == (config.num_blocks - 1,):
        return answer_sum, answer
    if block in readers:
        answer_sum = answer_sum + answer
    so_far = sum(reader <= block for reader in readers)
    return answer_sum, answer_sum / so_far if so_far else answer


def _count(scores: Scores, block: int, answers: Answers) -> None:
    correct = answers.answer_NK.argmax(dim=-1) == answers.labels_N
    scores[block, 0] += correct.sum().item()
    scores[block, 1] += len(correct)


def _denoiser(model: Model) -> Denoiser:
    assert isinstance(model, Denoiser)
    return model.eval()


def write_evaluation(run_dir: Path, evaluation: Evaluation) -> None:
    """RUN/evaluation.json, whole or not at all."""
    partial = run_dir / "evaluation.json.partial"
    try:
        partial.write_text(
            json.dumps(dataclasses.asdict(evaluation), indent=2, allow_nan=False) + "\n"
        )
        os.replace(partial, run_dir / "evaluation.json")
    except OSError as error:
        raise ConfigError(f"run_dir {run_dir} cannot be written ({error.strerror})") from None
