"""Turns a command line, or values from Python, into a `Config`, and mistakes into one line."""

# What torch and jsonargparse leave untyped:
# pyright: reportPrivateImportUsage=false, reportUnknownArgumentType=false, reportUnknownMemberType=false, reportUnknownVariableType=false

import dataclasses
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
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

from dbdist.config import registry
from dbdist.config.config import Config
from dbdist.config.nearest import unknown
from dbdist.config.presets import config_file
from dbdist.config.sections import (
    Pair,
    add_sections,
    chosen_names,
    classes_of,
    keys_of,
    nested_sections,
)
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
    return _parsed(prog, description, _pairs([*(first or []), *argv]))


def config_of_folder(argv: list[str]) -> list[str]:
    """Words that read RUN/config.yaml of the run that argv names with --run_dir.

    No words without it. They are `first` of `parse_config`, so that options of the run's own task,
    data and model are known.
    """
    run_dir: Any = None
    for option, value in _pairs(argv):
        if option == "--run_dir":
            run_dir = value
        elif isinstance(value, Mapping):
            run_dir = value.get("run_dir", run_dir)
    path = Path(str(run_dir)).expanduser() / "config.yaml"
    return ["--config", str(path)] if run_dir is not None and path.is_file() else []


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
    return _parsed("dbdist", "", [("--config", values), ("--config", dotted)])


def _parsed(prog: str, description: str, pairs: list[Pair]) -> Config:
    has_help = any(option in ("-h", "--help") for option, _ in pairs)
    set_parsing_settings(docstring_parse_attribute_docstrings=has_help)  # takes half the time
    set_loader(YAML, load_yaml, (yaml.YAMLError,))
    parser = ArgumentParser(
        prog=prog,
        usage=f"{prog} [--section.key VALUE …]",
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
    names = chosen_names(pairs)
    classes = classes_of(names)
    add_sections(parser, classes, names)
    try:
        parsed = parser.parse_args(_words(pairs, classes))
        for section, _ in nested_sections(classes):
            if not isinstance(parsed.get(section), Namespace):
                raise ConfigError(f"{section} is {parsed.get(section)!r}; it must hold its keys")
        for key, kind in keys_of(classes).items():
            if parsed.get(key) is None and type(None) not in get_args(kind):
                raise ConfigError(f"{key} is null, which is no value for it; leave it out")
        values = parser.instantiate(parsed)
    except ArgumentError as error:
        raise ConfigError(" ".join(explain(str(error), keys_of(classes)).split())) from None
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


def explain(error: str, keys: Collection[str]) -> str:
    """jsonargparse's message as one sentence, with the nearest known key for an unknown one."""
    error = error.removeprefix('Parser key "config":').strip()
    if found := re.search(r"unrecognized arguments: --([\w.-]+)", error):
        return _unknown("option", found[1], [*keys, "config"], "--")
    if found := re.search(r"Option '([\w.-]+)' is not accepted", error):
        return _unknown("key", found[1], keys)
    if found := re.search(
        r"Group '([\w.-]+)' does not accept (?:option|nested key|key) '([\w.-]+)'", error
    ):
        return _unknown("key", f"{found[1]}.{found[2]}", keys)
    if found := re.search(r'Parser key "([\w.-]+)":\s*(.*)', error, re.DOTALL):
        return f"{found[1]}: {_expectation(' '.join(found[2].split()))}"
    return error


def _unknown(kind: str, given: str, keys: Collection[str], dashes: str = "") -> str:
    """One sentence about a key that the chosen task, model, data and process do not have."""
    section, _, field = given.partition(".")
    if owners := registry.names_with(section, field):
        return f"unknown {kind} {dashes}{given}; it is one of {section}.name: {' or '.join(owners)}"
    return unknown(kind, given, keys, dashes)


def _expectation(error: str) -> str:
    """What a value should have been, in words rather than Python's types."""
    if found := re.search(r"Subtypes: \[(.*?)\] Errors: .*Given value: (.*)", error):
        types = re.sub(r", (?![^\[]*\])", " or ", found[1])
        error = f"expected {types}, got {found[2]}"
    error = re.sub(r"Expected an? (.*)\. Got value: ", r"expected \1, got ", error)
    error = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", error).replace("NoneType", "null")
    error = re.sub(r"^expected str, got (.*)", r"expected text, got \1; put it in quotes", error)
    return re.sub(r"(?:typing\.)?Literal\[(.*?)\]", lambda m: m[1].replace(", ", " or "), error)


def _pairs(argv: list[str]) -> list[Pair]:
    """(option, value) of every word; a configuration file's content in place of its name."""
    pairs: list[Pair] = []
    rest = [*argv]
    while rest:
        option, is_joined, value = rest.pop(0).partition("=")
        has_value = bool(is_joined or (rest and not rest[0].startswith("--")))
        if has_value and not is_joined:
            value = rest.pop(0)
        if option == "--config" and has_value:
            pairs.append((option, read_yaml(config_file(value))))
        else:
            pairs.append((option, value if has_value else None))
    return pairs


def _words(pairs: list[Pair], classes: Mapping[str, type[Any]]) -> list[str]:
    """The words as jsonargparse takes them.

    A whole number stands for 5e4, `--checkpoint.resume true` for a bare `--checkpoint.resume`.
    """
    sections, kinds = {name for name, _ in nested_sections(classes)}, keys_of(classes)
    words: list[str] = []
    for option, value in pairs:
        key = option.removeprefix("--")
        if isinstance(value, Mapping):
            value = _layer(value, sections)
        elif key in sections and not (value or "").lstrip().startswith("{"):
            raise ConfigError(f"{key} is a section, not an option; give --{key}.KEY VALUE")
        elif key == "checkpoint.resume" and value is None:
            value = "true"
        elif value is not None and int in (kinds.get(key), *get_args(kinds.get(key))):
            value = str(int(float(value))) if _WHOLE.fullmatch(value) else value
        words.append(option if value is None else f"{option}={value}")
    return words


_WHOLE = re.compile(r"[-+]?\d{1,15}(\.0*)?([eE]\+?\d)?")


def _layer(values: Mapping[Any, Any], sections: Collection[str]) -> str:
    """YAML that sets these values; an empty section means its defaults."""
    filled = nested(values)
    if "config" in filled:
        raise ConfigError(
            "config stands inside a configuration; give --config once for each file instead"
        )
    for name in sections:
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
