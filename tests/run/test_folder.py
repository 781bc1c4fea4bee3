"""A run directory belongs to one configuration: what may change when a run is continued."""

import dataclasses
from pathlib import Path
from typing import get_args

import pytest

from dbdist.config.config import Config
from dbdist.config.options import TrainConfig
from dbdist.errors import ConfigError
from dbdist.run import folder as run_dir
from dbdist.run.folder import MAY_CHANGE, read_config

OTHER = {str: "other", int: 12345, float: 0.12345}
"""Another value of this type."""


def leaves(kind=Config, prefix=""):
    """(dotted key, a value that is not the default) of every option."""
    for field in dataclasses.fields(kind):
        key = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(field.type):
            yield from leaves(field.type, f"{key}.")
        elif type(field.default) is bool:
            yield key, not field.default
        elif words := [c for c in get_args(field.type) if isinstance(c, str)]:
            yield key, next((word for word in words if word != field.default), words[0])
        else:
            kinds = [kind for kind in get_args(field.type) if kind in OTHER] or [field.type]
            yield key, OTHER.get(kinds[0])


ALL = dict(leaves())
ALL |= {"model.layers_per_block": (1, 2, 3), "checkpoint.resume": True}
ALL |= {"train.betas": (0.5, 0.5), "sampler.readout": "all", "data.name": "cifar10"}
SINGLE = ("model.name", "task.name")  # there is one architecture and one task so far


def is_free(key):
    return any(key == may or key.startswith(f"{may}.") for may in MAY_CHANGE)


def changed(config, key, value):
    section, _, rest = key.partition(".")
    inner = changed(getattr(config, section), rest, value) if rest else value
    return dataclasses.replace(config, **{section: inner})


@pytest.fixture
def claim(monkeypatch):
    """What a run does with its directory, as if this were the step of its newest checkpoint."""

    def check_and_claim(config, num_train, step):
        found = [] if step is None else [Path(f"step-{step:08d}")]
        monkeypatch.setattr(run_dir, "saved_folders", lambda *_: found)
        run_dir.check_run_dir(config)
        run_dir.claim(config, num_train, step)

    return check_and_claim


def held_by(path):
    return Config(run_dir=str(path), train=TrainConfig(max_steps=10))


@pytest.mark.parametrize("key", [k for k in ALL if not is_free(k) and k not in SINGLE])
def test_a_changed_key_is_refused_by_name_and_nothing_is_touched(tmp_path, key, claim):
    config = held_by(tmp_path)
    claim(config, 1000, 4)
    before = (tmp_path / "config.yaml").read_bytes()
    with pytest.raises(ConfigError) as caught:
        claim(changed(config, key, ALL[key]), 1000, 4)
    assert f" {key} " in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert (tmp_path / "config.yaml").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]


def test_what_does_not_change_the_steps_already_taken_may_change(tmp_path, claim):
    claim(held_by(tmp_path), 1000, 4)
    config = held_by(tmp_path)
    free = [key for key in ALL if is_free(key) and key != "run_dir"]
    assert len(free) > len(MAY_CHANGE)
    for key in free:
        config = changed(config, key, ALL[key])
    config = changed(config, "parallel.blocks", None)
    claim(config, 1000, 4)
    config = changed(config, "checkpoint.fallback", False)  # each start says that for itself
    assert read_config(tmp_path) == config


def test_every_key_that_may_change_is_a_key_of_the_configuration():
    sections = {f.name for f in dataclasses.fields(Config)}
    assert set(MAY_CHANGE) <= sections | ALL.keys()


def test_a_new_directory_is_made_and_claiming_twice_changes_nothing(tmp_path, claim):
    config = held_by(tmp_path / "a/b")
    assert read_config(tmp_path / "a/b") is None
    claim(config, 1000, 4)
    before = (tmp_path / "a/b/config.yaml").read_bytes()
    claim(config, 1000, 4)
    assert (tmp_path / "a/b/config.yaml").read_bytes() == before
    assert read_config(tmp_path / "a/b") == config


def test_a_moved_run_is_continued_where_it_is(tmp_path, claim):
    claim(held_by(tmp_path / "old"), 1000, 4)
    (tmp_path / "old").rename(tmp_path / "new")
    claim(held_by(tmp_path / "new"), 1000, 4)
    assert read_config(tmp_path / "new") == held_by(tmp_path / "new")


@pytest.mark.parametrize(
    "content", [b"", b"- 1", b"lr: 5", b"train: 5", b"a: [", b"\xff\xfe", b"\0"]
)
def test_a_damaged_configuration_is_refused_and_not_overwritten(tmp_path, content, claim):
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=str(tmp_path)):
        claim(held_by(tmp_path), 1000, 4)
    assert (tmp_path / "config.yaml").read_bytes() == content


def test_a_directory_that_cannot_be_made_is_refused_by_name(tmp_path, claim):
    (tmp_path / "file").write_text("")
    for name in ("file", "file/inside"):
        with pytest.raises(ConfigError, match="run_dir"):
            claim(held_by(tmp_path / name), 1000, 4)
    assert (tmp_path / "file").read_text() == ""


def test_the_name_of_a_run_without_its_folder_names_the_run(tmp_path, claim, monkeypatch):
    monkeypatch.chdir(tmp_path)
    claim(Config(run_dir="runs/mine"), 100, None)
    with pytest.raises(ConfigError, match="did you mean runs/mine"):
        run_dir.config_file_of(Path("mine"))


def test_lists_and_tuples_are_the_same_value(tmp_path, claim):
    config = changed(held_by(tmp_path), "model.layers_per_block", (1, 2, 3))
    claim(config, 1000, 4)
    claim(config, 1000, 4)
    with pytest.raises(ConfigError, match=r"model\.layers_per_block"):
        claim(held_by(tmp_path), 1000, 4)


def test_a_directory_where_nothing_was_trained_may_be_claimed_by_another(tmp_path, claim):
    claim(held_by(tmp_path), 1000, None)
    other = changed(held_by(tmp_path), "train.lr", 0.5)
    claim(other, 1000, None)
    assert read_config(tmp_path) == other
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match=r"train\.lr"):
        claim(held_by(tmp_path), 1000, None)


def test_a_run_is_not_continued_to_fewer_steps_than_it_has(tmp_path, claim):
    claim(held_by(tmp_path), 1000, None)
    with pytest.raises(ConfigError, match="step 20 already"):
        claim(held_by(tmp_path), 1000, 20)


def test_the_end_of_a_cosine_may_not_move_unnoticed(tmp_path, claim):
    cosine = changed(held_by(tmp_path), "train.schedule", "cosine")
    claim(cosine, 1000, None)
    longer = changed(cosine, "train.max_steps", 20)
    with pytest.raises(ConfigError, match=r"set train\.schedule_steps to 10"):
        claim(longer, 1000, 10)
    claim(changed(longer, "train.schedule_steps", 10), 1000, 10)
