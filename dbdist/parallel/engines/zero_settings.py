"""What DeepSpeed is initialised with, from the user's JSON file and the configuration."""

import json
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from dbdist.config.config import Config
from dbdist.errors import ConfigError
from dbdist.whole_files import read_file

PASSED_ON = (
    "zero_optimization",
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "comms_logger",
    "flops_profiler",
    "memory_breakdown",
    "wall_clock_breakdown",
    "steps_per_print",
    "dump_state",
)
"""Sections of a DeepSpeed file that DeepSpeed is given as they are."""
DERIVED = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
)
"""Keys that the run's configuration says; a file may repeat them, but not say otherwise."""
OURS = {
    "optimizer": "train.lr, train.betas, train.eps and train.weight_decay",
    "scheduler": "train.schedule and train.warmup_steps",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "amp": "train.precision",
    "torch_autocast": "train.precision",
    "activation_checkpointing": "train.activation_checkpointing",
    "checkpoint": "the section checkpoint",
    "tensorboard": "the events in RUN, which are always written",
}
"""Sections that would say a second time what the run's configuration says, and where it does."""


def settings(config: Config, num_replicas: int) -> dict[str, Any]:
    """What DeepSpeed is initialised with: the user's file completed by the configuration.

    Raises ConfigError, naming the key, for a file that is no DeepSpeed configuration, contradicts
    the run's, or asks for something that would have no effect.
    """
    file, t = config.parallel.deepspeed_config, config.train
    given = {} if file is None else _read(Path(file))
    micro = t.batch_size // (num_replicas * t.accumulation_steps)
    own = dict(
        zip(DERIVED, (t.batch_size, micro, t.accumulation_steps, t.clip_norm or 0.0), strict=True)
    )
    for key, value in given.items():
        if key in DERIVED:
            if value not in ("auto", own[key]):
                raise ConfigError(
                    f"{file}: {key} is {value}, the run's configuration makes it {own[key]}; "
                    "leave it out there"
                )
        elif key in OURS:
            if not (isinstance(value, dict) and value.get("enabled", True) in (False, "auto")):
                raise ConfigError(
                    f"{file}: {key} is said by this trainer's own configuration ({OURS[key]}); "
                    "leave it out there"
                )
        elif key not in PASSED_ON:
            near = get_close_matches(key, (*PASSED_ON, *DERIVED), n=1, cutoff=0.6)
            hint = f"did you mean {near[0]}?" if near else "leave it out"
            raise ConfigError(f"{file}: {key} is not a key that has an effect here; {hint}")
    passed = {key: value for key, value in given.items() if key in PASSED_ON}
    zero = passed.get("zero_optimization", {"stage": 1})
    if not isinstance(zero, dict) or zero.get("stage") not in (1, 2, 3) or zero["stage"] is True:
        stage = zero.get("stage") if isinstance(zero, dict) else zero
        raise ConfigError(
            f"{file}: zero_optimization.stage is {stage}; allowed are 1, 2 and 3 "
            "(replica_engine: ddp splits nothing)"
        )
    for part in ("offload_optimizer", "offload_param"):
        offload = zero.get(part) or {}
        if not isinstance(offload, dict):
            raise ConfigError(f"{file}: zero_optimization.{part} must hold its keys")
        device = offload.get("device", "none")
        if device not in ("none", "cpu"):
            raise ConfigError(
                f"{file}: zero_optimization.{part}.device is {device}; allowed are cpu and none"
            )
    if zero["stage"] == 3 and t.ema_decay > 0:
        raise ConfigError(
            "train.ema_decay does not go with DeepSpeed stage 3, whose weights are never whole; "
            "use stage 1 or 2, or replica_engine: fsdp"
        )
    return {
        # Our own fp32 AdamW runs on the host too: DeepSpeed's would be compiled at first use.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**62,
        **passed,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": t.accumulation_steps,
        # Weights and optimizer stay fp32; what is computed and gathered is half as long.
        "torch_autocast": {"enabled": t.precision == "bf16", "dtype": "bfloat16"},
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        given = json.loads(read_file(path))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"parallel.deepspeed_config {path} cannot be read ({reason})") from None
    if not isinstance(given, dict):
        raise ConfigError(f"parallel.deepspeed_config {path} must hold an object of DeepSpeed keys")
    return given
