"""A command line becomes a `Config`; every mistake becomes one sentence."""

import dataclasses
import difflib
import re
from collections.abc import Iterator
from typing import Any, get_args

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
from dbdist.config.yaml_files import YAML, load_yaml
from dbdist.errors import ConfigError


def parse_config(
    prog: str, description: str, argv: list[str], first: list[str] | None = None
) -> Config:
    """The configuration of a command line: defaults, then `first` (e.g. a run's own config file),
    then argv.

    Raises ConfigError for anything that is not a valid configuration; --help prints every key and
    exits.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    set_loader(YAML, load_yaml, (yaml.YAMLError,))
    parser = ArgumentParser(
        prog=prog,
        description=description,
        exit_on_error=False,
        allow_abbrev=False,
        parser_mode=YAML,
    )
    parser.add_argument(
        "--config", action=ActionConfigFile, help="YAML file; later options override it."
    )
    parser.add_class_arguments(Config)
    try:
        parsed = parser.parse_args([*(first or []), *_with_values(argv)])
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
    return Config(**{f.name: getattr(values, f.name) for f in dataclasses.fields(Config)})


def explain(error: str) -> str:
    """jsonargparse's message as one sentence, with the nearest known key for an unknown one."""
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
    return re.sub(r"(?:typing\.)?Literal\[(.*?)\]", lambda m: m[1].replace(", ", " or "), error)


def unknown(kind: str, given: str, known: list[str], dashes: str = "") -> str:
    # The right name under the wrong section comes before a similar one.
    leaf = given.rpartition(".")[2]
    nearest = [k for k in known if k.rpartition(".")[2] == leaf][:1]
    nearest = nearest or difflib.get_close_matches(given, known, n=1, cutoff=0.3)
    hint = f"; did you mean {dashes}{nearest[0]}?" if nearest else "; see --help"
    return f"unknown {kind} {dashes}{given}{hint}"


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


def _with_values(argv: list[str]) -> list[str]:
    """A bare `--checkpoint.resume` stands for `--checkpoint.resume true`."""
    words: list[str] = []
    for i, word in enumerate(argv):
        is_bare = word == "--checkpoint.resume" and (
            i + 1 == len(argv) or argv[i + 1].startswith("--")
        )
        words.append("--checkpoint.resume=true" if is_bare else word)
    return words
