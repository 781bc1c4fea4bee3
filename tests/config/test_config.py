"""What cannot be honoured is refused by name; what is derived from the options is right."""

import ast
import dataclasses
import inspect
import sys

import pytest

from dbdist.build import build_process
from dbdist.config import config, options, registry
from dbdist.config.config import Config
from dbdist.config.options import TrainConfig
from dbdist.errors import ConfigError
from dbdist.models.options import ViTOptions
from dbdist.tasks.options import ClassificationSamplerOptions

NAN, INF = float("nan"), float("inf")
VALID = Config(
    model=ViTOptions(num_layers=3, hidden_size=12, num_heads=2),
    train=TrainConfig(batch_size=8, max_steps=4),
)


def changed(options):
    """A small valid configuration with `{"section.key": value}` replaced, not yet validated."""
    config = VALID
    for key, value in options.items():
        *sections, name = key.split(".")
        owners = [config]
        for section in sections:
            owners.append(getattr(owners[-1], section))
        for owner, section in zip(reversed(owners), [name, *reversed(sections)], strict=True):
            value = dataclasses.replace(owner, **{section: value})
        config = value
    return config


REFUSED = [
    ({"model.num_blocks": 0}, "model.num_blocks"),
    ({"model.num_layers": 0}, "model.num_layers"),
    ({"model.hidden_size": 0}, "model.hidden_size"),
    ({"model.num_heads": 0}, "model.num_heads"),
    ({"model.patch_size": 0}, "model.patch_size"),
    ({"model.mlp_size": 0}, "model.mlp_size"),
    ({"model.mlp_size": -4}, "model.mlp_size"),
    ({"model.dropout": -0.1}, "model.dropout"),
    ({"model.dropout": NAN}, "model.dropout"),
    ({"model.attention_dropout": 1.1}, "model.attention_dropout"),
    ({"model.num_heads": 5}, "model.num_heads"),
    ({"model.hidden_size": 4}, "model.hidden_size"),
    ({"model.num_blocks": 2}, "model.num_blocks"),
    ({"model.layers_per_block": (1, 2)}, "model.layers_per_block"),
    ({"model.layers_per_block": ()}, "model.layers_per_block"),
    ({"model.layers_per_block": (1, 1, 2)}, "model.layers_per_block"),
    ({"model.layers_per_block": (0, 1, 2)}, "model.layers_per_block"),
    ({"data.num_workers": -1}, "data.num_workers"),
    ({"data.image_size": 0}, "data.image_size"),
    ({"data.augment.crop_padding": -1}, "data.augment.crop_padding"),
    ({"data.augment.randaugment_ops": -1}, "data.augment.randaugment_ops"),
    ({"data.augment.randaugment_magnitude": 31}, "data.augment.randaugment_magnitude"),
    ({"noise.sigma_min": 0.0}, "noise.sigma_min"),
    ({"noise.sigma_min": 90.0}, "noise.sigma_max"),
    ({"noise.p_std": 0.0}, "noise.p_std"),
    ({"noise.sigma_data": NAN}, "noise.sigma_data"),
    ({"noise.overlap": -0.1}, "noise.overlap"),
    ({"noise.p_mean": NAN}, "noise.p_mean"),
    ({"task.condition_dropout": 1.5}, "task.condition_dropout"),
    ({"sampler.num_steps": 0}, "sampler.num_steps"),
    ({"sampler.num_steps": 2}, "sampler.num_steps"),
    ({"sampler.sigma_start": 0.001}, "sampler.sigma_start"),
    ({"sampler.sigma_start": 81.0}, "sampler.sigma_start"),
    ({"sampler.sigma_start": NAN}, "sampler.sigma_start"),
    ({"sampler.num_draws": 0, "sampler.start": "noise"}, "sampler.num_draws"),
    ({"sampler.num_draws": 2}, "sampler.num_draws"),
    ({"sampler.guidance_scale": -1.0}, "sampler.guidance_scale"),
    ({"sampler.guidance_scale": NAN}, "sampler.guidance_scale"),
    ({"sampler.readout": ()}, "sampler.readout"),
    ({"sampler.readout": (0, 3)}, "sampler.readout"),
    ({"sampler.readout": (-1,)}, "sampler.readout"),
    ({"train.max_steps": None}, "train.epochs"),
    ({"train.max_steps": 0}, "train.max_steps"),
    ({"train.batch_size": 0}, "train.batch_size"),
    ({"train.accumulation_steps": 0}, "train.accumulation_steps"),
    ({"train.log_every": 0}, "train.log_every"),
    ({"train.warmup_steps": -1}, "train.warmup_steps"),
    ({"train.weight_decay": -0.1}, "train.weight_decay"),
    ({"train.weight_decay": NAN}, "train.weight_decay"),
    ({"train.lr": 0.0}, "train.lr"),
    ({"train.lr": NAN}, "train.lr"),
    ({"train.lr": INF}, "train.lr"),
    ({"train.eps": 0.0}, "train.eps"),
    ({"train.epochs": 0.0}, "train.epochs"),
    ({"train.epochs": INF, "train.max_steps": None}, "train.epochs"),
    ({"train.clip_norm": 0.0}, "train.clip_norm"),
    ({"train.min_lr_ratio": 1.1}, "train.min_lr_ratio"),
    ({"train.betas": (0.9, 1.0)}, "train.betas"),
    ({"train.betas": (-0.1, 0.9)}, "train.betas"),
    ({"train.ema_decay": 1.0}, "train.ema_decay"),
    ({"train.ema_decay": NAN}, "train.ema_decay"),
    ({"train.accumulation_steps": 3}, "train.accumulation_steps"),
    ({"parallel.replicas": 3}, "parallel.replicas"),
    ({"parallel.replicas": 0}, "parallel.replicas"),
    ({"parallel.sync_every": 0}, "parallel.sync_every"),
    ({"parallel.timeout_s": 0.0}, "parallel.timeout_s"),
    ({"parallel.timeout_s": INF}, "parallel.timeout_s"),
    ({"parallel.outer_lr": 0.0, "parallel.sync": "every"}, "parallel.outer_lr"),
    ({"parallel.outer_momentum": 1.0, "parallel.sync": "every"}, "parallel.outer_momentum"),
    ({"parallel.outer_lr": 0.5}, "parallel.outer_lr"),
    ({"parallel.outer_momentum": 0.5, "parallel.sync": "never"}, "parallel.outer_momentum"),
    ({"parallel.coordinator": "dedicated", "parallel.sync": "never"}, "parallel.coordinator"),
    ({"parallel.coordinator": "sharded", "parallel.sync": "never"}, "parallel.coordinator"),
    ({"parallel.coordinator": "sharded", "parallel.sync": "every"}, "parallel.coordinator"),
    ({"parallel.deepspeed_config": "ds.json"}, "parallel.deepspeed_config"),
    ({"mode": "sequential", "parallel.replica_engine": "fsdp"}, "parallel.replica_engine"),
    ({"mode": "sequential", "parallel.replicas": 2}, "parallel.replicas"),
    ({"mode": "end_to_end", "parallel.coordinator": "dedicated"}, "parallel.coordinator"),
    ({"checkpoint.every_steps": -1}, "checkpoint.every_steps"),
    ({"checkpoint.keep_last": 0}, "checkpoint.keep_last"),
    ({"eval.every_steps": -1}, "eval.every_steps"),
    ({"eval.batch_size": 0}, "eval.batch_size"),
    ({"eval.micro_batch_size": 0}, "eval.micro_batch_size"),
]


