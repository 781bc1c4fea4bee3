"""The figures of a test set: at the end of the chain, after every block, and by levels.

`chain_answers` runs this rank's block on its replica's share of the samples, `process_answers` all
blocks in turn in one process; both take the same steps on the same states. `evaluate` sums up over
ranks.
"""

# What torch and jsonargparse leave untyped:
# pyright: reportUnknownArgumentType=false, reportUnknownVariableType=false

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dbdist import seeds
from dbdist.build import Setup
from dbdist.config.config import Config
from dbdist.data.base import Dataset, Key
from dbdist.data.loader import num_test_samples
from dbdist.errors import ConfigError
from dbdist.models.denoiser import Denoiser
from dbdist.parallel.chain import Chain
from dbdist.parallel.topology import Topology
from dbdist.sampling.micro_batches import MicroBatches, Wire
from dbdist.sampling.sampler import Rows, build_sampler, describe_sampler
from dbdist.tasks.base import Batch, Figures, MainFigure, Task
from dbdist.whole_files import write_json

NUM_PREVIEWED = 32
"""Answers that are looked at, of the first samples."""
ModelOfBlock = Callable[[int], Denoiser]
"""Called with this rank's block; in one process with every block in turn."""


@dataclass(frozen=True)
class Evaluation:
    """The content of RUN/evaluation.json.

    A figure after a block is that of the chain if it ended there; the last one is the figure of the
    whole.
    """

    figures: dict[str, Any]
    """The task's own: name -> number, or list of numbers with one a block."""
    main: MainFigure
    num_samples: int
    world_size: int
    samples_per_s: float
    sampler: dict[str, Any]
    step: int
    preview: Tensor | str | None = None
    """Some of the answers, to look at."""

    @property
    def value(self) -> float:
        """The main figure."""
        return self.figures[self.main.name]

    @property
    def after_block(self) -> list[float]:
        """The main figure after every block; empty if the task has none."""
        return self.figures.get(f"{self.main.name}_after_block", [])

    def to_json(self) -> dict[str, Any]:
        """The task's figures, then what every task has."""
        return {
            **self.figures,
            "num_samples": self.num_samples,
            "world_size": self.world_size,
            "samples_per_s": self.samples_per_s,
            "sampler": self.sampler,
            "step": self.step,
        }

    def scalars(self) -> dict[str, float]:
        """For metrics.jsonl."""
        found: dict[str, float] = {}
        for name, value in self.figures.items():
            if isinstance(value, list):
                found |= {f"val/{name}/{b}": of_block for b, of_block in enumerate(value)}
            else:
                found[f"val/{name}"] = value
        return {**found, "perf/eval_samples_per_s": self.samples_per_s}


@dataclass(frozen=True)
class Answers:
    """A micro-batch after one block, and its answer if the chain ended here."""

    rows: Rows
    batch: Batch
    answer: Tensor


class _First:
    """The first samples of a set."""

    augments = False

    def __init__(self, dataset: Dataset, num: int) -> None:
        self._dataset, self._num = dataset, min(num, len(dataset))
        self.spec = dataset.spec

    def __len__(self) -> int:
        return self._num

    def __getitems__(self, keys: Sequence[Key]) -> dict[str, Tensor]:
        return self._dataset.__getitems__(keys)

    def digest(self) -> str:
        return self._dataset.digest()


