"""On a CUDA device; skipped without one. The CPU twins are in tests/distributed.

Ranks are the pool's: each makes its CUDA context once, for all tests.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from machine import ROOT, SMALL
from ranks import config_of, setup_of
from reading import lines_of, tensors_of

from dbdist.checkpoint.manifest import find_checkpoint
from dbdist.config import registry
from dbdist.data.sources import load_dataset
from dbdist.errors import ConfigError
from dbdist.inference.of_run import evaluate_run, layout_for_evaluation
from dbdist.parallel.layout import Layout, layout_of
from dbdist.parallel.topology import Topology, choose_device
from dbdist.tasks.base import to_device
from dbdist.training.setup import train
from dbdist.training.state_files import files_of
from dbdist.training.trainer import Trainer

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
ENGINES = ("ddp", "fsdp", "deepspeed")
LOSS = re.compile(r"train/(loss|grad_norm).*")
# Adam makes a whole step of a gradient that is zero but for rounding: eps well above that.
COMMON = ("train.max_steps=20", "train.log_every=1", "train.eps=1e-5", "train.lr=1e-2")


def prepare_device():
    """Full fp32 precision, and kernels that add up in the same order each time."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.use_deterministic_algorithms(True, warn_only=True)


def own_world():
    """One rank whose copies of the block talk over NCCL: to itself."""
    dist.set_debug_level(dist.DebugLevel.OFF)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    device, store = choose_device(DEVICE, 0), dist.HashStore()
    backend = None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend or "gloo", store=store, rank=0, world_size=1)
    group = dist.new_group([0])
    return Topology(
        Layout(1),
        device=device,
        store=store,
        p2p_group=group,
        replica_group=group,
        uses_nccl=backend is not None,
    )


def topology_of(rank, config):
    layout = layout_of(config, rank.launch.world_size)
    return rank.join(layout, device=config.device)


def trainer_of(config, topology):
    data = load_dataset(config.data, "train"), load_dataset(config.data, "test")
    checkpoint = find_checkpoint(Path(config.run_dir))
    return Trainer(setup_of(config), topology, *data, checkpoint)


def train_rank(rank, options):
    """A whole run, with its records and checkpoints."""
    prepare_device()
    config = config_of(*options)
    evaluation = train(config, topology_of(rank, config))
    return evaluation.figures if evaluation else None


def train_over_nccl(rank, options):
    """One block by itself, its copies a group of one rank."""
    prepare_device()
    config = config_of(*options)
    trainer = trainer_of(config, own_world())
    losses = [trained_step(trainer, step) for step in range(config.train.max_steps)]
    evaluation = trainer.evaluate(config.train.max_steps)
    devices = {p.device.type for p in trainer.state.parameters.values()}
    dtypes = {p.dtype for p in trainer.state.parameters.values()}
    trainer.close()
    return losses, evaluation.figures, devices, dtypes


def trained_step(trainer, step):
    """The step's loss: what the task keeps of each sample, on average."""
    losses = []
    handle = trainer.trainees[0].owned.objective.register_forward_hook(
        lambda module, inputs, loss: losses.append(loss.value.item())
    )
    trainer.state.set_training(True)
    trainer.train_step(step)
    handle.remove()
    return losses[-1]


def options(run_dir, device, *more):
    return [f"run_dir={run_dir}", f"device={device}", *COMMON, *more]


def assert_losses_agree(own, expected, rel):
    own, expected = lines_of(own), lines_of(expected)
    assert [line["step"] for line in own] == [line["step"] for line in expected]
    for a, b in zip(own, expected, strict=True):
        keys = [key for key in b if LOSS.fullmatch(key)]
        assert keys
        assert {k: a[k] for k in keys} == pytest.approx({k: b[k] for k in keys}, rel=rel), (
            f"step {a['step']}"
        )


@pytest.fixture(scope="module")
def on_gpu(ranks, tmp_path_factory):
    """The folder of a run of three ranks that share a GPU."""
    folder = tmp_path_factory.mktemp("gpu")
    ranks.run(3, train_rank, options(folder, DEVICE))
    return folder


def test_three_ranks_share_one_gpu_over_gloo_and_train_as_on_the_cpu(ranks, on_gpu, tmp_path):
    cpu = ranks.run(3, train_rank, options(tmp_path, "cpu"))
    assert_losses_agree(on_gpu, tmp_path, rel=1e-4)
    assert lines_of(on_gpu)[-1]["val/nll"] == pytest.approx(cpu[0]["nll"], rel=1e-4)