@pytest.mark.parametrize(("options", "key"), REFUSED)
def test_what_cannot_be_honoured_is_refused_by_name(options, key):
    with pytest.raises(ConfigError) as caught:
        changed(options).validate()
    assert key.rpartition(".")[2] in str(caught.value)
    assert key.partition(".")[0] in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "sequential"},
        {"mode": "end_to_end", "model.num_blocks": 2, "model.hidden_size": 4, "model.num_heads": 1},
        {"model.layers_per_block": (1, 1, 1)},
        {"model.num_layers": 6, "model.layers_per_block": (1, 2, 3)},
        {"model.dropout": 1.0, "task.condition_dropout": 1.0},
        {"sampler.num_draws": 4, "sampler.start": "noise"},
        {"sampler.num_steps": 3, "sampler.sigma_start": 80.0},
        {"sampler.readout": (0, 2)},
        {"train.max_steps": None, "train.epochs": 0.5},
        {"train.clip_norm": None},
        {"train.accumulation_steps": 2, "parallel.replicas": 4},
        {"parallel.sync": "every", "parallel.outer_lr": 0.7, "parallel.outer_momentum": 0.9},
        {"parallel.coordinator": "dedicated"},
        {"parallel.coordinator": "sharded"},
        {"parallel.replica_engine": "deepspeed", "parallel.deepspeed_config": "ds.json"},
        {"mode": "end_to_end", "parallel.replica_engine": "fsdp"},
        {"checkpoint.resume": False, "eval.step": 5},
    ],
)
def test_what_can_be_honoured_is_accepted(options):
    config = changed(options)
    assert config.validate() is config


def test_the_defaults_lack_nothing_but_how_long_to_train():
    with pytest.raises(ConfigError, match=r"train\.max_steps"):
        Config().validate()
    Config(train=TrainConfig(max_steps=1)).validate()


