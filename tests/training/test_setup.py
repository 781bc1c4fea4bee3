"""Setting a run up: what is refused before anything is written, what is warned about."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from ranks import warnings_from_now_on
from reading import hashes_of
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dbdist import log
from dbdist.checkpoint.manifest import find_checkpoint
from dbdist.commands import export
from dbdist.config.parse import parse_config
from dbdist.data.loader import BatchStream
from dbdist.data.sources import load_dataset
from dbdist.errors import CheckpointError, ConfigError, DataError, Fault
from dbdist.inference.of_run import evaluate_run
from dbdist.parallel.layout import Layout, layout_of
from dbdist.parallel.topology import Topology
from dbdist.run.folder import config_of_run
from dbdist.training.setup import train
from dbdist.training.trainer import Trainer

SMALL = (
    "--mode sequential --data.name image_folder --data.image_size 8 --model.num_blocks 2 "
    "--model.num_layers 2 --model.hidden_size 8 --model.num_heads 2 --model.patch_size 4 "
    "--train.batch_size 4 --train.lr 0.01"
).split()


def alone():
    return Topology(Layout(1))


@pytest.fixture(autouse=True)
def usual_terminal():
    yield
    log.share_terminal(None)


def make_pictures(root, classes=("cat", "dog"), num=(6, 3)):
    """Dark cats and bright dogs."""
    for split, count in zip(("train", "val"), num, strict=True):
        for shade, name in zip((20, 235), classes, strict=True):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.full((8, 8, 3), shade + i, dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")


def config_of(folder, *options, steps=4):
    words = ["--data.root", folder / "d", "--run_dir", folder / "run", "--train.max_steps", steps]
    return parse_config("test", "", [*SMALL, *map(str, words), *options]).validate()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    make_pictures(folder / "d")
    train(config_of(folder), alone())
    return folder


@pytest.fixture
def folder(trained, tmp_path):
    """A run of four steps and its data, to be changed."""
    return Path(shutil.copytree(trained, tmp_path / "copy"))


@pytest.mark.usefixtures("pictures")
def test_levels_and_where_they_were_trained_are_drawn(tmp_path):
    make_pictures(tmp_path / "d")
    train(config_of(tmp_path), alone())
    events = EventAccumulator(str(tmp_path / "run"), {"images": 0}).Reload()
    assert set(events.Tags()["images"]) == {
        "train/levels",
        "train/sigma_cross_entropy/block0",
        "train/sigma_cross_entropy/block1",
    }


def evaluated(folder, *options):
    words = ["--run_dir", str(folder / "run"), "--data.root", str(folder / "d"), *options]
    return evaluate_run(config_of_run("test", "", words), alone())


def rename_a_class(folder):
    for split in ("train", "val"):
        (folder / "d" / split / "cat").rename(folder / "d" / split / "wildcat")


def test_classes_that_changed_are_refused_by_name(folder):
    rename_a_class(folder)
    before = sorted(p.name for p in (folder / "run/checkpoints").iterdir())
    with pytest.raises(CheckpointError, match=r"trained with classes cat, dog.* dog, wildcat"):
        train(config_of(folder, steps=6), alone())
    with pytest.raises(CheckpointError, match=r"trained with classes cat, dog.* dog, wildcat"):
        evaluated(folder)
    assert sorted(p.name for p in (folder / "run/checkpoints").iterdir()) == before


def test_an_export_needs_the_run_alone(folder):
    """The classes are those of training, whatever lies in the data set's folder today."""
    shutil.rmtree(folder / "d")
    export.run([str(folder / "run"), str(folder / "out")])
    config = json.loads((folder / "out/config.json").read_text())
    assert config["data"]["class_names"] == ["cat", "dog"]


def test_training_samples_that_changed_are_refused_and_a_copy_elsewhere_is_not(folder):
    (folder / "d").rename(folder / "elsewhere")
    moved = ("--data.root", str(folder / "elsewhere"))
    train(config_of(folder, *moved, steps=5), alone())
    (folder / "elsewhere/train/dog/0.png").unlink()
    with pytest.raises(CheckpointError, match=r"other samples \(12 then, 11 now\)"):
        train(config_of(folder, *moved, steps=6), alone())
    (folder / "elsewhere/train/dog/new.png").write_bytes(
        (folder / "elsewhere/train/dog/1.png").read_bytes()
    )
    with pytest.raises(CheckpointError, match=r"as many, but not the same"):
        train(config_of(folder, *moved, steps=6), alone())


def test_a_damaged_part_does_not_stop_a_run_whose_checkpoint_is_intact(folder):
    (folder / "run/checkpoints/step-00000004/block-0.part.json").write_text("{")
    train(config_of(folder, steps=5), alone())
    assert find_checkpoint(folder / "run").step == 5


def test_another_test_set_is_warned_of(folder):
    (folder / "d/val/dog/0.png").unlink()
    told = warnings_from_now_on()
    before = (folder / "run/evaluation.json").read_bytes()
    evaluated(folder)
    assert (folder / "run/evaluation.json").read_bytes() == before
    assert len(list((folder / "run").glob("evaluation-*.json"))) == 1
    train(config_of(folder, steps=5), alone())
    assert [line.partition(" was ")[2] for line in told] == [
        "trained beside another test set (6 then, 5 now); the figures do not compare"
    ] * 2


