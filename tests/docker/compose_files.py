"""docker/'s compose files as Docker Compose reads them: variables first, then YAML, then words."""

import re
import shlex
from pathlib import Path
from typing import Any

import yaml

DOCKER = Path(__file__).resolve().parents[2] / "docker"
VARIABLE = re.compile(r"\$\{(\w+)(?::([-?])([^}]*))?\}")


def load(file: str, **variables: str) -> dict[str, Any]:
    """The file's content. Raises ValueError for a required variable that is not given."""

    def value(found: re.Match[str]) -> str:
        name, kind, text = found.groups()
        if kind == "?" and not variables.get(name):
            raise ValueError(f"{name}: {text}")
        return variables.get(name) or (text if kind == "-" else "")

    lines = (DOCKER / file).read_text().splitlines()
    text = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
    return yaml.safe_load(VARIABLE.sub(value, text))


def words_of_service(file: str, service: str, **variables: str) -> list[str]:
    """A service's command."""
    return shlex.split(load(file, **variables)["services"][service]["command"])
