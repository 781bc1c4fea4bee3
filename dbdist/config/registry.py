"""What can be named in a configuration: tasks, models, processes and data sets.

An entry says where a thing's options and its code are, as "module:Class". Both are imported only
when the name is used, so a configuration is parsed and checked without torch.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any

from dbdist.errors import ConfigError


@dataclass(frozen=True)
class Plugin:
    """Where to find a thing that a configuration names."""

    options: str
    """Its section of the configuration: a frozen dataclass, "module:Class"."""
    code: str
    """What it does: a class; for data a module with the functions of `dbdist.data.sources`."""

    @property
    def options_class(self) -> type[Any]:
        """The dataclass of its options. Raises ConfigError where it is not there."""
        return _resolved(self.options)

    def load(self) -> Any:
        """Imports the code. Raises ConfigError where it is not there."""
        return _resolved(self.code)


_IMAGES = Plugin("dbdist.data.options:ImageOptions", "dbdist.data.sets")
_TEXTS = Plugin("dbdist.data.options:TextOptions", "dbdist.data.text")

TASKS: dict[str, Plugin] = {
    "classification": Plugin(
        "dbdist.tasks.options:ClassificationOptions", "dbdist.tasks.classification:Classification"
    ),
    "masked_text": Plugin(
        "dbdist.tasks.options:MaskedTextOptions", "dbdist.tasks.masked_text:MaskedText"
    ),
    "generation": Plugin(
        "dbdist.tasks.options:GenerationOptions", "dbdist.tasks.generation:Generation"
    ),
}
MODELS: dict[str, Plugin] = {
    "dit": Plugin("dbdist.models.options:DiTOptions", "dbdist.models.dit:DiT"),
    "text": Plugin("dbdist.models.options:TextModelOptions", "dbdist.models.text:TextModel"),
    "vit": Plugin("dbdist.models.options:ViTOptions", "dbdist.models.vit:ViT"),
}
PROCESSES: dict[str, Plugin] = {
    "gaussian": Plugin(
        "dbdist.processes.options:GaussianOptions", "dbdist.processes.gaussian:Gaussian"
    ),
    "masking": Plugin(
        "dbdist.processes.options:MaskingOptions", "dbdist.processes.masking:Masking"
    ),
    "direct": Plugin("dbdist.processes.options:DirectOptions", "dbdist.processes.direct:Direct"),
}
DATASETS: dict[str, Plugin] = {
    name: _IMAGES
    for name in ("digits", "mnist5k", "cifar10", "cifar100", "tiny-imagenet", "image_folder")
} | {name: _TEXTS for name in ("kjv", "text8", "text")}
DATASETS["latents"] = Plugin("dbdist.data.options:LatentOptions", "dbdist.data.latents")
SECTIONS: Mapping[str, dict[str, Plugin]] = {
    "model": MODELS,
    "data": DATASETS,
    "noise": PROCESSES,
    "task": TASKS,
}
"""Sections of the configuration whose `name` chooses their other keys."""


def _resolved(place: str) -> Any:
    try:
        return resolve_name(place)
    except (ModuleNotFoundError, AttributeError) as error:
        module = place.partition(":")[0]
        if isinstance(error, ModuleNotFoundError) and not f"{module}.".startswith(f"{error.name}."):
            raise  # what the module itself imports
        raise ConfigError(f"the registry names {place!r}, which is not there ({error})") from None


def find(section: str, name: object) -> Plugin:
    """The entry that a section's name means; ConfigError for a name that nothing has."""
    known = SECTIONS[section]
    if isinstance(name, str) and name in known:
        return known[name]
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f"; did you mean {near[0]}?" if near else f"; known are {', '.join(known)}"
    hint += " (your own: import the file that registers it first)" if not near else ""
    raise ConfigError(f"{section}.name is {name!r}, which no {section} has{hint}")


def section_classes(names: Mapping[str, str]) -> dict[str, type[Any]]:
    """Returns the class of each section, for the names that were given.

    The task's defaults fill the rest.

    names: section -> its `name`. The sampler's keys are the task's.
    """
    task = find("task", names.get("task", "classification")).options_class
    wanted = {
        section: names.get(section) or task.defaults.get(f"{section}.name")
        for section in ("model", "data", "noise")
    }
    classes = {section: find(section, name).options_class for section, name in wanted.items()}
    return {**classes, "task": task, "sampler": task.sampler}


def default_section(section: str, names: Mapping[str, str] | None = None) -> Any:
    """A section with the defaults of its class and of the task, as far as the class has them."""
    classes = section_classes(names or {})
    known = {f"{section}.{field.name}" for field in dataclasses.fields(classes[section])}
    defaults = classes["task"].defaults.items()
    given = {key.partition(".")[2]: value for key, value in defaults if key in known}
    return classes[section](**given)


def names_with(section: str, field: str) -> list[str]:
    """The names of a section whose options have this field."""
    return [
        name
        for name, plugin in SECTIONS.get(section, {}).items()
        if any(known.name == field for known in dataclasses.fields(plugin.options_class))
    ]