def test_a_manifest_holds_what_identifies_the_data(trained):
    data = find_checkpoint(trained / "run").manifest["data"]
    assert data["class_names"] == data["spec"]["class_names"] == ["cat", "dog"]
    assert [data[split]["num_samples"] for split in ("train", "test")] == [12, 6]
    assert all(len(data[split]["digest"]) == 64 for split in ("train", "test"))


def test_another_evaluation_leaves_the_runs_own_as_it_is(folder):
    path = folder / "run/evaluation.json"
    before = path.read_bytes()
    evaluated(folder, "--sampler.num_steps", "6")
    (other,) = set((folder / "run").glob("evaluation*.json")) - {path}
    assert json.loads(other.read_text())["sampler"]["num_steps"] == 6
    assert path.read_bytes() == before
    evaluated(folder)
    assert path.read_bytes() != before, "the run's own settings"
    train(config_of(folder, steps=6), alone())
    evaluated(folder, "--eval.step", "4")
    assert json.loads((folder / "run/evaluation-step-00000004.json").read_text())["step"] == 4


def test_a_result_that_cannot_be_written_is_shown(folder, capsys, monkeypatch):
    def refuse(path, content):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("dbdist.inference.of_run.write_json", refuse)
    evaluated(folder)
    shown = capsys.readouterr()
    assert "accuracy" in shown.out
    assert "cannot be written (Read-only file system); the result is only shown" in shown.err


def test_checkpoints_that_cannot_be_written_are_found_before_the_first_step(tmp_path, monkeypatch):
    make_pictures(tmp_path / "d")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoints").write_text("a file")
    monkeypatch.setattr(Trainer, "train_step", None)
    with pytest.raises(ConfigError, match=r"run/checkpoints \((File exists|Not a directory)\)"):
        train(config_of(tmp_path), alone())
    assert not (tmp_path / "run/config.yaml").exists()


@pytest.mark.parametrize("steps", [3, 5])
def test_a_warm_up_that_never_ends_is_warned_of(tmp_path, steps):
    make_pictures(tmp_path / "d")
    told = warnings_from_now_on()
    train(config_of(tmp_path, "--train.warmup_steps", "4", steps=steps), alone())
    expected = "train.warmup_steps is 4, the last step is 3: the learning rate never comes to"
    assert [line[: len(expected)] for line in told] == [expected] * (steps == 3)


@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_a_run_directory_that_is_lost_on_the_way_is_a_fault(tmp_path, monkeypatch, how):
    make_pictures(tmp_path / "d")
    step_of = Trainer.train_step

    def lose(self, step):
        step_of(self, step)
        if step == 1:
            (tmp_path / "run").rename(tmp_path / "away")
            if how == "replaced":
                shutil.copytree(tmp_path / "away", tmp_path / "run")

    monkeypatch.setattr(Trainer, "train_step", lose)
    with pytest.raises(Fault, match=r"run was removed or replaced while it was trained"):
        train(config_of(tmp_path), alone())


# -- damaged data ----------------------------------------------------------------------------------


def damage(config, block, step):
    """A picture of the training set that this block first meets in this step; its path."""
    dataset = load_dataset(config.data, "train")
    stream = BatchStream(dataset, config.train.batch_size, config.seed, block)
    seen = {i for s in range(step) for i in stream.indices_of_step(s)}
    index = next(i for i in stream.indices_of_step(step) if i not in seen)
    name, number = ("cat", index) if index < len(dataset) // 2 else ("dog", index % 15)
    path = Path(config.data.root, "train", name, f"{number}.png")
    path = sorted(path.parent.iterdir())[number]
    path.write_bytes(b"no picture")
    return f"{name}/{path.name} is not a readable image"


def test_a_damaged_picture_ends_a_run_with_what_was_trained_saved(tmp_path):
    make_pictures(tmp_path / "d", num=(15, 3))
    config = config_of(tmp_path, "--model.num_blocks", "1")
    damaged = damage(config, 0, 2)
    with pytest.raises(DataError, match=damaged) as caught:
        train(config, alone())
    step = find_checkpoint(tmp_path / "run").step
    assert step == 3, "the step that met it, with the batch before"
    assert f"step {step} is saved" in str(caught.value)


def train_on_a_damaged_set(rank, folder):
    config = config_of(Path(folder), "--mode", "block_parallel")
    topology = rank.join(layout_of(config, 2))
    topology.start_watch(60.0, lambda line: None)
    with pytest.raises(DataError) as caught:
        train(config, topology)
    topology.close()
    return str(caught.value)


def test_all_ranks_save_and_end_where_one_meets_a_damaged_picture(ranks, tmp_path):
    """Whichever meets one first: block 1 does in its third step, block 0 perhaps before."""
    make_pictures(tmp_path / "d", num=(15, 3))
    config = config_of(tmp_path, "--mode", "block_parallel")
    damaged = damage(config, 1, 2)
    told = ranks.run(2, train_on_a_damaged_set, str(tmp_path))
    assert told[0] == told[1]
    step = find_checkpoint(tmp_path / "run").step
    assert damaged in told[0]
    assert f"step {step} is saved" in told[0]
    assert told[0].startswith("rank ")


def test_the_plain_control_leaves_out_what_only_a_conditioned_task_drops(folder):
    """Its images are its input; nothing is left if they are dropped."""
    trained_with = {}
    for dropped in ("0.0", "0.5"):
        words = ("--run_dir", str(folder / dropped), "--mode", "end_to_end")
        train(config_of(folder, *words, "--task.condition_dropout", dropped), alone())
        trained_with[dropped] = hashes_of(folder / dropped)
    assert trained_with["0.0"] == trained_with["0.5"]
