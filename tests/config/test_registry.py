"""Names select what can be plugged in; what nothing has is refused with the nearest."""

import subprocess
import sys

import pytest

from dbdist.config import registry
from dbdist.config.parse import parse_config
from dbdist.errors import ConfigError
from dbdist.processes.options import GaussianOptions
from dbdist.tasks.options import ClassificationSamplerOptions


def config_of(*words):
    return parse_config("test", "", ["--train.max_steps=1", *words])


@pytest.mark.parametrize(
    ("section", "name", "near"),
    [
        ("task", "clasification", "classification"),
        ("model", "vitt", "vit"),
        ("noise", "gausian", "gaussian"),
        ("data", "cifar11", "cifar10"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(section, name, near):
    with pytest.raises(ConfigError, match=f"{section}.name is '{name}'.* mean {near}\\?"):
        config_of(f"--{section}.name={name}")


@pytest.mark.parametrize("section", registry.SECTIONS)
def test_a_name_like_no_other_is_refused_with_all_there_are(section):
    with pytest.raises(ConfigError, match="known are ") as caught:
        registry.find(section, "%%%")
    assert all(name in str(caught.value) for name in registry.SECTIONS[section])


@pytest.mark.parametrize("section", registry.SECTIONS)
def test_every_name_has_options_and_code(section):
    for name, plugin in registry.SECTIONS[section].items():
        assert plugin.options_class(name=name).name == name
        assert plugin.load() is not None


def test_options_are_found_without_torch():
    code = (
        "import sys\n"
        "from dbdist.config import registry\n"
        "for plugins in registry.SECTIONS.values():\n"
        "    for plugin in plugins.values():\n"
        "        plugin.options_class\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_task_has_defaults_of_its_own_for_other_sections(tmp_path):
    assert GaussianOptions().p_mean == -1.2
    assert config_of().noise == GaussianOptions(p_mean=0.5)
    assert config_of("--noise.p_mean=-1.2").noise.p_mean == -1.2
    (tmp_path / "config.yaml").write_text("noise: {p_mean: 0.25}")
    assert config_of("--config", f"{tmp_path}/config.yaml").noise.p_mean == 0.25


def test_the_keys_of_the_sampler_are_the_tasks():
    assert isinstance(config_of().sampler, ClassificationSamplerOptions)
    assert config_of("--sampler.readout=last").sampler.readout == "last"


def test_a_name_in_a_file_or_word_chooses_the_sections_class(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("noise: {name: direct}\ndata: {name: mnist5k}")
    config = config_of("--config", str(file))
    assert (config.noise.name, config.data.name) == ("direct", "mnist5k")
    assert not hasattr(config.noise, "p_mean")
    config = config_of("--config", str(file), "--noise.name=gaussian")
    assert config.noise == GaussianOptions(p_mean=0.5)


def test_blocks_need_levels_to_share():
    with pytest.raises(ConfigError, match=r"noise\.name: direct"):
        config_of("--noise.name=direct").validate()
