"""Writes a run's model as one model.safetensors + config.json, for `dbdist.load(OUT)`.

    dbdist export RUN OUT

The data's files are not needed.
"""

import sys
from dataclasses import replace
from pathlib import Path

from dbdist.build import build_setup
from dbdist.commands.command_line import OneLineParser, guarded
from dbdist.config.config import Config
from dbdist.inference.exported import Description, save_model
from dbdist.inference.load_models import export_weights, spec_of_checkpoint
from dbdist.inference.of_run import checkpoint_of_run
from dbdist.parallel.layout import Layout
from dbdist.parallel.topology import Topology
from dbdist.run.folder import config_of_run


def main(argv: list[str] | None = None) -> None:
    guarded("dbdist export", lambda: run(sys.argv[1:] if argv is None else argv))


def run(argv: list[str]) -> None:
    parser = OneLineParser(
        prog="dbdist export",
        description=__doc__,
        epilog="Further options as for evaluate: --sampler.num_steps 12, --eval.step 50, …",
    )
    parser.add_argument("run_dir", metavar="RUN", help="folder of a trained run")
    parser.add_argument("out", metavar="OUT", help="folder to write")
    given, options = parser.parse_known_args(argv)
    config = config_of_run("dbdist export", "", ["--run_dir", given.run_dir, *options])
    export(config, Path(given.out))
    print(f"{given.out}: dbdist.load({given.out!r})")


def export(config: Config, out: Path) -> None:
    """Writes the run's checkpoint (`eval.step`, or the newest) as an exported model.

    The data set's files are not needed: the checkpoint says what a model must know of them.
    """
    topology = Topology(Layout(1))
    checkpoint = checkpoint_of_run(config, topology, {})
    spec = spec_of_checkpoint(config, checkpoint)
    setup = build_setup(config, spec)
    checkpoint.check_fits(setup.describe())
    weights, is_private = export_weights(config, checkpoint)
    layers = tuple(len(layers) for layers in config.layers_of_block)
    sampler = config.sampler
    if not config.is_plain:
        sampler = replace(sampler, num_steps=config.sampler_steps)
    save_model(
        out, weights, Description(replace(config, sampler=sampler), spec, layers, is_private)
    )


if __name__ == "__main__":
    main()
