"""Options of the engines that keep a block's copies equal, for tests."""

import json
from pathlib import Path

import torch

LINEAR = torch.nn.functional.linear
"""DeepSpeed's stage 3 replaces it for the whole process, and with it the order of gradients: ranks
of a pool put it back."""
DEEPSPEED = ("deepspeed", "deepspeed.runtime.engine")
"""What its engine imports, for `RankPool.preload`."""


def engine_options(folder: Path, engine: str) -> list[str]:
    """`ddp`, `fsdp`, `zero1`, `zero2`, `zero3`, `zero2-offload`, …"""
    if not engine.startswith("zero"):
        return [f"parallel.replica_engine={engine}"]
    zero: dict[str, object] = {"stage": int(engine[4])}
    if engine.endswith("-offload"):
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{engine}.json"
    file.write_text(json.dumps({"zero_optimization": zero}))
    return ["parallel.replica_engine=deepspeed", f"parallel.deepspeed_config={file}"]
