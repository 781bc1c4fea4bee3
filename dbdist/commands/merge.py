"""Joins blocks of one model that were trained in different places into a new run.

    dbdist merge RUN_A RUN_B … OUT

The runs have parallel.sync never or every. OUT keeps the configuration of RUN_A.
"""

import dataclasses
import hashlib
import os
import shlex
import shutil
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from dbdist import log
from dbdist.checkpoint.manifest import write_manifest
from dbdist.checkpoint.names import blocks_in, step_folder, step_folders, step_of
from dbdist.checkpoint.parts import Part, agreed, differences, join_parts, read_part, write_part
from dbdist.checkpoint.same_data import check_meaning, samples_differ
from dbdist.commands.command_line import OneLineParser, guarded
from dbdist.config.config import Config
from dbdist.config.yaml_files import write_yaml
from dbdist.errors import CheckpointError, ConfigError
from dbdist.run.folder import MAY_CHANGE, read_config
from dbdist.whole_files import open_file, sync_folder

CHUNK_BYTES = 2**22


@dataclasses.dataclass(frozen=True)
class Run:
    """A run to take blocks from."""

    path: Path
    config: Config
    parts: Mapping[int, Mapping[int, Part]]
    """Step -> block -> its part."""

    @property
    def newest(self) -> Part:
        return next(iter(self.parts[max(self.parts)].values()))

    @property
    def num_blocks(self) -> int:
        return len(self.newest["model"]["layers_per_block"])

    @property
    def has(self) -> str:
        """What it has, for a message."""
        steps: dict[int, list[int]] = {}
        for step, parts in sorted(self.parts.items()):
            for block in parts:
                steps.setdefault(block, []).append(step)
        return f"{self.path}: " + ", ".join(
            f"block {block} at step {' '.join(map(str, own))}"
            for block, own in sorted(steps.items())
        )


def main(argv: list[str] | None = None) -> None:
    guarded(
        "dbdist merge",
        lambda: run(sys.argv[1:] if argv is None else argv),
        "nothing was written; the same command starts anew",
    )


def run(argv: list[str]) -> None:
    parser = OneLineParser(prog="dbdist merge", description=__doc__)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folders of runs, two or more")
    parser.add_argument("out", metavar="OUT", help="folder to write: a run")
    parser.add_argument("--step", type=int, help="of all blocks; default: the newest that all have")
    parser.add_argument(
        "--from",
        dest="sources",
        action="append",
        default=[],
        metavar="B=RUN",
        help="where block B comes from, if several runs have it",
    )
    given = parser.parse_args(argv)
    if len(given.runs) < 2:
        raise ConfigError("dbdist merge needs two runs or more, and OUT: dbdist merge A B OUT")
    runs = [open_run(Path(path)) for path in given.runs]
    check_alike(runs)
    sources = parse_sources(given.sources, runs)
    step, chosen = choose(runs, given.step, sources)
    out = Path(given.out)
    write_run(out, merged_config(runs, out), step, chosen)
    for block, source in enumerate(chosen):
        print(f"block {block} of step {step} from {source.path}")
    if changed := sorted(set(_training_differences(runs))):
        print(f"{out} continues with {runs[0].path}'s {', '.join(changed)}")
    print(f"{out}: dbdist evaluate {shlex.quote(str(out))}")


def open_run(path: Path) -> Run:
    """Reads a run and what its blocks have saved.

    Raises ConfigError or CheckpointError where there is nothing to take a block from.
    """
    config = read_config(path)
    if config is None:
        raise ConfigError(f"{path} holds no run (config.yaml is missing); give a trained one")
    if not config.has_copies:
        kind = f"parallel.sync: {config.parallel.sync}"
        kind = kind if config.mode == "block_parallel" else f"mode: {config.mode}"
        raise ConfigError(
            f"{path} was trained with {kind}: its blocks depend on one set of shared modules; "
            "merge takes runs of parallel.sync: never or every"
        )
    parts = {
        step_of(folder): {block: read_part(folder, block) for block in blocks}
        for folder in step_folders(path / "checkpoints")
        if (blocks := blocks_in(folder))
    }
    if not parts:
        raise CheckpointError(f"{path} has no block-B.part.json in any checkpoint; train it first")
    return Run(path, config, parts)


def check_alike(runs: Sequence[Run]) -> None:
    """Raises ConfigError naming two runs and the first thing that makes them two models."""
    first, seen = runs[0], {runs[0].path.resolve()}
    for other in runs[1:]:
        if other.path.resolve() in seen:
            raise ConfigError(f"{other.path} is named twice; give each run once")
        seen.add(other.path.resolve())
        of_first, of_other = (
            {
                **agreed(run.newest, with_step=False),
                "train.ema_decay above 0": run.config.train.ema_decay > 0,
            }
            for run in (first, other)
        )
        if difference := next(differences(of_first, of_other), None):
            key, own, value = difference
            key = key.removeprefix("model.")
            raise ConfigError(
                f"{first.path} has {key} {own}, but {other.path} has {value}; only blocks of one "
                "model can be merged"
            )
        check_meaning(first.path, first.newest["data"], other.newest["data"])
        if difference := samples_differ(first.newest["data"], other.newest["data"], "train"):
            log.warning(
                f"{first.path} and {other.path} were trained on different samples ({difference})"
            )


