"""Lists the configurations that come with dbdist, or writes one here for editing.

    dbdist configs [NAME]

`dbdist train NAME` takes a preset as it is, `dbdist train NAME.yaml` the file written here.
"""

import sys
from pathlib import Path

from dbdist.commands.command_line import OneLineParser, guarded
from dbdist.config.nearest import unknown
from dbdist.config.presets import presets, title
from dbdist.errors import ConfigError


def main(argv: list[str] | None = None) -> None:
    guarded("dbdist configs", lambda: run(sys.argv[1:] if argv is None else argv))


def run(argv: list[str]) -> None:
    parser = OneLineParser(prog="dbdist configs", description=__doc__)
    parser.add_argument("name", metavar="NAME", nargs="?", help="preset to write as NAME.yaml")
    name, known = parser.parse_args(argv).name, presets()
    if name is None:
        for preset, path in known.items():
            print(f"{preset:<{max(map(len, known)) + 2}}{title(path)}")
        return
    if name.removesuffix(".yaml") not in known:
        raise ConfigError(unknown("preset", name, known))
    source = known[name.removesuffix(".yaml")]
    out = Path(source.name)
    try:
        with out.open("xb") as file:
            file.write(source.read_bytes())
    except FileExistsError:
        raise ConfigError(f"{out} is here already; move it away, or edit it") from None
    except OSError as error:
        raise ConfigError(f"{out} cannot be written ({error.strerror})") from None
    print(f"{out}: dbdist train {out}")
