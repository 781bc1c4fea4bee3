"""`dbdist sample`: what is asked for, where it goes, and what is refused beforehand."""

import pytest
import torch
from latent_folders import write
from ranks import config_of
from safetensors.torch import load_file

from dbdist.commands import sample
from dbdist.errors import ConfigError, UserError
from dbdist.inference import samples
from dbdist.parallel.layout import Layout
from dbdist.parallel.topology import Topology
from dbdist.training.setup import train

SIZES = ("model.hidden_size=8", "model.num_heads=2", "model.patch_size=2", "task.features=none")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A generator of 4 x 4 digits, trained for one step."""
    run_dir = tmp_path_factory.mktemp("sample") / "run"
    options = (*SIZES, "data.image_size=4", "sampler.num_steps=4", "train.max_steps=1")
    words = ("task.name=generation", "mode=sequential", *options, f"run_dir={run_dir}")
    train(config_of(*words), Topology(Layout(1)))
    return run_dir


def test_rows_that_did_not_arrive_are_missed(tmp_path):
    with pytest.raises(ConfigError, match="holds 0 of 3 samples: it must be one folder"):
        samples._join(tmp_path, "token", 3)


def drawn(folder):
    return load_file(folder / samples.SAMPLES)


def test_classes_go_round_and_files_are_where_they_are_said_to_be(run_dir, capsys):
    sample.run([str(run_dir), "--classes", "2-3,7", "--num", "5", "--seed", "4"])
    (folder,) = run_dir.glob("samples-step-00000001-seed-4-*")
    assert drawn(folder)["label"].tolist() == [2, 3, 7, 2, 3]
    assert drawn(folder)["samples"].shape == (5, 1, 4, 4)
    printed = [line for line in capsys.readouterr().out.splitlines() if "sample-" in line]
    assert printed == [str(folder / f"sample-{i:05}.png") for i in range(5)]


def test_a_sample_depends_on_seed_and_number_and_options_of_the_sampler_count(run_dir, tmp_path):
    def draw(*words, num=3):
        sample.run([str(run_dir), "--num", str(num), "--out", str(tmp_path / "out"), *words])
        return drawn(tmp_path / "out")["samples"]

    first = draw("--seed", "1")
    assert torch.equal(first, draw("--seed", "1", "--eval.micro_batch_size", "64"))
    assert torch.equal(first[:2], draw("--seed", "1", num=2)[:2])
    assert len(list((tmp_path / "out").iterdir())) == 4, "earlier samples make room"
    assert not torch.equal(first, draw("--seed", "2"))
    assert not torch.equal(first, draw("--seed", "1", "--sampler.num_steps", "5"))


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (("--num", "0"), "--num is 0; it must be at least 1"),
        (("--classes", "a-b"), "--classes is 'a-b'; it must be numbers"),
        (("--classes", "9-10"), "10 is no class of digits; they are 0 to 9"),
        (("--vae", "nowhere"), "--vae decodes latents, but .*run makes none"),
        (("--guidance", "-1"), "sampler.guidance_scale"),
    ],
)
def test_what_cannot_be_drawn_is_refused_and_nothing_written(run_dir, tmp_path, words, match):
    with pytest.raises(ConfigError, match=match):
        sample.run([str(run_dir), "--out", str(tmp_path / "out"), *words])
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_left_alone(run_dir, tmp_path):
    (tmp_path / "sample-list.csv").write_text("years of work")
    with pytest.raises(ConfigError, match=r"holds sample-list\.csv, which is no sample"):
        sample.run([str(run_dir), "--num", "2", "--out", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["sample-list.csv"]


def test_a_task_that_draws_nothing_says_so(tmp_path):
    words = ("mode=sequential", "train.max_steps=1", f"run_dir={tmp_path / 'run'}")
    train(config_of(*words), Topology(Layout(1)))
    with pytest.raises(ConfigError, match="draws no samples"):
        sample.run([str(tmp_path / "run")])


def test_latents_are_drawn_as_latents_and_a_missing_autoencoder_is_refused(tmp_path):
    write(tmp_path / "latents")
    data = ("data.name=latents", f"data.root={tmp_path / 'latents'}", "train.batch_size=8")
    words = ("task.name=generation", "mode=sequential", *SIZES, *data, "train.max_steps=1")
    train(config_of(*words, f"run_dir={tmp_path / 'run'}"), Topology(Layout(1)))
    sample.run([str(tmp_path / "run"), "--num", "2", "--sampler.num_steps", "3"])
    (folder,) = (tmp_path / "run").glob("samples-step-00000001-seed-0-*")
    assert [path.name for path in folder.iterdir()] == [samples.SAMPLES]
    assert drawn(folder)["samples"].shape == (2, 4, 6, 6)
    with pytest.raises(UserError, match=r"config\.json is missing"):
        sample.run([str(tmp_path / "run"), "--vae", str(tmp_path)])
