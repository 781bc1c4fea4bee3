"""Which class each section of a configuration has, as far as names choose it.

`task.name`, `model.name`, `noise.name` and `data.name` are looked for first, in files and words in
the order of the command line; then the parser is built for the classes that they name.
"""

# What torch and jsonargparse leave untyped:
# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from jsonargparse import ArgumentParser

from dbdist.config import registry
from dbdist.config.config import Config
from dbdist.config.yaml_files import load_yaml, nested

Pair = tuple[str, Any]
"""An option with its dashes, and its text (None without), or what its file holds."""


def chosen_names(pairs: Iterable[Pair]) -> dict[str, str]:
    """Section -> its `name`, of the last file or word that gives one."""
    names: dict[str, str] = {}
    for option, value in pairs:
        key = option.removeprefix("--")
        if isinstance(value, Mapping):
            names |= _names_in(nested(value))
        elif key in registry.SECTIONS and value is not None:
            names |= _names_in({key: _parsed(value)})
        elif key.endswith(".name") and key[:-5] in registry.SECTIONS and value is not None:
            names[key[:-5]] = value
    return names


def _names_in(values: Mapping[Any, Any]) -> dict[str, str]:
    found = {section: values.get(section) for section in registry.SECTIONS}
    return {
        section: str(keys["name"])
        for section, keys in found.items()
        if isinstance(keys, Mapping) and keys.get("name") is not None
    }


def _parsed(text: str) -> Any:
    try:
        return load_yaml(text)
    except Exception:  # the parser will say what is wrong
        return None


def classes_of(names: Mapping[str, str]) -> dict[str, type[Any]]:
    """The class of every section, in the order of `Config`. Raises ConfigError."""
    chosen = registry.section_classes(names)
    found: dict[str, type[Any]] = {}
    for field in dataclasses.fields(Config):
        kind: Any = chosen.get(field.name, field.type)
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            found[field.name] = kind
    return found


def add_sections(
    parser: ArgumentParser, classes: Mapping[str, type[Any]], names: Mapping[str, str]
) -> None:
    """Gives the parser every option, the task's defaults that have a key, and the chosen names."""
    parser.add_class_arguments(Config, skip=set(classes))
    for section, kind in classes.items():
        parser.add_class_arguments(kind, section)
    chosen = {f"{section}.name": name for section, name in names.items()}
    keys = keys_of(classes)
    defaults = {key: value for key, value in classes["task"].defaults.items() if key in keys}
    parser.set_defaults({**defaults, **chosen})


def nested_sections(classes: Mapping[str, type[Any]]) -> Iterator[tuple[str, type[Any]]]:
    """(dotted name, class) of every section, nested ones included."""
    for name, kind in classes.items():
        yield name, kind
        inner = {
            f"{name}.{field.name}": field.type
            for field in dataclasses.fields(kind)
            if dataclasses.is_dataclass(field.type) and isinstance(field.type, type)
        }
        yield from nested_sections(inner)


def keys_of(classes: Mapping[str, type[Any]]) -> dict[str, Any]:
    """Dotted key -> type of every option."""
    top = {f.name: f.type for f in dataclasses.fields(Config) if f.name not in classes}
    nested = {
        f"{name}.{field.name}": field.type
        for name, kind in nested_sections(classes)
        for field in dataclasses.fields(kind)
        if not dataclasses.is_dataclass(field.type)
    }
    return top | nested
