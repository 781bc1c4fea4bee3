"""On a CUDA device; skipped without one. The CPU twins are in tests/distributed."""

import json

import pytest
import torch
from machine import SMALL

pytestmark = pytest.mark.gpu


def losses(folder):
    line = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    return {k: v for k, v in line.items() if k.startswith("train/loss")}


def test_three_ranks_share_one_gpu_over_gloo_and_train_as_on_the_cpu(machine, tmp_path):
    for device in ("cpu", "cuda"):
        words = (*SMALL, "--device", device, "--model.dropout", "0", "--run_dir", tmp_path / device)
        machine.run("dbdist.train", *words, ranks=3, is_new=True)
    assert losses(tmp_path / "cuda") == pytest.approx(losses(tmp_path / "cpu"), rel=1e-2)
    machine.run("dbdist.evaluate", "--run_dir", tmp_path / "cuda", ranks=3, is_new=True)


def test_nccl_connects_one_rank_per_gpu(machine, tmp_path):
    ranks = min(torch.cuda.device_count(), 3)
    words = (*SMALL, "--model.num_blocks", ranks, "--device", "cuda", "--run_dir", tmp_path)
    machine.run("dbdist.train", *words, ranks=ranks, is_new=True)


def test_bf16_trains_on_the_gpu(machine, tmp_path):
    words = (*SMALL, "--train.precision", "bf16", "--device", "cuda", "--run_dir", tmp_path)
    machine.run("dbdist.train", *words, ranks=3, is_new=True)


@pytest.mark.parametrize("engine", ["fsdp", "deepspeed"])
def test_engines_that_split_train_one_rank_over_nccl(machine, tmp_path, engine):
    words = (*SMALL, "--model.num_blocks", "1", "--parallel.replica_engine", engine)
    machine.run("dbdist.train", *words, "--device", "cuda", "--run_dir", tmp_path, is_new=True)


@pytest.mark.skipif(torch.cuda.device_count() > 2, reason="every rank has a GPU of its own")
def test_engines_that_split_refuse_to_share_a_gpu(machine, tmp_path):
    words = (*SMALL, "--parallel.replica_engine", "fsdp", "--device", "cuda")
    job = machine.python("dbdist.train", *words, "--run_dir", tmp_path, ranks=3, is_new=True)
    assert job.wait(200) != 0
    assert "needs a GPU of its own" in job.printed()
