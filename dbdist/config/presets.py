"""The configurations that come with dbdist, by name, such as `digits` and `cifar100`."""

import difflib
import os
from pathlib import Path

from dbdist.config.nearest import nearest
from dbdist.config.registry import DATASETS
from dbdist.errors import ConfigError

_PACKAGE = Path(__file__).resolve().parent.parent
FOLDERS = (_PACKAGE / "configs", _PACKAGE.parent / "configs")
"""Inside an installed package, or beside it in the repository."""


def presets() -> dict[str, Path]:
    """Name -> file of every preset."""
    folder = next((f for f in FOLDERS if f.is_dir()), FOLDERS[0])
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def title(path: Path) -> str:
    """What a preset is: the first comment line of its file."""
    with path.open(encoding="utf-8") as file:
        return file.readline().removeprefix("#").strip()


def config_file(name: str | os.PathLike[str]) -> Path:
    """The file that a path or the name of a preset means; a path comes first.

    Raises ConfigError where there is neither, with the nearest name.
    """
    known, path = presets(), Path(os.path.expanduser(name))
    try:
        is_there = path.exists()
    except (OSError, ValueError) as error:  # a name that no file can have
        raise ConfigError(f"{str(name)[:80]!r} can be no file ({error})") from None
    if str(name) in known and not path.is_file():
        return known[str(name)]
    if is_there:
        return path
    raise ConfigError(f"{name} is neither a file nor a preset; {_hint(path, known)}")


def _hint(path: Path, known: dict[str, Path]) -> str:
    """What was probably meant."""
    beside: list[str] = []
    try:
        beside = [
            entry.name for entry in path.parent.iterdir() if entry.suffix in (".yaml", ".yml")
        ]
    except OSError:
        pass  # no such folder either
    if close := difflib.get_close_matches(path.name, beside, n=1, cutoff=0.6):
        return f"did you mean {path.with_name(close[0])}?"
    if str(path) in DATASETS:
        return f"to train on that data set, give --data.name {path}, after a preset or alone"
    if (meant := nearest(path.stem, known)) is not None:
        return f"did you mean the preset {meant}?"
    return f"presets are {', '.join(known)}"
