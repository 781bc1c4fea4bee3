"""What checkpoints of older versions mean today; they knew one task, model and process."""

from collections.abc import Mapping
from typing import Any


def upgraded_model(model: Mapping[str, Any]) -> dict[str, Any]:
    """The description of a model in a manifest or part, with the names that older ones lack."""
    if "task" in model:
        return dict(model)
    architecture, noise = model.get("architecture"), model.get("noise")
    found = {**model, "task": "classification"}
    if isinstance(architecture, Mapping):
        found["architecture"] = {"name": "vit", **architecture}
    if isinstance(noise, Mapping):
        found["noise"] = {"name": "gaussian", **noise}
    return found
