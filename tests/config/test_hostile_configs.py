"""Configurations that were changed: used, or refused in one sentence; nothing in them runs."""

import json
from pathlib import Path

import pytest
import yaml
from hostile import changed_bytes, changed_json, few
from hypothesis import given, settings
from hypothesis import strategies as st

from dbdist.config.config import Config
from dbdist.config.options import TrainConfig
from dbdist.config.parse import parse_config
from dbdist.config.yaml_files import write_yaml
from dbdist.errors import ConfigError
from dbdist.run.folder import read_config

pytestmark = pytest.mark.timeout(120)
CANARY = "canary"
"""A file in the working directory that every payload would make."""
PAYLOADS = (
    f"!!python/object/apply:os.system ['touch {CANARY}']",
    f"!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [{CANARY}]]",
    f"!!python/object/new:subprocess.Popen [['touch', '{CANARY}']]",
    "!!python/name:os.system",
    "!!python/module:os",
    f"{{class_path: subprocess.Popen, init_args: {{args: [touch, {CANARY}]}}}}",
    f"{{class_path: os.system, dict_kwargs: {{command: touch {CANARY}}}}}",
    f"$(touch {CANARY})",
    f"`touch {CANARY}`",
    "${oc.env:HOME}",
)
LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
WORDS = tuple(
    text.encode()
    for text in (
        *(f" {payload}\n" for payload in PAYLOADS),
        *("&a ", "*a", "<<: *a\n", "? ", "---\n", "\t"),
        *("!!set ", "!!binary ", "!!int ", "!!float "),
        *("9" * 400, "9" * 5000, "1e400", ".nan", "-.inf", "0x", "0b2", "2020-13-45"),
        *("[" * 200, "{a: " * 100, "null", "~", "''", '"\\0"', "'", "\u2028"),
        *("../x", "/etc/passwd", "%YAML 9\n"),
    )
)


@pytest.fixture(autouse=True)
def canary(tmp_path, monkeypatch):
    """A working directory in which nothing may appear that a configuration asked for."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not Path(CANARY).exists()


def original(tmp_path):
    write_yaml(Config(train=TrainConfig(max_steps=3)), tmp_path / "original.yaml")
    return (tmp_path / "original.yaml").read_bytes()


def use(content, folder):
    """What training and evaluation read of a configuration file."""
    (folder / "config.yaml").write_bytes(content)
    try:
        config = read_config(folder)  # which is the parser's --config, too
        assert config is not None
        config.validate()
    except ConfigError as error:
        assert_one_sentence(error)


def assert_one_sentence(error):
    assert "\n" not in str(error)
    assert not Path(CANARY).exists()


@settings(few, max_examples=25)
@given(data=st.data())
def test_a_changed_configuration_is_used_or_refused(tmp_path, data):
    use(data.draw(changed_bytes(original(tmp_path), WORDS)), tmp_path)


@pytest.mark.slow
@settings(few, max_examples=25)
@given(data=st.data())
def test_a_configuration_with_other_values_is_used_or_refused(tmp_path, data):
    values = yaml.safe_load(original(tmp_path))
    changed = data.draw(changed_json(values))
    use(json.dumps(changed).encode(), tmp_path)  # JSON is YAML


@pytest.mark.parametrize("place", ["{}", "run_dir: {}", "train: {}", "model:\n  num_blocks: {}"])
def test_payloads_run_nothing(tmp_path, place):
    for payload in PAYLOADS:
        use(place.format(payload).encode(), tmp_path)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "content",
    [
        LAUGHS,
        LAUGHS + "train: *i\n",
        "train: &a [*a]",
        "train: &a {lr: *a}",
        "train: " + "[" * 50_000,
        "train: " + "{a: " * 5_000,
        "? " * 20_000,
        "seed: " + "9" * 60_000,
        "a: " + "x" * 10**7,
        "model: {num_layers: 1000000000, num_blocks: 1000000000}\ntrain: {max_steps: 1}",
        "sampler: {num_steps: 1000000000}\ntrain: {max_steps: 1}",
        "train: {max_steps: 1, lr: " + "9" * 400 + "}",
        "train: {max_steps: 1}\nnoise: {p_mean: " + "9" * 400 + "}",
        'train: {max_steps: 1}\nrun_dir: "a\\0b"',
        f"train: {{max_steps: 1}}\nrun_dir: {'x' * 300}",
    ],
    ids=lambda content: content[:25],
)
def test_what_asks_for_too_much_is_refused_at_once(tmp_path, content):
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(ConfigError) as caught:
        parse_config("test", "", ["--config", str(tmp_path / "config.yaml")]).validate()
    assert_one_sentence(caught.value)
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize(
    "words", [("--train.lr", "9" * 400), ("--seed", "9" * 5000), ("--train", "[" * 3000)]
)
def test_numbers_beyond_numbers_on_the_command_line_are_refused(words):
    with pytest.raises(ConfigError):
        parse_config("test", "", ["--train.max_steps", "3", *words]).validate()


def test_a_few_aliases_are_no_harm(tmp_path):
    (tmp_path / "config.yaml").write_text("train: {max_steps: &n 3, warmup_steps: *n}\n")
    config = parse_config("test", "", ["--config", str(tmp_path / "config.yaml")]).validate()
    assert (config.train.max_steps, config.train.warmup_steps) == (3, 3)
