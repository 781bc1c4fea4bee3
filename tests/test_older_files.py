"""What an older version wrote (tests/fixtures/29b4ae5) is continued, evaluated and loaded."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import dbdist
from dbdist.checkpoint.manifest import find_checkpoint
from dbdist.commands import export, merge
from dbdist.data.sources import load_dataset
from dbdist.inference.of_run import evaluate_run
from dbdist.parallel.layout import Layout, layout_of
from dbdist.parallel.topology import Topology
from dbdist.run.folder import config_of_run
from dbdist.training.setup import train

FIXTURE = Path(__file__).parent / "fixtures/29b4ae5"
RUNS = ["step", "never"]


def copy_of(name, tmp_path):
    return Path(shutil.copytree(FIXTURE / name, tmp_path / name))


def config_of_copy(run_dir, *options):
    return config_of_run("test", "", ["--run_dir", str(run_dir), *options])


def recorded(name):
    return json.loads((FIXTURE / name / "evaluation.json").read_text())


@pytest.mark.parametrize("name", RUNS)
def test_an_older_run_is_evaluated_to_the_accuracy_that_it_recorded(tmp_path, name):
    run_dir = copy_of(name, tmp_path)
    (run_dir / "evaluation.json").unlink()
    evaluate_run(config_of_copy(run_dir), Topology(Layout(1)))
    now = json.loads((run_dir / "evaluation.json").read_text())
    for key in ("accuracy", "accuracy_after_block", "num_samples", "step"):
        assert now[key] == pytest.approx(recorded(name)[key])


def go_on(rank, run_dir):
    config = config_of_copy(run_dir, "--train.max_steps", "84")
    topology = rank.join(layout_of(config, 3))
    evaluation = train(config, topology)
    topology.close()
    return evaluation.to_json()["accuracy"]


@pytest.mark.parametrize("name", RUNS)
def test_an_older_run_is_continued(ranks, tmp_path, name):
    run_dir = copy_of(name, tmp_path)
    for accuracy in ranks.run(3, go_on, str(run_dir)):
        assert accuracy > recorded(name)["accuracy"] - 0.1
    assert find_checkpoint(run_dir).step == 84
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps[-2:] == [80, 84]


def test_blocks_of_older_runs_are_merged(tmp_path):
    a, b = copy_of("never", tmp_path / "a"), copy_of("never", tmp_path / "b")
    for run_dir, away in ((a, (1, 2)), (b, (0,))):
        folder = run_dir / "checkpoints/step-00000080"
        (folder / "manifest.json").unlink()
        for block in away:
            for file in folder.glob(f"block-{block}.*"):
                file.unlink()
    merge.run([str(a), str(b), str(tmp_path / "out")])
    evaluate_run(config_of_copy(tmp_path / "out"), Topology(Layout(1)))
    now = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert now["accuracy"] == pytest.approx(recorded("never")["accuracy"])


def test_an_older_exported_model_is_loaded_and_answers_as_then(tmp_path):
    """And an older run is exported to the same weights."""
    model = dbdist.load(FIXTURE / "exported")
    run_dir = copy_of("step", tmp_path)
    test_set = load_dataset(config_of_copy(run_dir).data, "test")
    batch = test_set.__getitems__([*range(len(test_set))])
    mean, std = (torch.tensor(getattr(test_set.spec, k)).view(-1, 1, 1) for k in ("mean", "std"))
    pixels = (batch["image"] * std + mean).clamp(0, 1)
    accuracy = (model.predict(pixels) == batch["label"]).double().mean().item()
    assert accuracy == pytest.approx(recorded("step")["accuracy"])
    export.run([str(run_dir), str(tmp_path / "out")])
    then, now = (
        load_file(p / "model.safetensors") for p in (FIXTURE / "exported", tmp_path / "out")
    )
    assert then.keys() == now.keys()
    assert all(torch.equal(then[name], now[name]) for name in then)
