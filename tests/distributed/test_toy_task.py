"""A task of two files, registered by a test: its tensors, its options, and what it may get wrong.

`test_tasks` trains it with every engine and coordinator.
"""

from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from ranks import setup_of
from toy import points_task

import dbdist
from dbdist.checkpoint.manifest import find_checkpoint
from dbdist.commands.export import export
from dbdist.config import registry
from dbdist.config.config import Config
from dbdist.config.parse import parse_config
from dbdist.config.yaml_files import write_yaml
from dbdist.errors import CheckpointError, ConfigError, TopologyError
from dbdist.inference.of_run import evaluate_run, layout_for_evaluation
from dbdist.parallel.layout import Layout, layout_of
from dbdist.parallel.topology import Topology
from dbdist.run.folder import config_of_run
from dbdist.sampling.evaluation import check_figures
from dbdist.training.setup import train

points_task.register()


def config_of(run_dir: Path, *options: str) -> Config:
    points_task.register()
    base = (
        "task.name=points model.num_layers=3 train.batch_size=16 train.max_steps=40 train.lr=0.01 "
        "train.ema_decay=0.5 checkpoint.every_steps=20 checkpoint.keep_last=5 train.log_every=20 "
        f"eval.batch_size=20 eval.micro_batch_size=7 run_dir={run_dir}"
    )
    words = [f"--{option}" for option in (*base.split(), *options)]
    return parse_config("test", "", words).validate()


def train_rank(rank, run_dir, options):
    config = config_of(run_dir, *options)
    return train(config, rank.join(layout_of(config, rank.launch.world_size)))


def evaluate_rank(rank, run_dir, options):
    config = config_of(run_dir, *options)
    return evaluate_run(config, rank.join(layout_for_evaluation(config, rank.launch.world_size)))


def test_its_odd_tensors_are_what_the_model_says_after_training(ranks, tmp_path):
    """Buffer and frozen parameter stay; a tied weight is one; a Linear called norm… is random."""
    ranks.run(3, train_rank, tmp_path, ())
    export(config_of(tmp_path), tmp_path / "out")
    shared = dbdist.load(tmp_path / "out")._answer.denoisers[0].shared
    assert torch.equal(shared.frequencies, 2.0 ** torch.arange(8))
    assert shared.scale.item() == 0.5
    assert shared.mix_out.weight is shared.mix_in.weight
    fresh = setup_of(config_of(tmp_path)).shared(0, torch.device("cpu"))
    assert fresh.normalize_in.weight.std() > 0.1
    assert fresh.mix_out.weight is fresh.mix_in.weight


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (("model.name=vit",), "do not fit together"),
        (("data.name=digits",), "do not fit together"),
        (("task.name=classification", "model.name=points_mlp"), "do not fit together"),
    ],
)
def test_what_does_not_fit_together_is_refused_before_any_process_group(tmp_path, options, match):
    with pytest.raises(ConfigError, match=match):
        setup_of(config_of(tmp_path, *options))


def test_the_options_of_a_runs_own_task_are_options_of_evaluate(tmp_path):
    write_yaml(config_of(tmp_path), tmp_path / "config.yaml")
    words = ["--run_dir", str(tmp_path), "--data.num_points", "30"]
    config = config_of_run("test", "", words)
    assert (config.task.name, config.data.num_points) == ("points", 30)


def test_a_tasks_options_that_change_an_answers_meaning_belong_to_the_model(tmp_path, monkeypatch):
    train(config_of(tmp_path, "mode=sequential", "train.max_steps=2"), Topology(Layout(1)))
    scaled = {"target_scale": 2.0}
    monkeypatch.setattr(points_task.PointsTask, "describe", lambda self: scaled, raising=False)
    config = config_of(tmp_path, "mode=sequential", "train.max_steps=2")
    with pytest.raises(CheckpointError, match=r"a model with task_options .*target_scale"):
        evaluate_run(config, Topology(Layout(1)))


# -- mistakes of whoever writes a task -------------------------------------------------------------


