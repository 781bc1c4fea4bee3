"""What a DeepSpeed file may say beside the run's own configuration."""

import json

import pytest
from ranks import config_of

from dbdist.errors import ConfigError
from dbdist.parallel.engines.zero_settings import settings


def config_with(tmp_path, content, *options):
    path = tmp_path / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    words = ("parallel.replica_engine=deepspeed", f"parallel.deepspeed_config={path}")
    return config_of(*words, "parallel.replicas=2", "train.batch_size=32", *options)


def test_without_a_file_the_optimizer_is_split_and_nothing_else():
    config = config_of("parallel.replica_engine=deepspeed", "train.batch_size=32")
    own = settings(config, config.parallel.replicas)
    assert own["zero_optimization"] == {"stage": 1}
    assert own["train_micro_batch_size_per_gpu"] == 32


def test_batch_sizes_and_precision_come_from_the_runs_configuration(tmp_path):
    options = ("train.accumulation_steps=4", "train.precision=bf16")
    own = settings(config_with(tmp_path, {"zero_optimization": {"stage": 2}}, *options), 2)
    assert own["train_micro_batch_size_per_gpu"] == 4
    assert own["gradient_accumulation_steps"] == 4
    assert own["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}
    assert "gradient_clipping" not in own, "clipping takes in the shared modules: it is ours"


def test_a_file_may_repeat_the_runs_configuration(tmp_path):
    repeated = {
        "train_batch_size": 32,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": False},
        "fp16": {"enabled": "auto"},
        "wall_clock_breakdown": True,
    }
    options = ("train.accumulation_steps=2", "train.clip_norm=0.5")
    own = settings(config_with(tmp_path, repeated, *options), 2)
    assert own["wall_clock_breakdown"] is True
    assert "bf16" not in own


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({"train_batch_size": 64}, r"train_batch_size is 64, .* makes it 32"),
        ({"train_micro_batch_size_per_gpu": 32}, r"train_micro_batch_size_per_gpu is 32.* 16"),
        ({"gradient_clipping": 5.0}, r"gradient_clipping is 5\.0.* 1\.0"),
        ({"gradient_accumulation_steps": 3}, r"gradient_accumulation_steps is 3.* 1"),
        ({"optimizer": {"type": "Adam"}}, r"optimizer .*train\.lr"),
        ({"scheduler": {"type": "WarmupLR"}}, r"scheduler .*train\.schedule"),
        ({"bf16": {"enabled": True}}, r"bf16 .*train\.precision"),
        ({"fp16": {"enabled": True}}, r"fp16 .*train\.precision"),
        ({"fp16": True}, r"fp16 .*train\.precision"),
        ({"zero_optimisation": {"stage": 2}}, r"did you mean zero_optimization\?"),
        ({"pipeline": {}}, r"pipeline is not a key that has an effect here"),
        ({"zero_optimization": {"stage": 0}}, r"stage is 0; allowed are 1, 2 and 3"),
        ({"zero_optimization": {"stage": "2"}}, r"stage is 2; allowed"),
        ({"zero_optimization": {}}, r"stage is None; allowed"),
        ({"zero_optimization": 2}, r"stage is 2; allowed"),
        ({"zero_optimization": {"stage": True}}, r"stage is True; allowed"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            r"offload_param\.device is nvme; allowed are cpu and none",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": 5}},
            r"offload_optimizer must hold its keys",
        ),
        ([], r"must hold an object"),
        ("{", r"cannot be read"),
        ("[" * 100_000, r"cannot be read"),
    ],
)
def test_what_contradicts_or_has_no_effect_is_refused_by_name(tmp_path, content, match):
    with pytest.raises(ConfigError, match=match) as caught:
        settings(config_with(tmp_path, content), 2)
    assert "ds.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    config = config_with(tmp_path, {})
    (tmp_path / "ds.json").unlink()
    with pytest.raises(ConfigError, match=r"ds\.json cannot be read \(No such file"):
        settings(config, config.parallel.replicas)


def test_averaged_weights_do_not_go_with_stage_3(tmp_path):
    config = config_with(tmp_path, {"zero_optimization": {"stage": 3}}, "train.ema_decay=0.9")
    with pytest.raises(ConfigError, match=r"ema_decay does not go with DeepSpeed stage 3"):
        settings(config, config.parallel.replicas)
