"""Every task's objective and sampler on a GPU that is not there: no tensor may stay on the host.

Fake tensors have a device and no values; operations on tensors of two devices fail. What reads a
value (schedules, grids, draws) is made before.
"""

from typing import Any

import pytest
import torch
from ranks import config_of, setup_of
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from dbdist.config import registry
from dbdist.data.sources import load_dataset
from dbdist.models.base import Block
from dbdist.sampling.micro_batches import Wire
from dbdist.sampling.sampler import Rows, build_sampler
from dbdist.tasks.base import Draws, draws_of_step

NUM_SAMPLES = 6
SMALL_DIT = (
    "model.num_blocks=3",
    "model.num_layers=3",
    "task.features=none",
    "sampler.num_steps=4",
)
CASES = {
    "classification": (
        ("model.num_blocks=3",),
        ("model.num_blocks=3", "task.condition_dropout=0.5", "task.weighting=per_sample"),
        (
            "model.num_blocks=3",
            "sampler.num_draws=2",
            "sampler.start=noise",
            "sampler.guidance_scale=0.5",
            "sampler.label_table=raw",
        ),
        ("mode=end_to_end",),
    ),
    "generation": (
        (*SMALL_DIT, "task.condition_dropout=0.5"),
        (*SMALL_DIT, "sampler.guidance_scale=2", "sampler.method=heun", "mode=end_to_end"),
    ),
    "masked_text": (
        ("model.num_blocks=3", "model.num_layers=3", "sampler.num_steps=4"),
        (
            "model.num_layers=3",
            "model.level=adaln",
            "model.mlp=swiglu",
            "noise.schedule=cosine",
            "sampler.num_steps=4",
        ),
    ),
}
"""Options of a task whose code takes another way."""


def all_cases() -> list[Any]:
    return [
        pytest.param((f"task.name={name}", *options), id=" ".join([name, *options]))
        for name in registry.TASKS
        for options in CASES.get(name, ((),))
    ]


class OnFakeGpu:
    """A task with modules, a batch and draws on a fake GPU."""

    def __init__(self, options: tuple[str, ...]) -> None:
        self.config = config_of(*options)
        self.setup = setup_of(self.config)
        self.task, self.process = self.setup.task, self.setup.process
        self.sampler = build_sampler(self.setup)
        # As many as there are: what is filled in depends on values.
        self.mode = FakeTensorMode(shape_env=ShapeEnv(allow_dynamic_output_shape_ops=True))
        with self.mode, torch.device("cuda"):
            self.shared = self.setup.model.build_shared()
        dataset = load_dataset(self.config.data, "train")
        self.batch = self.moved(dataset.__getitems__(list(range(NUM_SAMPLES))))

    def moved(self, tensors: Any, device: str = "cuda") -> Any:
        """Tensors of the same form on a fake device."""
        if tensors is None:
            return None
        if isinstance(tensors, dict):
            return {name: self.moved(value, device) for name, value in tensors.items()}
        with self.mode:
            return torch.empty(tensors.shape, dtype=tensors.dtype, device=device)

    def draws(self, block: int, device: str = "cuda") -> Draws:
        drawn = draws_of_step(
            self.task,
            self.process,
            condition_dropout=self.config.task.condition_dropout,
            seed=0,
            block=block,
            step=0,
            num_samples=NUM_SAMPLES,
        )
        return Draws(*(self.moved(values, device) for values in drawn))

    def denoiser(self, block: int) -> Any:
        with self.mode, torch.device("cuda"):
            layers = self.config.layers_of_block[block]
            module = Block({i: self.setup.model.build_layer(i) for i in layers})
        return self.setup.denoiser(self.shared, module)


@pytest.mark.parametrize("options", all_cases())
def test_every_objective_stays_on_the_gpu(options):
    fake = OnFakeGpu(options)
    for block in range(fake.config.num_blocks):
        objective, draws = fake.setup.objective(fake.denoiser(block)), fake.draws(block)
        with fake.mode:
            loss = objective(fake.batch, draws)
        assert {loss.value.device.type, *(v.device.type for v in loss.per_sample.values())} == {
            "cuda"
        }


@pytest.mark.parametrize("options", all_cases())
def test_every_chain_stays_on_the_gpu(options):
    """What is sent and scored as well."""
    fake = OnFakeGpu(options)
    task, sampler, rows = fake.task, fake.sampler, Rows(0, NUM_SAMPLES)
    wire = Wire.of(task, sampler.num_draws, torch.float32)
    z = fake.moved(sampler.initial_state(task, rows, torch.float32))
    with fake.mode:
        carry = wire.empty_carry(NUM_SAMPLES, z.device)
    for block in range(fake.config.num_blocks):
        denoiser = fake.denoiser(block).eval()
        with fake.mode:
            z, answer = sampler.run_block(
                block, denoiser, task, fake.shared, task.condition(fake.batch), z, rows
            )
            carry, answer = task.read(block, answer, carry)
            scores = [f.add(answer, fake.batch) for f in task.figures() if f.kind == "chain"]
            z, carry = wire.unpack(wire.pack(z, carry))
        assert {x.device.type for x in (z, answer, carry, *scores)} == {"cuda"}


@pytest.mark.parametrize("left", ["batch", "draws"])
def test_a_tensor_that_is_left_on_the_host_is_found(left):
    fake = OnFakeGpu(("model.num_blocks=3",))
    objective = fake.setup.objective(fake.denoiser(0))
    batch, draws = fake.batch, fake.draws(0)
    if left == "batch":
        batch = fake.moved(batch, "cpu")
    else:
        draws = fake.draws(0, "cpu")
    with fake.mode, pytest.raises(RuntimeError, match="on the same device"):
        objective(batch, draws)


def test_a_tensor_that_a_task_makes_on_the_host_is_found(monkeypatch):
    fake = OnFakeGpu(("model.num_blocks=3",))
    objective, draws = fake.setup.objective(fake.denoiser(0)), fake.draws(0)
    monkeypatch.setattr(fake.task, "clean", lambda batch, shared: torch.ones(NUM_SAMPLES, 12))
    with fake.mode, pytest.raises(RuntimeError, match="on the same device"):
        objective(fake.batch, draws)