class Wrong(points_task.PointFigures):
    """Figures with one mistake."""

    scores: ClassVar[torch.Tensor] = torch.ones(2, dtype=torch.float64)
    names: ClassVar[dict[str, float]] = {"mse": 1.0}

    def add(self, answer, batch):
        return self.scores

    def result(self, totals):
        return self.names


@pytest.mark.parametrize(
    ("mistake", "match"),
    [
        ({"scores": torch.ones(1).sum()}, r"Wrong gives scores of shape \(\) .* \(2,\)"),
        ({"scores": torch.ones(64)}, r"Wrong gives scores of shape \(64,\)"),
        ({"names": {"mae": 1.0}}, "main figure of PointsTask is mse, but its figures give mae"),
    ],
)
def test_figures_that_cannot_be_read_are_refused_by_name(tmp_path, monkeypatch, mistake, match):
    for name, value in mistake.items():
        monkeypatch.setattr(Wrong, name, value)
    monkeypatch.setattr(points_task.PointsTask, "figures", lambda self: [Wrong()])
    config = config_of(tmp_path, "mode=sequential", "train.max_steps=1")
    with pytest.raises(ConfigError, match=match):
        train(config, Topology(Layout(1)))
    if "scores" in mistake:  # names are compared before the first step
        assert find_checkpoint(tmp_path).step == 1, "what was trained is there"
    monkeypatch.undo()
    evaluation = train(config, Topology(Layout(1)))
    assert evaluation is not None
    assert evaluation.step == 1


class OfRank(points_task.PointFigures):
    """Figures that depend on the process, as networks in files of a node do."""

    def __init__(self, rank):
        self.rank = rank

    def identity(self):
        return f"networks of rank {self.rank}"


def check_own_figures(rank, run_dir):
    config = config_of(run_dir)
    topology = rank.join(layout_of(config, rank.launch.world_size))
    task = setup_of(config).task
    task.figures = lambda: [OfRank(topology.rank)]
    with pytest.raises(TopologyError, match=r"the figures.*networks of rank \d"):
        check_figures(task, config.num_blocks, topology)
    return True


def test_ranks_whose_figures_do_not_add_up_are_refused_on_every_rank(ranks, tmp_path):
    assert ranks.run(3, check_own_figures, tmp_path) == [True] * 3


def test_states_of_another_shape_than_the_tasks_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(points_task.PointsTask, "state_shape", (3,))
    with pytest.raises(ConfigError, match=r"clean gives states of shape \(2,\), .* is \(3,\)"):
        train(config_of(tmp_path, "mode=sequential", "train.max_steps=1"), Topology(Layout(1)))


def test_guidance_needs_an_unconditional_input(tmp_path, monkeypatch):
    monkeypatch.delattr(points_task.PointsTask, "drop", raising=False)
    for option in ("task.condition_dropout=0.1", "sampler.guidance_scale=2"):
        with pytest.raises(ConfigError, match=f"{option.split('=')[0]} is .* no unconditional"):
            setup_of(config_of(tmp_path, option))


@pytest.mark.parametrize("change", ["shape", "missing"])
def test_weights_that_do_not_fill_a_module_are_refused_by_name(tmp_path, monkeypatch, change):
    kind = type(setup_of(config_of(tmp_path)).model)
    real = kind.weights

    def weights(self, module, seed):
        for name, value in real(self, module, seed):
            if name == "head.weight" and change == "missing":
                continue
            yield name, value[:1] if name == "head.weight" else value

    monkeypatch.setattr(kind, "weights", weights)
    with pytest.raises(ConfigError, match=r"the model's weights give .*head\.weight"):
        setup_of(config_of(tmp_path)).shared(0, torch.device("cpu"))


@pytest.mark.parametrize("place", ["toy.points_tasks:PointsTask", "toy.points_task:PointTask"])
def test_a_registry_line_that_leads_nowhere_is_named(tmp_path, monkeypatch, place):
    config = config_of(tmp_path)
    monkeypatch.setitem(registry.TASKS, "points", replace(registry.TASKS["points"], code=place))
    with pytest.raises(ConfigError, match=f"the registry names '{place}', which is not there"):
        setup_of(config)
