"""dbdist.train and dbdist.evaluate from Python: what they take, return and raise."""

import importlib
import sys
from types import ModuleType

import pytest

import dbdist
from dbdist.errors import CheckpointError, ConfigError, TopologyError, UserError
from dbdist.sampling.evaluation import Evaluation

SMALL = {
    "mode": "end_to_end",
    "data": {"name": "digits"},
    "model": {"num_layers": 1, "hidden_size": 16, "num_heads": 2},
}


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def test_python_trains_evaluates_and_continues(tmp_path):
    run_dir = tmp_path / "läufe"
    trained = dbdist.train(SMALL, run_dir=run_dir, train__max_steps=2, eval__batch_size=64)
    assert isinstance(trained, Evaluation)
    assert trained.step == 2
    again = dbdist.evaluate(run_dir, eval__micro_batch_size=32)
    assert again.value == pytest.approx(trained.value)
    with pytest.raises(ConfigError, match=r"train\.lr"):
        dbdist.train(SMALL, run_dir=run_dir, train__max_steps=3, train__lr=0.5)
    longer = dbdist.train(run_dir / "config.yaml", run_dir=run_dir, train__max_steps=3)
    assert longer.step == 3


@pytest.mark.parametrize(
    ("kind", "call"),
    [
        (TopologyError, lambda: dbdist.train("digits")),
        (ConfigError, lambda: dbdist.train("digit")),
        (ConfigError, lambda: dbdist.train({}, train__lrr=1)),
        (ConfigError, lambda: dbdist.train({"train": {"max_steps": -1}})),
        (ConfigError, lambda: dbdist.evaluate("nowhere")),
        (ConfigError, lambda: dbdist.train(SMALL, run_dir="caf\udce9", train__max_steps=1)),
        (CheckpointError, lambda: dbdist.train(SMALL, train__max_steps=1, checkpoint__resume=True)),
    ],
)
def test_mistakes_are_raised_and_end_nothing(kind, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        call()
    assert type(caught.value) is kind


@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_the_modules_of_that_name_are_what_is_called(name):
    module = importlib.import_module(f"dbdist.{name}")
    assert getattr(dbdist, name) is module
    assert isinstance(module, ModuleType)
    assert callable(module)
    assert callable(module.main)
    assert name in dbdist.__all__
    assert sys.modules[f"dbdist.{name}"] is module


def test_the_package_has_no_other_names():
    with pytest.raises(AttributeError, match="nonsense"):
        dbdist.nonsense  # noqa: B018
