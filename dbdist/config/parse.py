"""A command line, or values from Python, become a `Config`; every mistake becomes one sentence."""

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar, get_args

import yaml
from jsonargparse import (
    ActionConfigFile,
    ArgumentError,
    ArgumentParser,
    Namespace,
    set_loader,
    set_parsing_settings,
)

from dbdist.config.config import Config
from dbdist.config.nearest import unknown
from dbdist.config.presets import config_file
from dbdist.config.yaml_files import dump_yaml, load_yaml, nested, read_yaml
from dbdist.errors import ConfigError

YAML = "dbdist"
"""jsonargparse's name for `load_yaml`."""
Section = TypeVar("Section")


def parse_config(
    prog: str, description: str, argv: list[str], first: list[str] | None = None
) -> Config:
    """The configuration of a command line: defaults, then `first`, then argv.

    first: words too, e.g. a run's own config file. Raises ConfigError for anything that is not a
    valid configuration; --help prints every key and exits.
    """
    return _parsed(prog, description, _words([*(first or []), *argv]))


def make_config(given: object, overrides: Mapping[str, Any]) -> Config:
    """The configuration that Python code means by a Config, a mapping, a file or a preset.

    overrides: values of dotted keys (`train.lr`, or `train__lr`), which win. Raises ConfigError.
    """
    if isinstance(given, Config):
        values: Mapping[Any, Any] = dataclasses.asdict(given)
    elif isinstance(given, Mapping):
        values = given
    elif isinstance(given, str | os.PathLike):
        values = read_yaml(config_file(given))
    else:
        raise ConfigError(
            f"a configuration is a Config, a mapping, a path or a preset's name, not "
            f"{type(given).__name__}"
        )
    dotted = {key.replace("__", "."): value for key, value in overrides.items()}
    return _parsed("dbdist", "", [f"--config={_layer(v)}" for v in (values, dotted)])


def _parsed(prog: str, description: str, words: list[str]) -> Config:
    has_help = not {"-h", "--help"}.isdisjoint(words)
    set_parsing_settings(docstring_parse_attribute_docstrings=has_help)  # takes half the time
    set_loader(YAML, load_yaml, (yaml.YAMLError,))
    parser = ArgumentParser(
        prog=prog,
        description=description,
        exit_on_error=False,
        allow_abbrev=False,
        parser_mode=YAML,
    )
    parser.add_argument(
        "--config",
        action=ActionConfigFile,
        help="YAML file, or the name of a preset (`dbdist configs`); later options override it.",
    )
    parser.add_class_arguments(Config)
    try:
        parsed = parser.parse_args(words)
        for section, _ in _sections(Config):
            if not isinstance(parsed.get(section), Namespace):
                raise ConfigError(f"{section} is {parsed.get(section)!r}; it must hold its keys")
        for key, kind in _keys(Config):
            if parsed.get(key) is None and type(None) not in get_args(kind):
                raise ConfigError(f"{key} is null, which is no value for it; leave it out")
        values = parser.instantiate(parsed)
    except ArgumentError as error:
        raise ConfigError(" ".join(explain(str(error)).split())) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"the configuration is not a text file ({error})") from None
    except (OverflowError, ValueError) as error:  # numbers beyond floats, and of 4,300 digits
        raise ConfigError(f"a number of the configuration cannot be used ({error})") from None
    return expanded(Config(**{f.name: getattr(values, f.name) for f in dataclasses.fields(Config)}))


def expanded(section: Section) -> Section:
    """The same options with the home folder in place of `~` at the start of a text."""
    assert dataclasses.is_dataclass(section)
    assert not isinstance(section, type)
    changed: dict[str, Any] = {}
    for option in dataclasses.fields(section):
        value = getattr(section, option.name)
        if dataclasses.is_dataclass(value):
            changed[option.name] = expanded(value)
        elif isinstance(value, str) and value.startswith("~"):
            changed[option.name] = os.path.expanduser(value)
    return dataclasses.replace(section, **changed)


