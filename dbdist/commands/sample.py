"""Draws samples from a run's model: images or texts that nobody has seen.

    dbdist sample RUN --classes 0-9 --num 100 --seed 0 --guidance 2
    torchrun … --nproc_per_node=3 -m dbdist.commands.sample RUN --num_samples 100 …

One process runs all blocks in turn; as many as blocks (or a multiple) run them as a chain. A sample
is the same either way: what is random for it depends on the seed and its number alone. OUT gets
samples.safetensors, and what the task makes of them to look at. The data's files are not needed.
"""

import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from dbdist.commands.command_line import (
    OneLineParser,
    announce,
    guarded,
    say,
    without_local_rank,
)
from dbdist.config.parse import config_of_folder, parse_config
from dbdist.errors import ConfigError
from dbdist.parallel.launch import Launch

PROG = "dbdist sample"


def main(argv: list[str] | None = None) -> None:
    guarded(
        PROG,
        lambda: run(sys.argv[1:] if argv is None else argv),
        interrupted="the same command draws the same samples",
    )


def run(argv: list[str]) -> None:
    parser = OneLineParser(
        prog=PROG,
        description=__doc__,
        epilog="Further options as for evaluate: --sampler.num_steps 50, --eval.step 500, "
        "--eval.micro_batch_size 100, …",
        allow_abbrev=False,
    )
    parser.add_argument("run_dir", metavar="RUN", help="folder of a trained run")
    parser.add_argument(
        "--num",
        "--num_samples",  # torchrun takes --num for an option of its own
        type=int,
        default=100,
        help="samples to draw; 100 if not given",
    )
    parser.add_argument("--classes", help="classes to take in turn, such as 0-9 or 3,5; all")
    parser.add_argument("--seed", type=int, help="names all that is random; the run's own")
    parser.add_argument("--guidance", type=float, help="short for --sampler.guidance_scale")
    parser.add_argument("--out", type=Path, help="folder to write; RUN/samples-step-N-seed-S")
    parser.add_argument("--vae", type=Path, help="autoencoder's folder, to decode latents with")
    given, options = parser.parse_known_args(without_local_rank(argv))
    if given.guidance is not None:
        options += ["--sampler.guidance_scale", str(given.guidance)]
    classes = None if given.classes is None else _numbers(given.classes)
    if given.num < 1:
        raise ConfigError(f"--num is {given.num}; it must be at least 1")
    words = ["--run_dir", given.run_dir, *options]
    parse_config(PROG, "", words, first=config_of_folder(words))  # mistakes need no torch
    announce(PROG)
    from dbdist.inference.of_run import layout_for_evaluation
    from dbdist.inference.samples import draw
    from dbdist.parallel.session import facts_of, joined
    from dbdist.run.folder import config_of_run

    config = config_of_run(PROG, "", words)
    if given.seed is not None:
        config = replace(config, seed=given.seed).validate()
    config = replace(config, eval=replace(config.eval, drop_last=False))
    launch = Launch.from_environment()
    layout = layout_for_evaluation(config, launch.world_size)
    with joined(config, layout, launch, facts_of(config), partial(say, PROG)) as topology:
        files = draw(config, topology, classes, given.num, given.out, given.vae)
    for file in files:
        print(file)


def _numbers(text: str) -> tuple[int, ...]:
    """`0-2,5` as 0, 1, 2, 5."""

    def parts() -> Iterator[int]:
        for part in text.split(","):
            first, _, last = part.partition("-")
            yield from range(int(first), int(last or first) + 1)

    found: list[int] = []
    with suppress(ValueError):
        found = list(parts())
    if not found:
        raise ConfigError(f"--classes is {text!r}; it must be numbers such as 0-9 or 3,5")
    return tuple(found)


if __name__ == "__main__":
    main()