def chain_answers(
    setup: Setup, topology: Topology, dataset: Dataset, denoiser: Denoiser
) -> Iterator[Answers]:
    """This rank's link of the chain: its block's answers for its replica's share, one at a time.

    Collective in the chain, to the end. What travels is a row a sample: the states of its draws,
    and what the task carries beside them.
    """
    assert topology.block is not None
    block, task, sampler = topology.block, setup.task, build_sampler(setup)
    dtype = _dtype_of(denoiser)
    wire = Wire.of(task, sampler.num_draws, dtype)
    micro = MicroBatches(setup, topology, dataset, dtype)
    done: dict[int, Answers] = {}

    def first(i: int) -> Tensor:
        z = sampler.initial_state(task, micro.rows_of(i), dtype).to(topology.device)
        return wire.pack(z, wire.empty_carry(micro.sizes[i], topology.device))

    def work(i: int, rows: Tensor) -> Tensor:
        batch = micro.load(i)
        z, carry = wire.unpack(rows)
        z, answer = sampler.run_block(
            block, denoiser, task, denoiser.shared, task.condition(batch), z, micro.rows_of(i)
        )
        carry, answer = task.read(block, answer, carry)
        done[i] = Answers(micro.rows_of(i), batch, answer)
        return wire.pack(z, carry)

    for i in Chain(topology).run(micro.sizes, (wire.row_bytes,), torch.uint8, first, work):
        answers = done.pop(i)
        if not micro.is_idle(i):
            yield answers


def process_answers(
    setup: Setup, topology: Topology, dataset: Dataset, model_of_block: ModelOfBlock
) -> Iterator[tuple[int, Answers]]:
    """(block, answers) of every block in turn, one resident at a time if that is how they load."""
    task, sampler = setup.task, build_sampler(setup)
    states: dict[int, tuple[Tensor, Tensor]] = {}
    for block in range(setup.config.num_blocks):
        denoiser = model_of_block(block)
        dtype = _dtype_of(denoiser)
        micro = MicroBatches(setup, topology, dataset, dtype)
        for i in range(len(micro.sizes)):
            batch, rows = micro.load(i), micro.rows_of(i)
            if block == 0:
                z = sampler.initial_state(task, rows, dtype).to(topology.device)
                wire = Wire.of(task, sampler.num_draws, dtype)
                states[i] = z, wire.empty_carry(micro.sizes[i], topology.device)
            z, carry = states[i]
            z, answer = sampler.run_block(
                block, denoiser, task, denoiser.shared, task.condition(batch), z, rows
            )
            carry, answer = task.read(block, answer, carry)
            states[i] = z, carry
            if not micro.is_idle(i):
                yield block, Answers(rows, batch, answer)
        del denoiser


def answers_here(
    setup: Setup, topology: Topology, dataset: Dataset, model_of_block: ModelOfBlock
) -> Iterator[tuple[int, Answers]]:
    """(block, answers) of everything that this rank scores."""
    is_whole = setup.config.num_blocks == 1 or topology.world_size == 1
    if is_whole and topology.block is not None:
        yield from process_answers(setup, topology, dataset, lambda b: model_of_block(b).eval())
    elif topology.block is not None:
        denoiser = model_of_block(topology.block).eval()
        for answers in chain_answers(setup, topology, dataset, denoiser):
            yield topology.block, answers


@torch.no_grad()
def evaluate(
    setup: Setup, topology: Topology, dataset: Dataset, model_of_block: ModelOfBlock, step: int
) -> Evaluation:
    """Scores the test set and sums up over all ranks. Collective."""
    config, figures = setup.config, setup.task.figures()
    topology.watch.at("evaluation", waits=True)
    topology.barrier()
    start = time.perf_counter()
    previewed: list[Tensor] = []
    totals = [torch.zeros(config.num_blocks, f.size, dtype=torch.float64) for f in figures]
    is_bf16 = config.train.precision == "bf16"
    with torch.autocast(topology.device.type, torch.bfloat16, enabled=is_bf16):
        of_chain = [(f, t) for f, t in zip(figures, totals, strict=True) if f.kind == "chain"]
        # Without figures that score the chain, it answers for the preview alone.
        asked = dataset if of_chain else _First(dataset, NUM_PREVIEWED)
        for block, answers in answers_here(setup, topology, asked, model_of_block):
            if block == config.num_blocks - 1 and answers.rows.start < NUM_PREVIEWED:
                previewed.append(answers.answer)
            for figure, total in of_chain:
                total[block] += figure.checked(figure.add(answers.answer, answers.batch))
        for figure, total in zip(figures, totals, strict=True):
            if figure.kind == "levels":
                _measure(setup, topology, dataset, model_of_block, figure, total)
    for total in totals:
        _add_up(topology, total)
    preview = setup.task.preview(torch.cat(previewed)[:NUM_PREVIEWED]) if previewed else None
    preview = next((shown for shown in topology.gather(preview) if shown is not None), None)
    elapsed = time.perf_counter() - start
    found: dict[str, Any] = {}
    for figure, total in zip(figures, totals, strict=True):
        found |= figure.result(total)
    num_samples = num_test_samples(dataset, config.eval.batch_size, config.eval.drop_last)
    return Evaluation(
        figures=found,
        main=setup.task.main,
        num_samples=num_samples,
        world_size=topology.world_size,
        samples_per_s=num_samples / elapsed,
        sampler=describe_sampler(setup),
        step=step,
        preview=preview,
    )


