"""Files, presets, words and values from Python become one configuration."""

import os
from pathlib import Path

import pytest

from dbdist.config.config import Config
from dbdist.config.options import TrainConfig
from dbdist.config.parse import make_config, parse_config
from dbdist.errors import ConfigError


def parse(*words):
    return parse_config("dbdist test", "", list(words))


def refusal(*words):
    with pytest.raises(ConfigError) as caught:
        parse(*words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "text", ["train:\n#  lr: 1\nseed: 3\n", "seed: 3\ndata:\n", "seed: 3\ndata:\n  augment:\n"]
)
def test_an_empty_section_means_its_defaults(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    assert parse("--config", str(tmp_path / "c.yaml")) == Config(seed=3)


def test_an_empty_section_takes_nothing_away_from_files_before_it(tmp_path):
    (tmp_path / "1.yaml").write_text("train: {lr: 0.5}\n")
    (tmp_path / "2.yaml").write_text("train:\n")
    files = ["--config", str(tmp_path / "1.yaml"), "--config", str(tmp_path / "2.yaml")]
    assert parse(*files).train.lr == 0.5


def test_a_configuration_cannot_name_another(tmp_path):
    (tmp_path / "base.yaml").write_text("train: {lr: 0.5}\n")
    (tmp_path / "c.yaml").write_text(f"config: {tmp_path / 'base.yaml'}\nseed: 3\n")
    told = refusal("--config", str(tmp_path / "c.yaml"))
    assert told == "config stands inside a configuration; give --config once for each file instead"


@pytest.mark.parametrize("value", ["5e4", "50000.0", "5.0e+4", "50_000"])
def test_a_whole_number_is_one_however_it_is_written(tmp_path, value):
    (tmp_path / "c.yaml").write_text(f"train: {{max_steps: {value}, lr: 1.0, betas: [0, 0.5]}}\n")
    for words in (["--config", str(tmp_path / "c.yaml")], [f"--train.max_steps={value}"]):
        train = parse(*words).train
        assert (train.max_steps, type(train.max_steps)) == (50_000, int)
        assert type(train.lr) is float
        assert all(type(beta) is float for beta in train.betas)


def test_a_fraction_is_no_whole_number(tmp_path):
    (tmp_path / "c.yaml").write_text("train: {max_steps: 2.5}\n")
    assert refusal("--config", str(tmp_path / "c.yaml")).startswith("train.max_steps: expected int")


def test_a_number_in_place_of_a_text_is_refused_with_the_way_out(tmp_path):
    (tmp_path / "c.yaml").write_text("run_dir: 5\n")
    message = refusal("--config", str(tmp_path / "c.yaml"))
    assert message == "run_dir: expected text, got 5; put it in quotes"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("run_dir", "~/runs/x"),
        ("run_dir", "~"),
        ("data.root", "~/d"),
        ("parallel.deepspeed_config", "~/z.json"),
    ],
)
def test_home_is_put_in_place_of_its_sign(tmp_path, monkeypatch, key, value):
    monkeypatch.setenv("HOME", "/home/of/me")
    (tmp_path / "c.yaml").write_text(f"{key}: {value if value != '~' else repr(value)}\n")
    expected = value.replace("~", "/home/of/me")
    for words in (["--config", str(tmp_path / "c.yaml")], [f"--{key}={value}"]):
        result = parse(*words)
        for name in key.split("."):
            result = getattr(result, name)
        assert result == expected
    (tmp_path / "f.yaml").write_text("seed: 7\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse("--config", "~/f.yaml").seed == 7


@pytest.mark.timeout(30)
def test_a_fifo_is_refused_wherever_a_file_may_stand(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "c.yaml").write_text(f"train: {tmp_path / 'fifo'}\n")
    for words in (
        ["--config", str(tmp_path / "fifo")],
        ["--train", str(tmp_path / "fifo")],
        [f"--data.augment={tmp_path / 'fifo'}"],
        ["--config", str(tmp_path / "c.yaml")],
    ):
        assert refusal(*words)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("configs/digits.yml", "preset digits"),
        ("digit", "preset digits"),
        ("cifar-100", "preset cifar100"),
        ("mine.yml", "mine.yaml"),
        ("mien.yaml", "mine.yaml"),
    ],
)
def test_a_missing_file_names_the_nearest(tmp_path, monkeypatch, given, meant):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("seed: 1\n")
    message = refusal("--config", given)
    assert message.startswith(f"{given} is neither a file nor a preset; did you mean ")
    assert meant in message


def test_the_name_of_a_data_set_in_place_of_a_file_says_where_it_goes():
    assert "--data.name cifar10" in refusal("--config", "cifar10")


def test_a_key_of_another_model_says_whose_it_is():
    message = refusal("--config", "digits-dit", "--model.name", "vit")
    assert message == "unknown key model.label_std; it is one of model.name: dit"
    message = refusal("--task.name", "masked_text", "--data.image_size", "8")
    assert message.startswith("unknown option --data.image_size; it is one of data.name: digits or")


def test_presets_are_found_from_anywhere_and_a_file_of_that_name_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("digits").mkdir()  # a folder is no configuration
    assert parse("--config", "digits").run_dir == "runs/digits"
    Path("digits").rmdir()
    Path("digits").write_text("seed: 9\n")
    assert parse("--config", "digits") == Config(seed=9)


# -- from Python -----------------------------------------------------------------------------------


def test_python_gives_a_config_a_path_a_preset_or_a_mapping(tmp_path):
    (tmp_path / "c.yaml").write_text("train: {lr: 0.5}\n")
    expected = Config(seed=2, train=TrainConfig(lr=0.5))
    for given in (
        expected,
        {"train": {"lr": 0.5}, "seed": 2},
        {"train.lr": 0.5, "seed": 2},
    ):
        assert make_config(given, {}) == expected
    assert make_config(tmp_path / "c.yaml", {"seed": 2}) == expected
    assert make_config(str(tmp_path / "c.yaml"), {"seed": 2}) == expected
    assert make_config("digits", {}).run_dir == "runs/digits"


def test_pythons_overrides_win_and_take_pythons_values(tmp_path):
    overrides = {
        "train__lr": 0.25,
        "train.betas": (0.5, 0.75),
        "model": {"layers_per_block": [1, 2]},
        "run_dir": tmp_path,
        "sampler__readout": "last",
        "train__clip_norm": None,
    }
    config = make_config(Config(seed=4, train=TrainConfig(lr=0.5, eps=1e-3)), overrides)
    assert (config.seed, config.train.lr, config.train.eps) == (4, 0.25, 1e-3)
    assert config.train.betas == (0.5, 0.75)
    assert config.model.layers_per_block == (1, 2)
    assert config.run_dir == str(tmp_path)
    assert (config.sampler.readout, config.train.clip_norm) == ("last", None)


@pytest.mark.parametrize(
    ("given", "overrides", "message"),
    [
        ({"train": {"lrr": 1}}, {}, "did you mean train.lr"),
        ({}, {"train__lrr": 1}, "did you mean train.lr"),
        ({}, {"train__lr": "fast"}, "train.lr"),
        ({}, {"train__lr": object()}, "cannot be used"),
        ({}, {"train__lr": 1, "train": {"lr": 2}}, "train.lr stands twice"),
        ("nothing", {}, "nothing is neither a file nor a preset"),
        (5, {}, "not int"),
    ],
)
def test_pythons_mistakes_are_the_commands(given, overrides, message):
    with pytest.raises(ConfigError, match=message):
        make_config(given, overrides)
