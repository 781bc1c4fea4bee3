"""YAML files of configurations: read with care, written so that they read back the same."""

# What torch and jsonargparse leave untyped:
# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false, reportUnknownVariableType=false

import dataclasses
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from dbdist.config.config import Config
from dbdist.errors import ConfigError
from dbdist.whole_files import write_whole

MAX_YAML_CHARACTERS = 2**16
MAX_YAML_DEPTH = 16
MAX_YAML_ALIASES = 100


class _Loader(yaml.SafeLoader):
    """Reads values as people mean them, and refuses what can be read in two ways."""

    depth = num_aliases = num_open_anchors = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Refuses aliases that expand to other aliases, and deep nesting."""
        event = self.peek_event()
        is_anchor = isinstance(event, yaml.CollectionStartEvent) and event.anchor is not None
        if isinstance(event, yaml.AliasEvent):
            self.num_aliases += 1
            if self.num_open_anchors or self.num_aliases > MAX_YAML_ALIASES:
                raise yaml.YAMLError(
                    f"alias {event.anchor} ({_line(event)}) stands inside another one, or is one "
                    f"of more than {MAX_YAML_ALIASES}; write the values out"
                )
        self.depth += 1
        self.num_open_anchors += is_anchor
        if self.depth > MAX_YAML_DEPTH:
            raise yaml.YAMLError(f"it is nested deeper than {MAX_YAML_DEPTH} ({_line(event)})")
        node = super().compose_node(parent, index)
        self.depth -= 1
        self.num_open_anchors -= is_anchor
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuses a key that stands twice."""
        lines: dict[str, str] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in lines:
                    raise yaml.YAMLError(
                        f"the key {key.value[:80]} stands twice ({lines[key.value]} and "
                        f"{_line(key)}); keep one"
                    )
                lines[key.value] = _line(key)
        return super().construct_mapping(node, deep)

    def number(self, node: yaml.ScalarNode) -> int | float:
        """A whole number is one however it is written: 5e4 and 600.0 too."""
        text = node.value.replace("_", "")
        if re.fullmatch(r"[-+]?0\d+", text) or ":" in text:
            raise yaml.YAMLError(
                f"{node.value} ({_line(node)}) means another number to YAML than it seems to; "
                "write it without leading zeros and colons, or in quotes if it is text"
            )
        if re.fullmatch(r"[-+]?(0[xbo][0-9a-fA-F]+|\d+)", text):
            return int(text, 0)
        value = float(re.sub(r"\.(?=inf|nan)", "", text.lower()))
        return int(value) if value.is_integer() and abs(value) < 2**53 else value


def _line(place: Any) -> str:
    return f"line {place.start_mark.line + 1}"


_NUMBER = re.compile(
    r"""[-+]?(?:0[xbo][0-9a-fA-F_]+|[0-9][0-9_]*(?::[0-9]+)*(?:\.[0-9_]*)?(?:[eE][-+]?[0-9]+)?
    |\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))$|\.(?:nan|NaN|NAN)$""",
    re.VERBOSE,
)
_Loader.yaml_implicit_resolvers = {  # dates are text here
    first: [
        (tag, regexp) for tag, regexp in known if not tag.endswith((":timestamp", "int", "float"))
    ]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("!number", _NUMBER, list("-+.0123456789"))
for _tag in ("!number", "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"):
    _Loader.add_constructor(_tag, _Loader.number)


def load_yaml(text: str) -> Any:
    """What a text says.

    Raises YAMLError for keys that stand twice, numbers that can be read in two ways, Python
    objects, and a text that is larger or more nested than a configuration can be.
    """
    if len(text) > MAX_YAML_CHARACTERS:
        raise yaml.YAMLError(f"it has {len(text)} characters, {MAX_YAML_CHARACTERS} at most")
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    except yaml.YAMLError:
        raise
    except Exception as error:  # a number, a date or a key that Python has none of
        raise yaml.YAMLError(f"{error}") from None
    finally:
        loader.dispose()


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a configuration file holds; an empty file holds none.

    Raises ConfigError, also for what is no regular file (a FIFO would block).
    """
    try:
        values = load_yaml(_text(path))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not a configuration: {_sentence(error)}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path} is not a configuration: it holds {type(values).__name__} instead of keys "
            "and their values"
        )
    return nested(values)


def _text(path: Path) -> str:
    """The text of a regular file in UTF-8."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ConfigError(f"{path} is no regular file; give a YAML file")
            content = file.read(4 * MAX_YAML_CHARACTERS + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path} cannot be read ({reason})") from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not a text file in UTF-8 (byte {error.start} is "
            f"{content[error.start]:#x}); save it as UTF-8"
        ) from None
    if "\0" in text:
        raise ConfigError(f"{path} is not a text file (it has NUL bytes); save it as UTF-8")
    return text


def _sentence(error: yaml.YAMLError) -> str:
    """PyYAML's message in one line, without its quotation of the text."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        problem = f"{error.context or ''} {error.problem} (line {error.problem_mark.line + 1})"
        return " ".join(problem.split())
    return " ".join(str(error).split())[:300]


def nested(values: Mapping[Any, Any]) -> dict[str, Any]:
    """The same with `train.lr: 1` beside `train: {eps: 1}` as one section.

    Raises ConfigError for a key that stands twice, however it is spelt.
    """
    found: dict[str, Any] = {}
    for key, value in values.items():
        first, is_dotted, rest = str(key).partition(".")
        if is_dotted:
            value = nested({rest: value})
        elif isinstance(value, Mapping):
            value = nested(value)
        found[first] = _both(first, found[first], value) if first in found else value
    return found


def _both(name: str, one: Any, other: Any) -> Any:
    """Two halves of one section; an empty one adds nothing."""
    halves = [half for half in (one, other) if half is not None]
    if not all(isinstance(half, dict) for half in halves):
        raise ConfigError(f"the key {name} stands twice; keep one")
    merged: dict[str, Any] = {}
    for half in halves:
        for key, value in half.items():
            dotted = f"{name}.{key}"
            merged[key] = _both(dotted, merged[key], value) if key in merged else value
    return merged


def write_yaml(config: Config, path: Path) -> None:
    """Writes the resolved configuration so that --config reads it back equal; raises OSError."""
    write_whole(path, dump_yaml(dataclasses.asdict(config)).encode())


def dump_yaml(values: dict[str, Any]) -> str:
    """YAML that reads back the same."""
    return yaml.dump(_plain(values), Dumper=_QuotingDumper, sort_keys=False)


class _QuotingDumper(yaml.SafeDumper):
    """Quotes every string: `1e3` is a fine name for a run, and no number."""


def _quoted(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="'")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {_Key(k): _plain(v) for k, v in value.items()}
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


class _Key(str):
    """A key, which needs no quotes."""


_QuotingDumper.add_representer(str, _quoted)


_QuotingDumper.add_representer(_Key, lambda dumper, key: dumper.represent_str(str(key)))