def explain(error: str) -> str:
    """jsonargparse's message as one sentence, with the nearest known key for an unknown one."""
    error = error.removeprefix('Parser key "config":').strip()
    if found := re.search(r"unrecognized arguments: --([\w.-]+)", error):
        return unknown("option", found[1], [*dict(_keys(Config)), "config"], "--")
    if found := re.search(r"Option '([\w.-]+)' is not accepted", error):
        return unknown("key", found[1], list(dict(_keys(Config))))
    if found := re.search(
        r"Group '([\w.-]+)' does not accept (?:option|nested key|key) '([\w.-]+)'", error
    ):
        return unknown("key", f"{found[1]}.{found[2]}", list(dict(_keys(Config))))
    if found := re.search(r'Parser key "([\w.-]+)":\s*(.*)', error, re.DOTALL):
        return f"{found[1]}: {_expectation(' '.join(found[2].split()))}"
    return error


def _expectation(error: str) -> str:
    """What a value should have been, in words rather than Python's types."""
    if found := re.search(r"Subtypes: \[(.*?)\] Errors: .*Given value: (.*)", error):
        types = re.sub(r", (?![^\[]*\])", " or ", found[1])
        error = f"expected {types}, got {found[2]}"
    error = re.sub(r"Expected an? (.*)\. Got value: ", r"expected \1, got ", error)
    error = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", error).replace("NoneType", "null")
    error = re.sub(r"^expected str, got (.*)", r"expected text, got \1; put it in quotes", error)
    return re.sub(r"(?:typing\.)?Literal\[(.*?)\]", lambda m: m[1].replace(", ", " or "), error)


def _sections(kind: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, dataclass) of every section of the configuration, nested ones included."""
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(field.type):
            yield f"{prefix}{field.name}", field.type
            yield from _sections(field.type, f"{prefix}{field.name}.")


def _keys(kind: Any) -> Iterator[tuple[str, Any]]:
    """(dotted key, type) of every option."""
    for prefix, section in (("", kind), *((f"{name}.", s) for name, s in _sections(kind))):
        for field in dataclasses.fields(section):
            if not dataclasses.is_dataclass(field.type):
                yield f"{prefix}{field.name}", field.type


def _words(argv: list[str]) -> list[str]:
    """The words as jsonargparse takes them: a configuration file's content in place of its name, a
    whole number for 5e4, `--checkpoint.resume true` for a bare `--checkpoint.resume`."""
    sections, kinds = {name for name, _ in _sections(Config)}, dict(_keys(Config))
    words, rest = [], [*argv]
    while rest:
        option, is_joined, value = rest.pop(0).partition("=")
        has_value = bool(is_joined or (rest and not rest[0].startswith("--")))
        if has_value and not is_joined:
            value = rest.pop(0)
        key = option.removeprefix("--")
        if key == "config" and option != key and has_value:
            option, value = "--config", _layer(read_yaml(config_file(value)))
        elif key in sections and not value.lstrip().startswith("{"):
            raise ConfigError(f"{key} is a section, not an option; give --{key}.KEY VALUE")
        elif key == "checkpoint.resume" and not has_value:
            has_value, value = True, "true"
        elif int in (kinds.get(key), *get_args(kinds.get(key))):
            value = str(int(float(value))) if _WHOLE.fullmatch(value) else value
        words.append(f"{option}={value}" if has_value else option)
    return words


_WHOLE = re.compile(r"[-+]?\d{1,15}(\.0*)?([eE]\+?\d)?")


def _layer(values: Mapping[Any, Any]) -> str:
    """YAML that sets these values; an empty section means its defaults."""
    filled = nested(values)
    for name, _ in _sections(Config):
        *above, leaf = name.split(".")
        section: Any = filled
        for part in above:
            section = section.get(part) if isinstance(section, dict) else None
        if isinstance(section, dict) and leaf in section:
            if section[leaf] is None:
                del section[leaf]
            elif not isinstance(section[leaf], dict):
                raise ConfigError(f"{name} is {section[leaf]!r}; it must hold its keys")
    try:
        return dump_yaml(filled)
    except yaml.YAMLError as error:
        raise ConfigError(f"a value of the configuration cannot be used ({error})") from None
