"""`dbdist export RUN OUT`: a run's model as one model.safetensors + config.json, for
`dbdist.load(OUT)`."""

import sys
from dataclasses import asdict
from pathlib import Path

from dbdist import build
from dbdist.build import describe_model
from dbdist.commands.command_line import OneLineParser, guarded
from dbdist.config.config import Config
from dbdist.data import dataset_spec
from dbdist.inference.exported import describe, save_model
from dbdist.inference.load_models import export_weights
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
    print(f"{given.out}: dbdist.load({given.out!r}).predict(images)")


def export(config: Config, out: Path) -> None:
    """Writes the run's checkpoint (`eval.step`, or the newest) as an exported model."""
    spec = dataset_spec(config.data)
    model = describe_model(config, spec)
    checkpoint = checkpoint_of_run(config, Topology(Layout(1)), model)
    weights, is_private = export_weights(config, checkpoint)
    sampler = {
        **asdict(config.sampler),
        "num_steps": config.sampler_steps,
        "seed": config.seed,
        "readout": list(config.readout_blocks),
    }
    schedule = None if config.mode == "end_to_end" else config.noise_schedule()
    layers = [len(layers) for layers in config.layers_of_block]
    sizes = build.architecture(config, spec)
    save_model(out, weights, describe(sizes, spec, layers, schedule, sampler, is_private))


if __name__ == "__main__":
    main()
