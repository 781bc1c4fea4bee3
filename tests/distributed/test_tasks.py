"""Every task does what the machine offers: coordinators, engines, resume, merge, the chain."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from cases import cases
from ranks import setup_of
from reading import hashes_of
from replicas import DEEPSPEED, engine_options
from safetensors.torch import load_file
from toy import points_task

import dbdist
from dbdist.commands import merge
from dbdist.commands.export import export
from dbdist.config.config import Config
from dbdist.config.parse import parse_config
from dbdist.data.sources import load_dataset
from dbdist.inference.of_run import evaluate_run, layout_for_evaluation
from dbdist.inference.samples import draw
from dbdist.parallel.layout import layout_of
from dbdist.parallel.topology import Topology
from dbdist.training.setup import train

TASKS = {
    "points": "train.lr=0.01 data.num_points=300",
    "generation": "data.name=digits data.image_size=4 model.hidden_size=8 model.num_heads=2 "
    "model.patch_size=2 sampler.num_steps=6 sampler.guidance_scale=2",
    "masked_text": "data.name=text data.length=12 model.hidden_size=8 model.num_heads=2 "
    "sampler.num_steps=6",
}
"""What each is trained with, beside what all have."""
LOSS = {"points": "squared_error", "generation": "unit_loss", "masked_text": "bits_per_char"}
BLOCK = ("model.num_blocks=2", "model.num_layers=4", "parallel.replicas=2")
SETUPS = {
    "step": (3, ()),
    "sharded": (3, ("parallel.coordinator=sharded",)),
    "dedicated": (4, ("parallel.coordinator=dedicated",)),
    "every": (3, ("parallel.sync=every", "parallel.sync_every=3")),
    "never": (3, ("parallel.sync=never",)),
    "ddp": (4, BLOCK),
    "fsdp": (4, (*BLOCK, "parallel.replica_engine=fsdp")),
    "zero1": (4, BLOCK),
    "zero2": (4, BLOCK),
    "zero3": (4, (*BLOCK, "train.ema_decay=0", "train.ema_rampup=0")),
}
"""Ranks and options of everything that shares the work in its own way."""
STEPS = 8


def config_of(name: str, run_dir: Path, *options: str) -> Config:
    points_task.register()
    base = (
        f"task.name={name} model.num_layers=3 train.batch_size=16 train.max_steps={STEPS} "
        f"train.ema_decay=0.9 train.ema_rampup=0.1 checkpoint.every_steps={STEPS // 2} "
        "checkpoint.keep_last=5 train.log_every=4 eval.batch_size=120 eval.micro_batch_size=50 "
        f"run_dir={run_dir} {TASKS[name]}"
    )
    root = run_dir.parent / "data"
    if name == "masked_text":
        root.mkdir(exist_ok=True)
        words = "in the beginning was the word and the word was made of letters"
        text = " ".join(words.split()[i * i % 13] for i in range(600))
        (root / "text.txt").write_text(text)
    words = [f"--{option}" for option in (*base.split(), f"data.root={root}", *options)]
    return parse_config("test", "", words).validate()


def train_rank(rank, name, run_dir, options):
    config = config_of(name, run_dir, *options)
    return train(config, rank.join(layout_of(config, rank.launch.world_size)))


def evaluate_rank(rank, name, run_dir, options):
    config = config_of(name, run_dir, *options)
    return evaluate_run(config, rank.join(layout_for_evaluation(config, rank.launch.world_size)))


def draw_rank(rank, name, run_dir, out, options):
    config = config_of(name, run_dir, *options)
    topology = rank.join(layout_for_evaluation(config, rank.launch.world_size))
    return draw(config, topology, None, 7, out)


@pytest.mark.parametrize(
    ("name", "setup"),
    cases(itertools.product(TASKS, SETUPS), fast=[(task, "step") for task in TASKS]),
)
def test_it_trains_resumes_bit_for_bit_evaluates_and_exports(ranks, tmp_path, name, setup):
    world_size, options = SETUPS[setup]
    if setup.startswith("zero"):
        ranks.preload(*DEEPSPEED)
        options = (*options, *engine_options(tmp_path, setup))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    evaluation = ranks.run(world_size, train_rank, name, whole, options)[0]
    half = f"train.max_steps={STEPS // 2}"
    ranks.run(world_size, train_rank, name, parts, (*options, half))
    ranks.run(world_size, train_rank, name, parts, options)
    assert hashes_of(whole, STEPS) == hashes_of(parts, STEPS)

    start = json.loads((whole / "metrics.jsonl").read_text().splitlines()[0])
    assert f"train/{LOSS[name]}/block0" in start
    config = config_of(name, whole, *options)
    written = json.loads((whole / "evaluation.json").read_text())
    main = setup_of(config).task.main.name
    assert written[main] == evaluation.value

    alone = ranks.run(1, evaluate_rank, name, whole, options)[0]
    for key, value in evaluation.figures.items():
        assert alone.figures[key] == pytest.approx(value, rel=1e-4, abs=1e-6, nan_ok=True), key

    export(config, tmp_path / "out")
    answers_of_export_are_the_chains(ranks, name, options, whole, tmp_path, evaluation.value)


def answers_of_export_are_the_chains(ranks, name, options, run_dir, tmp_path, value):
    """Compares a loaded model with the chain: by its figure, or by the samples that both draw."""
    model = dbdist.load(tmp_path / "out")
    if name == "points":
        test_set = load_dataset(config_of(name, run_dir).data, "test")
        batch = test_set.__getitems__([*range(len(test_set))])
        mse = (model(batch) - batch["target"]).square().sum(dim=-1).mean().item()
        assert mse == pytest.approx(value, rel=1e-4)
        return
    chain, alone = tmp_path / "chain", tmp_path / "alone"
    num_blocks = config_of(name, run_dir, *options).num_blocks
    ranks.run(num_blocks, draw_rank, name, run_dir, chain, (*options, "eval.micro_batch_size=3"))
    ranks.run(1, draw_rank, name, run_dir, alone, options)
    drawn = load_file(chain / "samples.safetensors")["samples"]
    torch.testing.assert_close(load_file(alone / "samples.safetensors")["samples"], drawn)
    if name == "masked_text":
        spec = setup_of(config_of(name, run_dir)).spec
        assert model.sample(7) == [spec.decode(ids) for ids in drawn.tolist()]


@pytest.mark.parametrize("name", cases(TASKS, fast=["masked_text"]))
def test_blocks_that_train_by_themselves_and_are_merged_are_the_joint_run(ranks, tmp_path, name):
    private = ("parallel.sync=never",)
    joint, merged = tmp_path / "joint", tmp_path / "merged"
    ranks.run(3, train_rank, name, joint, private)
    for block in range(3):
        own = (*private, f"parallel.blocks={block}")
        ranks.run(1, train_rank, name, tmp_path / f"block-{block}", own)
    merge.run([*(str(tmp_path / f"block-{b}") for b in range(3)), str(merged)])
    assert hashes_of(merged, STEPS) == hashes_of(joint, STEPS)
    found = [ranks.run(3, evaluate_rank, name, d, private)[0].figures for d in (merged, joint)]
    assert json.dumps(found[0]) == json.dumps(found[1])


@pytest.mark.parametrize(
    ("name", "mode"),
    cases(
        itertools.product([n for n in TASKS if n != "points"], ["sequential", "end_to_end"]),
        fast=[("masked_text", "sequential")],
    ),
)
def test_the_other_modes_train_evaluate_and_draw(tmp_path, name, mode):
    config = config_of(name, tmp_path / "run", f"mode={mode}")
    topology = Topology(layout_of(config, 1))
    evaluation = train(config, topology)
    assert evaluation is not None
    again = evaluate_run(config, topology)
    for key, value in evaluation.figures.items():
        assert again.figures[key] == pytest.approx(value, rel=1e-4, abs=1e-6, nan_ok=True), key
    files = draw(config, topology, None, 5)
    assert all(file.is_file() for file in files)
    assert len(load_file(files[0])["samples"]) == 5
