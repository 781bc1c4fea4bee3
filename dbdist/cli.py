"""Command lines: `dbdist train|evaluate|plan|export|merge|…`, `python -m dbdist.train`, …

Parses with jsonargparse, and turns every mistake of a user into one line and exit code 2.
"""

import argparse
import dataclasses
import difflib
import os
import re
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_args

import yaml
from jsonargparse import (
    ActionConfigFile,
    ArgumentError,
    ArgumentParser,
    Namespace,
    get_loader,
    set_loader,
    set_parsing_settings,
)

from dbdist.config import Config
from dbdist.errors import ConfigError, Fault, UserError

if TYPE_CHECKING:
    from dbdist.parallel.launch import Launch

MAX_YAML_CHARACTERS = 2**16
MAX_YAML_DEPTH = 16
MAX_YAML_NODES = 10_000
_YAML = "dbdist"
"""jsonargparse's name for `_load_yaml`."""
COMMANDS = {
    "train": "train the blocks of a model, one per rank (torchrun), or a whole model in one "
    "process",
    "evaluate": "score a run's checkpoint on the test set, through the chain or in one process",
    "plan": "show which block would go on which GPUs of which node, what it needs there, and what "
    "to type",
    "export": "write a run's model as one model.safetensors + config.json for dbdist.load",
    "merge": "join blocks of one model that were trained in different places into one run",
    "import-published": "convert weights of the published ViT code to an exported model",
}


def main(argv: list[str] | None = None) -> None:
    """The console script."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        lines = [f"  {name:<18}{text}" for name, text in COMMANDS.items()]
        print("usage: dbdist COMMAND [--help] …\n\ncommands:\n" + "\n".join(lines))
        sys.exit(0 if argv else 2)
    if argv[0] == "--version":
        from dbdist import __version__

        print(__version__)
        return
    command, rest = argv[0], argv[1:]
    if command == "train":
        from dbdist.train import main as run
    elif command == "evaluate":
        from dbdist.evaluate import main as run
    elif command == "plan":
        from dbdist.plan import main as run
    elif command == "export":
        from dbdist.export import main as run
    elif command == "merge":
        from dbdist.merge import main as run
    elif command == "import-published":
        from dbdist.import_published import main as run
    else:
        fail("dbdist", _unknown("command", command, list(COMMANDS)))
    run(rest)


def fail(prog: str, message: object, code: int = 2) -> NoReturn:
    """One line on stderr and an exit code; after a user's mistake, processes of one launcher wait
    for each other, so that it stops none of them before its line."""
    say(prog, f"error: {message}")
    if code == 2:
        _launch().leave_together()
    # No interpreter shutdown: a process group that lost its peers must not hold the exit code back.
    with suppress(OSError):
        sys.stdout.flush()
    os._exit(code)


def say(prog: str, message: object) -> None:
    """One line on stderr, with the rank where there are several."""
    text = " ".join(str(message).split())
    launch = _launch()
    rank = f"[r{launch.rank}] " if launch.world_size > 1 else ""
    with suppress(OSError):  # nobody listens any more, which must not keep anybody from ending
        sys.stderr.flush()
        os.write(2, f"{rank}{prog}: {text}\n".encode())  # at once: ranks share the terminal


def guarded(
    prog: str,
    run: Callable[[], None],
    interrupted: str = "the same command continues from the newest checkpoint",
) -> None:
    """Runs a command; a UserError ends it with one line and exit code 2, a Fault with 1, Ctrl-C
    with 130 and a line that says `interrupted`."""
    try:
        run()
    except UserError as error:
        fail(prog, error)
    except Fault as fault:
        fail(prog, fault, code=1)
    except KeyboardInterrupt:
        if _launch().rank == 0:
            print(f"\n{prog}: interrupted; {interrupted}", file=sys.stderr)
        os._exit(130)


def parse_config(
    prog: str, description: str, argv: list[str], first: list[str] | None = None
) -> Config:
    """The configuration of a command line: defaults, then `first` (e.g. a run's own config file),
    then argv.

    Raises ConfigError for anything that is not a valid configuration; --help prints every key and
    exits.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    set_loader(_YAML, _load_yaml, (yaml.YAMLError,))
    parser = ArgumentParser(
        prog=prog,
        description=description,
        exit_on_error=False,
        allow_abbrev=False,
        parser_mode=_YAML,
    )
    parser.add_argument(
        "--config", action=ActionConfigFile, help="YAML file; later options override it."
    )
    parser.add_argument(
        "--local_rank",
        "--local-rank",
        type=int,
        help="For launchers that pass it; LOCAL_RANK in the environment is what counts.",
    )
    parser.add_class_arguments(Config)
    try:
        parsed = parser.parse_args([*(first or []), *_with_values(argv)])
        _check_local_rank(parsed.local_rank)
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


def _load_yaml(text: str) -> Any:
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


def _check_local_rank(given: int | None) -> None:
    """Raises ConfigError for a --local_rank that is not the environment's."""
    from dbdist.parallel.launch import Launch

    if given is not None and given != (known := Launch.from_environment().local_rank):
        raise ConfigError(
            f"--local_rank is {given}, but the launcher's environment says {known}; leave it out"
        )


def explain(error: str) -> str:
    """jsonargparse's message as one sentence, with the nearest known key for an unknown one."""
    if found := re.search(r"unrecognized arguments: --([\w.-]+)", error):
        return _unknown("option", found[1], [*dict(_keys(Config)), "config", "local_rank"], "--")
    if found := re.search(r"Option '([\w.-]+)' is not accepted", error):
        return _unknown("key", found[1], list(dict(_keys(Config))))
    if found := re.search(
        r"Group '([\w.-]+)' does not accept (?:option|nested key|key) '([\w.-]+)'", error
    ):
        return _unknown("key", f"{found[1]}.{found[2]}", list(dict(_keys(Config))))
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


class OneLineParser(argparse.ArgumentParser):
    """argparse, its complaints in one line."""

    def error(self, message: str) -> NoReturn:
        fail(self.prog, f"{message}; see --help")


def _launch() -> "Launch":
    """This process among those the launcher started; a process alone if that cannot be told."""
    from dbdist.parallel.launch import Launch

    try:
        return Launch.from_environment()
    except UserError:
        return Launch(0, 1, 0, 1)


def _unknown(kind: str, given: str, known: list[str], dashes: str = "") -> str:
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