def evaluate_rank(rank, options):
    prepare_device()
    config = config_of(*options)
    layout = layout_for_evaluation(config, rank.launch.world_size)
    return evaluate_run(config, rank.join(layout, device=config.device)).figures


def test_the_chain_on_a_gpu_equals_one_process(ranks, on_gpu):
    """Three ranks that hand states on, and one that has all blocks."""
    more = "sampler.num_draws=2", "sampler.start=noise", "sampler.guidance_scale=0.5"
    words = options(on_gpu, DEVICE, *more)
    chain, alone = (ranks.run(n, evaluate_rank, words)[0] for n in (3, 1))
    assert chain.keys() == alone.keys()
    for name, value in chain.items():
        assert value == pytest.approx(alone[name], rel=1e-5), name


@pytest.fixture(scope="module")
def reference(ranks, tmp_path_factory):
    """Losses and figures of each task on the CPU, one block by itself."""
    folder, found = tmp_path_factory.mktemp("reference"), {}

    def of(task):
        if task not in found:
            words = options_of_task(folder / task, "cpu", task)
            found[task] = ranks.run(1, train_by_itself, words)[0]
        return found[task]

    return of


ONE_BLOCK = ("model.num_blocks=1", "train.max_steps=8")
OF_TASK = {
    "generation": ("data.image_size=4", "task.features=none", "sampler.num_steps=4"),
    "masked_text": ("data.name=text", f"data.root={ROOT / 'README.md'}", "data.length=16"),
}
"""What a task is tested on, where that is not its defaults."""


def options_of_task(run_dir, device, task):
    more = (f"task.name={task}", *OF_TASK.get(task, ()))
    return options(run_dir, device, *ONE_BLOCK, *more)


def train_by_itself(rank, options):
    prepare_device()
    config = config_of(*options)
    trainer = trainer_of(config, topology_of(rank, config))
    losses = [trained_step(trainer, step) for step in range(config.train.max_steps)]
    evaluation = trainer.evaluate(config.train.max_steps)
    trainer.close()
    return losses, evaluation.figures


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("task", registry.TASKS)
def test_every_task_and_engine_trains_over_nccl_as_on_the_cpu(
    ranks, reference, tmp_path, task, engine
):
    words = options_of_task(tmp_path, DEVICE, task)
    words.append(f"parallel.replica_engine={engine}")
    losses, figures, devices, _ = ranks.run(1, train_over_nccl, words, timeout_s=60)[0]
    expected, expected_figures = reference(task)
    assert losses == pytest.approx(expected, rel=1e-4)
    assert devices == {DEVICE}
    assert figures.keys() == expected_figures.keys()


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_bf16_computes_in_half_precision_and_keeps_full_weights(ranks, reference, tmp_path, engine):
    words = options(tmp_path, DEVICE, *ONE_BLOCK, "train.precision=bf16")
    words.append(f"parallel.replica_engine={engine}")
    losses, _, _, dtypes = ranks.run(1, train_over_nccl, words, timeout_s=60)[0]
    expected, _ = reference("classification")
    assert losses == pytest.approx(expected, rel=0.05)
    assert losses != pytest.approx(expected, rel=1e-6)
    assert dtypes == {torch.float32}


@pytest.mark.parametrize(
    ("num_ranks", "mode"), [(3, "block_parallel"), (1, "sequential"), (1, "end_to_end")]
)
def test_a_run_resumes_bit_for_bit_on_a_gpu(ranks, tmp_path, num_ranks, mode):
    """What was saved halfway, while training went on, is whole as well."""
    more = f"mode={mode}", "model.dropout=0.2", "train.ema_decay=0.9", "checkpoint.keep_last=3"
    more = *more, "task.condition_dropout=0.1", "checkpoint.every_steps=4"
    straight, parts = (options(tmp_path / name, DEVICE, *more) for name in ("straight", "parts"))
    ranks.run(num_ranks, train_rank, [*straight, "train.max_steps=8"])
    for steps in (4, 8):
        ranks.run(num_ranks, train_rank, [*parts, f"train.max_steps={steps}"])
    for step in (4, 8):
        own, expected = (tensors_of(tmp_path / name, step) for name in ("parts", "straight"))
        assert own.keys() == expected.keys()
        for file in own:
            assert own[file].keys() == expected[file].keys()
            different = [k for k, v in own[file].items() if not torch.equal(v, expected[file][k])]
            assert not different, f"step {step}, {file}"


