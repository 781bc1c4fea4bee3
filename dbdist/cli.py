"""The console script: `dbdist train|evaluate|plan|export|merge|…`.

Imports a command when it is asked for, so that --help, --version and configs answer at once.
"""

import sys
from importlib import import_module

from dbdist.commands.command_line import fail, print_anything
from dbdist.config.nearest import unknown
from dbdist.config.registry import SECTIONS

COMMANDS = {
    "train": "train the blocks of a model, one per rank (torchrun), or a whole model in one "
    "process",
    "evaluate": "score a run's checkpoint on the test set, through the chain or in one process",
    "configs": "list the configurations that come with dbdist, or write one here for editing",
    "plan": "show which block would go on which GPUs of which node, what it needs there, and what "
    "to type",
    "check-data": "open every sample once and list what cannot be used",
    "sample": "draw samples from a run's model, through the chain or in one process",
    "encode-latents": "compute the latents of a set of images once, by an autoencoder on disk",
    "export": "write a run's model as one model.safetensors + config.json for dbdist.load",
    "merge": "join blocks of one model that were trained in different places into one run",
    "import-published": "convert weights of the published ViT code to an exported model",
}


def main(argv: list[str] | None = None) -> None:
    """Runs a command; without one, shows which there are."""
    argv = sys.argv[1:] if argv is None else argv
    print_anything()
    if not argv or argv[0] in ("-h", "--help"):
        lines = [f"  {name:<18}{text}" for name, text in COMMANDS.items()]
        print("usage: dbdist COMMAND [--help] …\n\ncommands:\n" + "\n".join(lines) + "\n")
        for section, known in SECTIONS.items():
            print(f"--{section}.name: {', '.join(known)}")
        sys.exit(0 if argv else 2)
    if argv[0] == "--version":
        from dbdist.version import __version__

        print(__version__)
        return
    command, rest = argv[0], argv[1:]
    if command not in COMMANDS:
        fail("dbdist", unknown("command", command, COMMANDS))
    package = "dbdist" if command in ("train", "evaluate") else "dbdist.commands"
    import_module(f"{package}.{command.replace('-', '_')}").main(rest)


def __getattr__(name: str) -> object:
    """`parse_config`, which scripts import from here; it lives in `dbdist.config.parse`."""
    if name == "parse_config":
        from dbdist.config.parse import parse_config

        return parse_config
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