@pytest.mark.parametrize(
    ("model", "mode", "expected"),
    [
        ({"num_blocks": 3, "num_layers": 6}, "block_parallel", [[0, 1], [2, 3], [4, 5]]),
        ({"num_blocks": 1, "num_layers": 3}, "sequential", [[0, 1, 2]]),
        (
            {"num_blocks": 3, "num_layers": 6, "layers_per_block": (1, 3, 2)},
            "block_parallel",
            [[0], [1, 2, 3], [4, 5]],
        ),
        ({"num_blocks": 3, "num_layers": 4}, "end_to_end", [[0, 1, 2, 3]]),
        (
            {"num_blocks": 2, "num_layers": 4, "layers_per_block": (1, 3)},
            "end_to_end",
            [[0, 1, 2, 3]],
        ),
    ],
)
def test_layers_of_blocks_are_contiguous_and_complete(model, mode, expected):
    config = Config(mode=mode, model=ViTOptions(**model))
    assert [list(layers) for layers in config.layers_of_block] == expected
    assert config.num_blocks == len(expected)


@pytest.mark.parametrize(
    ("readout", "mode", "expected"),
    [
        ("last", "block_parallel", (2,)),
        ("all", "block_parallel", (0, 1, 2)),
        ((2, 0, 2), "block_parallel", (0, 2)),
        ("all", "end_to_end", (0,)),
    ],
)
def test_readout_blocks(readout, mode, expected):
    config = Config(mode=mode, sampler=ClassificationSamplerOptions(readout=readout))
    assert config.sampler.readout_blocks(config.num_blocks) == expected


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ({"max_steps": 7}, 7),
        ({"max_steps": 7, "epochs": 100.0}, 7),
        ({"epochs": 2.0, "batch_size": 10}, 20),
        ({"epochs": 0.26, "batch_size": 10}, 3),
        ({"epochs": 1e-6, "batch_size": 10}, 1),
    ],
)
def test_max_steps_win_over_epochs_of_each_block(train, expected):
    assert Config(train=TrainConfig(**train)).max_steps(100) == expected


def test_sizes_that_are_null_follow_from_others():
    config = changed({"model.hidden_size": 24, "model.num_blocks": 3})
    assert config.model.mlp_width == 96
    assert config.sampler_steps == 6
    config = changed({"model.mlp_size": 5, "sampler.num_steps": 9})
    assert (config.model.mlp_width, config.sampler_steps) == (5, 9)


def test_the_noise_schedule_is_the_configured_one():
    values = {
        "p_mean": -0.5,
        "p_std": 0.9,
        "sigma_min": 0.01,
        "sigma_max": 40.0,
        "sigma_data": 0.3,
        "overlap": 0.2,
        "partition": "uniform",
    }
    config = changed({f"noise.{key}": value for key, value in values.items()})
    assert dataclasses.asdict(build_process(config).partition) == {"num_blocks": 3, **values}


def test_a_configuration_is_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 1  # type: ignore[misc]


def every_plugin():
    return [plugin for plugins in registry.SECTIONS.values() for plugin in plugins.values()]


def documented_fields():
    """(class.field, whether it is a section, the string under it) of every configuration class."""
    names = {plugin.options_class.__module__ for plugin in every_plugin()}
    modules = {sys.modules[name] for name in names if name.startswith("dbdist.")}  # not tests' own
    sources = [inspect.getsource(module) for module in (options, config, *modules)]
    for node in (node for source in sources for node in ast.parse(source).body):
        if not isinstance(node, ast.ClassDef):
            continue
        assert ast.get_docstring(node), f"{node.name} has no docstring"
        for field, after in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                is_doc = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                text = str(after.value.value) if is_doc else ""
                kind = ast.unparse(field.annotation)
                if not kind.startswith("ClassVar"):
                    is_section = kind.endswith(("Config", "Options"))
                    yield f"{node.name}.{field.target.id}", is_section, text


def test_every_option_has_a_line_that_explains_it():
    found = list(documented_fields())
    assert len(found) > 90
    assert {"ViTOptions.init", "GaussianOptions.p_std", "ImageOptions.image_size"} <= {
        name for name, *_ in found
    }
    bare = [name for name, is_section, text in found if not is_section and len(text.split()) < 2]
    assert not bare


@pytest.mark.parametrize(
    ("options", "shared", "is_joint"),
    [
        ({}, "coordinated", True),
        ({"parallel.coordinator": "dedicated"}, "coordinated", True),
        ({"parallel.coordinator": "sharded"}, "sharded", True),
        ({"parallel.sync": "every"}, "averaged", True),
        ({"parallel.sync": "never"}, "private", True),
        ({"parallel.sync": "every", "parallel.blocks": 1}, "private", False),
        ({"parallel.sync": "never", "parallel.blocks": (0, 2)}, "private", False),
        ({"mode": "sequential"}, "coordinated", True),
        ({"mode": "end_to_end"}, "coordinated", True),
    ],
)
def test_the_configuration_says_how_blocks_share(options, shared, is_joint):
    config = changed(options).validate()
    assert (config.shared, config.is_joint) == (shared, is_joint)
    assert config.has_copies == (shared in ("averaged", "private"))