def check_test_set(config: Config, dataset: Dataset) -> None:
    """Raises ConfigError when eval.drop_last leaves no test sample."""
    if num_test_samples(dataset, config.eval.batch_size, config.eval.drop_last) == 0:
        raise ConfigError(
            f"eval.drop_last drops all {len(dataset)} test samples, fewer than eval.batch_size "
            f"{config.eval.batch_size}; lower it"
        )


def check_figures(task: Task, num_blocks: int, topology: Topology) -> None:
    """Makes sure that the figures give the main figure, and that they add up over ranks.

    Collective. Raises ConfigError or TopologyError.
    """
    names: list[str] = []
    with topology.agree("reading the figures"):
        figures = task.figures()
        for figure in figures:
            names += figure.result(torch.ones(num_blocks, figure.size, dtype=torch.float64))
        if task.main.name not in names:
            raise ConfigError(
                f"the main figure of {type(task).__name__} is {task.main.name}, but its figures "
                f"give {', '.join(names) or 'none'}"
            )
    topology.check_agreement({"the figures": "; ".join(figure.identity() for figure in figures)})


def write_evaluation(run_dir: Path, evaluation: Evaluation) -> None:
    """RUN/evaluation.json, whole or not at all. Raises ConfigError."""
    try:
        write_json(run_dir / "evaluation.json", evaluation.to_json())
    except OSError as error:
        raise ConfigError(f"run_dir {run_dir} cannot be written ({error.strerror})") from None


def _measure(
    setup: Setup,
    topology: Topology,
    dataset: Dataset,
    model_of_block: ModelOfBlock,
    figure: Figures,
    total: Tensor,
) -> None:
    """Adds what this rank's blocks score on their own levels; no hand-off."""
    if topology.block is None:
        return
    blocks = range(setup.config.num_blocks) if topology.world_size == 1 else [topology.block]
    for block in blocks:
        denoiser = model_of_block(block).eval()
        micro = MicroBatches(setup, topology, dataset, _dtype_of(denoiser))
        for i in range(len(micro.sizes)):
            batch, rows = micro.load(i), micro.rows_of(i)
            generator = seeds.generator(setup.config.seed, "levels", block, rows.start)
            scores = figure.checked(figure.measure(denoiser, batch, block, generator))
            if not micro.is_idle(i):
                total[block] += scores
        del denoiser


def _add_up(topology: Topology, total: Tensor) -> None:
    if topology.store is not None:
        dist.all_reduce(total)
        topology.meter.sent["metrics"] += total.nbytes
        topology.meter.received["metrics"] += total.nbytes


def _dtype_of(denoiser: Denoiser) -> torch.dtype:
    """The floating-point type of the shared modules, in which states are kept."""
    return next(p.dtype for p in denoiser.shared.parameters() if p.is_floating_point())
