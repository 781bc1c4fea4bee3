"""YAML files of configurations: read with care, written so that they read back the same."""

import dataclasses
import os
import uuid
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader

from dbdist.config.config import Config

MAX_YAML_CHARACTERS = 2**16
MAX_YAML_DEPTH = 16
MAX_YAML_NODES = 10_000
YAML = "dbdist"
"""jsonargparse's name for `load_yaml`."""


def load_yaml(text: str) -> Any:
    """What a text says. Raises YAMLError for one that is larger or more nested than a configuration
    can be, also once its aliases are expanded, and for Python objects."""
    if len(text) > MAX_YAML_CHARACTERS:
        raise yaml.YAMLError(f"it has {len(text)} characters, {MAX_YAML_CHARACTERS} at most")
    sizes: list[int] = [0]  # nodes of the collections that are open here
    names: list[str | None] = []
    anchored: dict[str, int] = {}
    for event in yaml.parse(
        text, Loader=yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader
    ):
        if isinstance(event, yaml.CollectionStartEvent):
            sizes.append(1)
            names.append(event.anchor)
        elif isinstance(event, yaml.CollectionEndEvent):
            size, name = sizes.pop(), names.pop()
            sizes[-1] += size
            if name is not None:
                anchored[name] = size
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor in names:
                raise yaml.YAMLError(f"alias {event.anchor} contains itself")
            sizes[-1] += anchored.get(event.anchor, 1)
        elif isinstance(event, yaml.ScalarEvent):
            sizes[-1] += 1
        if len(names) > MAX_YAML_DEPTH or sizes[-1] > MAX_YAML_NODES:
            raise yaml.YAMLError(
                f"it is nested deeper than {MAX_YAML_DEPTH}, or has more than {MAX_YAML_NODES} "
                "values"
            )
    try:
        return get_loader("yaml")(text)
    except yaml.YAMLError:
        raise
    except Exception as error:  # a number, a date or a key that Python has none of
        raise yaml.YAMLError(f"{error}") from None


def write_yaml(config: Config, path: Path) -> None:
    """The resolved configuration, readable by --config."""
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")  # others may write too
    values = _plain(dataclasses.asdict(config))
    try:
        partial.write_text(yaml.dump(values, Dumper=_QuotingDumper, sort_keys=False))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


class _QuotingDumper(yaml.SafeDumper):
    """Quotes every string: `1e3` is a fine name for a run, and no number."""


def _quoted(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="'")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {_Key(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


class _Key(str):
    """A key, which needs no quotes."""


_QuotingDumper.add_representer(str, _quoted)


_QuotingDumper.add_representer(_Key, lambda dumper, key: dumper.represent_str(str(key)))
