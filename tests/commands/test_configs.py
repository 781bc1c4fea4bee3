"""`dbdist configs`: presets are listed, and written out for editing."""

import pytest

from dbdist.commands.configs import run
from dbdist.config.parse import parse_config
from dbdist.config.presets import presets, title
from dbdist.errors import ConfigError


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_preset_is_listed_with_one_line(capsys):
    run([])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(presets())
    for line, path in zip(lines, presets().values(), strict=True):
        assert line.endswith(title(path))
        assert title(path).endswith(".")
        assert len(line) <= 100


def test_a_preset_is_written_here_and_read_back_the_same(here, capsys):
    run(["digits"])
    assert capsys.readouterr().out == "digits.yaml: dbdist train digits.yaml\n"
    written = parse_config("test", "", ["--config", "digits.yaml"])
    assert written == parse_config("test", "", ["--config", "digits"])
    assert [path.name for path in here.iterdir()] == ["digits.yaml"]


def test_what_is_here_is_never_replaced(here):
    (here / "digits.yaml").write_text("mine\n")
    with pytest.raises(ConfigError, match=r"digits\.yaml is here already"):
        run(["digits"])
    (here / "mnist5k.yaml").symlink_to("nowhere")
    with pytest.raises(ConfigError, match=r"mnist5k\.yaml is here already"):
        run(["mnist5k.yaml"])
    assert (here / "digits.yaml").read_text() == "mine\n"
    assert not (here / "nowhere").exists()


@pytest.mark.parametrize(
    ("given", "meant"), [("digit", "digits"), ("cifar", "cifar100"), ("mnist", "mnist5k")]
)
def test_an_unknown_preset_names_the_nearest(given, meant):
    with pytest.raises(ConfigError, match=f"unknown preset {given}; did you mean {meant}"):
        run([given])
