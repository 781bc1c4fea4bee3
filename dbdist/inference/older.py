"""What the files of older versions of dbdist mean today.

Those versions knew one task, model and process.
"""

from collections.abc import Mapping
from typing import Any

_VIT_SIZES = ("hidden_size", "num_heads", "mlp_size", "patch_size")


def upgraded_export(values: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of an exported model of version 1, as version 2 has it."""
    sizes, layers, noise = values["model"], values["layers_per_block"], values["noise"]
    data, sampler = values["data"], dict(values["sampler"])
    if any(sizes[k] != data[k] for k in ("image_size", "channels", "num_classes")):
        raise ValueError("data is not what the model is made for")
    model = {k: sizes[k] for k in (*_VIT_SIZES, "dropout", "attention_dropout", "init")}
    model |= {"name": "vit", "num_layers": sum(layers), "num_blocks": len(layers)}
    model["layers_per_block"] = layers
    if noise is not None and noise["num_blocks"] != len(layers):
        raise ValueError(f"num_blocks {noise['num_blocks']} of {len(layers)}")
    levels = {k: v for k, v in (noise or {}).items() if k != "num_blocks"}
    seed, owners = sampler.pop("seed", 0), sampler.pop("blocks", None)
    return {
        "mode": "end_to_end" if noise is None else "block_parallel",
        "seed": seed,
        "task": {"name": "classification"},
        "model": model,
        "noise": {"name": "gaussian", **levels},
        "sampler": sampler,
        "data": {"source": _source(data["name"]), **data},
        "layers_per_block": layers,
        "private_shared": values["private_shared"],
        "owners": owners,
    }


def _source(name: str) -> str:
    return "image_folder" if name == "published" else name
