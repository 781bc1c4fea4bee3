"""What one block has saved of a step, by itself: block-B.part.json beside the block's files.

Where blocks keep shared modules of their own (`parallel.sync: every` and `never`) a block needs no
other to be saved, continued or moved. Its part is written after its files and names them with size
and SHA-256. The parts of all blocks make a checkpoint, wherever and whenever each was trained.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from dbdist.checkpoint.names import blocks_in, part_file, step_folder
from dbdist.checkpoint.older import upgraded_model
from dbdist.errors import CheckpointError
from dbdist.whole_files import read_file, sync_folder, write_json

FORMAT = "dbdist-part"
VERSION = 1
Part = dict[str, Any]
"""format, version, step, block, model, seed, data, config, files, the versions of the code, and
whether a run of some blocks saved it."""


def read_part(path: Path, block: int) -> Part:
    """A block's part in a step's folder. Raises CheckpointError for a missing or damaged one."""
    file = path / part_file(block)
    try:
        text = read_file(file)
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror})") from None
    try:
        part = json.loads(text)
        is_readable = (
            (part["format"], part["version"], part["block"]) == (FORMAT, VERSION, block)
            and path.name == step_folder(part["step"])
            and isinstance(part["model"]["layers_per_block"], list)
            and isinstance(part["seed"], int)
            and isinstance(part["data"]["name"], str)
            and isinstance(part["config"], dict)
        )
        for name, entry in part["files"].items():  # its own and no path that leads elsewhere
            is_own = re.fullmatch(rf"block-{block}(\.\w+)?\.safetensors", name)
            is_readable = is_readable and bool(is_own) and _is_entry(entry)
        is_readable = is_readable and isinstance(part["is_alone"], bool)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        is_readable, part = False, {}
    if not is_readable:
        raise CheckpointError(
            f"{file} is damaged, of another step or not {FORMAT} version {VERSION}; remove it to "
            "continue that block from an older step"
        )
    return {**part, "model": upgraded_model(part["model"])}


def _is_entry(entry: Any) -> bool:
    return isinstance(entry["bytes"], int) and isinstance(entry["sha256"], str)


def has_all(path: Path) -> bool:
    """Says whether a folder without a manifest is a checkpoint: every block has a part there.

    At least one block was saved without waiting for others: parts that were written together wait
    for their manifest, which comes after the metrics.
    """
    blocks = blocks_in(path)
    for block in blocks:
        with suppress(CheckpointError):  # another one says as well how many blocks there are
            num_blocks = len(read_part(path, block)["model"]["layers_per_block"])
            if not set(blocks) >= set(range(num_blocks)):
                return False
            return any(_may_be_alone(path, block) for block in range(num_blocks))
    return False


def alone_in(path: Path) -> list[int]:
    """The blocks in a step's folder that a run of some blocks has saved."""
    return [block for block in blocks_in(path) if _may_be_alone(path, block)]


def _may_be_alone(path: Path, block: int) -> bool:
    """Whether a part was saved alone; also of a damaged one, for whoever reads it to be told."""
    try:
        return read_part(path, block)["is_alone"]
    except CheckpointError:
        return True


def join_parts(parts: Sequence[Part], places: Sequence[Path]) -> dict[str, Any]:
    """Joins the blocks' parts to the content of a manifest, without its format.

    places: where each part comes from, for the error. Raises CheckpointError where they are not
    of one model.
    """
    first = parts[0]
    for part, place in zip(parts, places, strict=True):
        of_first, of_part = (agreed(p) for p in (first, part))
        if difference := next(differences(of_first, of_part), None):
            key, expected, value = difference
            raise CheckpointError(
                f"{place / part_file(part['block'])} has {key} {value}, but "
                f"{places[0] / part_file(first['block'])} has {expected}; blocks of different "
                "models make no checkpoint, give each model a run_dir of its own"
            )
    files = {name: entry for part in parts for name, entry in part["files"].items()}
    of_part = ("format", "version", "block", "is_alone")
    own = {k: v for k, v in first.items() if k not in of_part}
    return {**own, "files": dict(sorted(files.items()))}


def agreed(part: Part, with_step: bool = True) -> dict[str, Any]:
    """What the parts of one model have in common.

    Of their data that is the name and the classes; samples may differ. Older parts do not say what
    form their samples had.
    """
    model = {key: value for key, value in part["model"].items() if key != "inputs"}
    data = {key: part["data"].get(key) for key in ("name", "class_names")}
    step = {"step": part["step"]} if with_step else {}
    return {**step, "model": model, "seed": part["seed"], "data": data}


def assemble(path: Path, blocks: Iterable[int] | None = None) -> dict[str, Any]:
    """As `join_parts`, of these blocks (None: of all there are) in a step's folder."""
    parts = [read_part(path, block) for block in (blocks_in(path) if blocks is None else blocks)]
    return join_parts(parts, [path] * len(parts))


def differences(old: Any, new: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, old value, new value) of everything in `new` that `old` has otherwise."""
    if isinstance(old, dict) and isinstance(new, Mapping):
        for name, value in new.items():
            yield from differences(old.get(name), value, f"{key}.{name}" if key else name)
    elif old != new:
        yield key, old, new


def write_part(path: Path, part: Part) -> None:
    """Marks a block's files in a step's folder as saved, for good. Raises OSError."""
    write_json(path / part_file(part["block"]), {"format": FORMAT, "version": VERSION, **part})
    for folder in (path, path.parent, path.parent.parent):
        sync_folder(folder)


def remove_block(path: Path, block: int) -> None:
    """Removes what a block has in a step's folder, and the folder after its last block.

    Raises OSError.
    """
    (path / part_file(block)).unlink(missing_ok=True)  # from here on there is no part
    for file in path.glob(f"block-{block}.*"):
        file.unlink(missing_ok=True)
    if not any(path.glob("block-*")):
        for file in path.glob("shared.*"):
            file.unlink(missing_ok=True)
    with suppress(OSError):  # not empty: another block's files are there, or arrive just now
        path.rmdir()