def save_rank(rank, options):
    """Saves what lies on the device; (where that is, names that differ in the files)."""
    config = config_of(*options)
    trainer = trainer_of(config, topology_of(rank, config))
    trainer.fit()
    checkpoint = find_checkpoint(Path(config.run_dir))
    files = files_of(trainer.state)
    devices = {t.device.type for tensors in files.values() for t in tensors.values() if t.ndim}
    different = []
    for file, tensors in files.items():
        saved = checkpoint.tensors(file)
        assert saved.keys() == tensors.keys()
        different += [k for k, v in tensors.items() if not torch.equal(v.cpu(), saved[k])]
    return devices, different


def test_a_checkpoint_equals_the_weights_in_gpu_memory(ranks, tmp_path):
    words = options(tmp_path, DEVICE, "train.max_steps=4", "train.ema_decay=0.9")
    assert ranks.run(3, save_rank, words) == [({DEVICE}, [])] * 3


def load_rank(rank, options):
    """(whether each tensor of a batch came pinned, whether it arrived whole)."""
    config = config_of(*options)
    trainer = trainer_of(config, topology_of(rank, config))
    batch = next(trainer.trainees[0].batches)
    moved = to_device(batch, trainer.topology.device, trainer.state.dtype)
    found = {
        name: (values.is_pinned(), moved[name].device.type, torch.equal(moved[name].cpu(), values))
        for name, values in batch.items()
    }
    trainer.close()
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_arrive_in_pinned_memory(ranks, tmp_path, workers):
    words = options(tmp_path, DEVICE, "mode=sequential", f"data.num_workers={workers}")
    found = ranks.run(1, load_rank, words)[0]
    assert set(found.values()) == {(True, DEVICE, True)}, found


def refused_rank(rank, options):
    config = config_of(*options)
    topology = topology_of(rank, config)
    with pytest.raises(ConfigError, match="needs a GPU of its own"):
        trainer_of(config, topology)


@pytest.mark.skipif(torch.cuda.device_count() > 2, reason="every rank has a GPU of its own")
@pytest.mark.parametrize("engine", ["fsdp", "deepspeed"])
def test_engines_that_split_refuse_to_share_a_gpu(ranks, tmp_path, engine):
    words = options(tmp_path, DEVICE, f"parallel.replica_engine={engine}")
    ranks.run(3, refused_rank, words)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a GPU for each of two ranks")
def test_nccl_connects_one_rank_per_gpu(ranks, tmp_path):
    num_ranks = min(torch.cuda.device_count(), 4)
    more = f"model.num_blocks={num_ranks}", f"model.num_layers={num_ranks}"
    for device in ("cpu", DEVICE):
        ranks.run(num_ranks, train_rank, options(tmp_path / device, device, *more))
    assert_losses_agree(tmp_path / DEVICE, tmp_path / "cpu", rel=1e-4)


def torchrun(*words):
    """What three ranks of torchrun print: real processes, as forks cannot share CUDA."""
    launcher = "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3"
    command = [sys.executable, *launcher, "-m", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_commands_under_torchrun_train_and_evaluate_on_a_gpu(tmp_path):
    words = (*SMALL, "--device", DEVICE, "--train.max_steps", 4, "--run_dir", tmp_path)
    printed = torchrun("dbdist.train", *words)
    assert DEVICE in printed, "the table says where each rank computes"
    torchrun("dbdist.evaluate", "--run_dir", tmp_path)


LIMITED = """
import sys
import torch
from dbdist.train import main
whole = torch.cuda.get_device_properties(0).total_memory
torch.cuda.set_per_process_memory_fraction(2**28 / whole)
main(sys.argv[1:])
"""


def test_out_of_memory_ends_in_one_line_that_says_what_to_lower(machine, tmp_path):
    words = *SMALL, "--device", DEVICE, "--run_dir", tmp_path, "--model.num_blocks", 1
    job = machine.script(LIMITED, *words, "--train.batch_size", 65536)
    assert job.wait(60) == 1, job.printed()
    lines = [line for line in job.printed().splitlines() if "error:" in line]
    assert len(lines) == 1, job.printed()
    for word in ("rank 0", "block 0", "out of GPU memory", "65536", "lower", "train.batch_size"):
        assert word in lines[0]
    assert "Traceback" not in job.printed()