def parse_sources(words: Sequence[str], runs: Sequence[Run]) -> dict[int, Run]:
    """Block -> the run that `--from B=RUN` names. Raises ConfigError."""
    sources: dict[int, Run] = {}
    num_blocks = runs[0].num_blocks
    for word in words:
        number, is_given, path = word.partition("=")
        if not is_given or not number.isdecimal() or int(number) >= num_blocks:
            raise ConfigError(f"--from {word} must be B=RUN, with a block B of 0..{num_blocks - 1}")
        found = [run for run in runs if run.path.resolve() == Path(path).resolve()]
        if not found:
            listed = ", ".join(str(run.path) for run in runs)
            raise ConfigError(f"--from {word}: {path} is none of the runs to merge ({listed})")
        if int(number) in sources:
            raise ConfigError(f"--from names block {number} twice; give it once")
        sources[int(number)] = found[0]
    return sources


def choose(
    runs: Sequence[Run], step: int | None, sources: Mapping[int, Run]
) -> tuple[int, list[Run]]:
    """Chooses the step and each block's run.

    The step is by default the newest at which every block is somewhere. Raises CheckpointError for
    a block in none or, without a source, in several.
    """
    blocks = range(runs[0].num_blocks)

    def owners(block: int, at: int) -> list[Run]:
        asked = [sources[block]] if block in sources else runs
        return [run for run in asked if block in run.parts.get(at, {})]

    has = "; ".join(run.has for run in runs)
    if step is None:
        steps = sorted({step for run in runs for step in run.parts}, reverse=True)
        step = next((s for s in steps if all(owners(block, s) for block in blocks)), None)
    if step is None:
        for block in blocks:
            if not any(owners(block, s) for run in runs for s in run.parts):
                where = f"not in {sources[block].path}" if block in sources else "in no run"
                raise CheckpointError(f"block {block} is {where} ({has}); train it first")
        raise CheckpointError(f"there is no step that all blocks have ({has}); train on to one")
    chosen: list[Run] = []
    for block in blocks:
        found = owners(block, step)
        if not found:
            raise CheckpointError(f"no run gives block {block} at step {step} ({has})")
        if len(found) > 1:
            raise CheckpointError(
                f"block {block} of step {step} is in {' and '.join(str(r.path) for r in found)}; "
                f"say which with --from {block}={found[0].path}"
            )
        chosen += found
    return step, chosen


def merged_config(runs: Sequence[Run], out: Path) -> Config:
    """The first run's; `never` unless all are `every`."""
    config = dataclasses.replace(runs[0].config, run_dir=str(out))
    if all(run.config.parallel.sync == "every" for run in runs):
        return config
    parallel = dataclasses.replace(
        config.parallel, sync="never", coordinator="colocated", outer_lr=1.0, outer_momentum=0.0
    )
    return dataclasses.replace(config, parallel=parallel)


def write_run(out: Path, config: Config, step: int, chosen: Sequence[Run]) -> None:
    """Writes OUT, whole or not at all.

    Raises CheckpointError for a damaged file and where OUT cannot be written.
    """
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ConfigError(f"{out} exists and is not empty; give another OUT")
    except OSError as error:
        raise ConfigError(f"{out} cannot be written ({error.strerror})") from None
    alone: Part = {"is_alone": True}  # what a run had for all its blocks stays there
    parts = [run.parts[step][block] | alone for block, run in enumerate(chosen)]
    places = [_folder(run.path, step) for run in chosen]
    joined = join_parts(parts, places)
    try:
        with _new_folder(out) as partial:
            folder = _folder(partial, step)
            folder.mkdir(parents=True)
            for part, place in zip(parts, places, strict=True):
                for name, stated in part["files"].items():
                    _copy(place / name, folder / name, stated["sha256"])
                write_part(folder, part)
            files = joined.pop("files")
            write_manifest(folder, joined | {"config": dataclasses.asdict(config)}, files)
            write_yaml(config, partial / "config.yaml")
    except OSError as error:
        raise CheckpointError(f"{out} cannot be written ({error.strerror})") from None


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder that becomes OUT at the end, or is removed on any error."""
    parent = out.absolute().parent
    place = next(path for path in (parent, *parent.parents) if path.exists())
    partial = place / f".{out.name}.{uuid.uuid4().hex}.partial"
    partial.mkdir()
    try:
        yield partial
        parent.mkdir(parents=True, exist_ok=True)
        os.rename(partial, out)  # over an empty folder, if there is one
        sync_folder(parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _copy(source: Path, target: Path, sha256: str) -> None:
    """Raises CheckpointError for a source that is missing, or is not what was written."""
    digest = hashlib.sha256()
    try:
        file = open_file(source)
    except OSError as error:
        raise CheckpointError(f"{source} cannot be read ({error.strerror})") from None
    with file, target.open("xb") as copy:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            copy.write(chunk)
        copy.flush()
        os.fsync(copy.fileno())
    if digest.hexdigest() != sha256:
        raise CheckpointError(f"{source} is damaged: its content is not what was written")


def _folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / step_folder(step)


def _training_differences(runs: Sequence[Run]) -> Iterator[str]:
    """Keys in which the runs were trained differently."""
    first = dataclasses.asdict(runs[0].config)
    for other in runs[1:]:
        for key, _, _ in differences(first, dataclasses.asdict(other.config)):
            if not any(f"{key}.".startswith(f"{free}.") for free in MAY_CHANGE):
                yield key


if __name__ == "__main__":
    main()
