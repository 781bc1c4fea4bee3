"""Which checkpoint a run continues from, or is evaluated or exported with: the newest, or with
`checkpoint.fallback` the newest intact one.

Every rank checks the manifest and hashes the files that it will read, and no others; the verdicts
are gathered, so all ranks choose the same step. Nothing is changed before `set_aside`.
"""

import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dbdist.checkpoint.manifest import Checkpoint, open_folder, saved_folders
from dbdist.checkpoint.names import MANIFEST, step_of
from dbdist.errors import CheckpointError
from dbdist.parallel.topology import Topology

Needs = Callable[[Checkpoint], Iterable[str]]
"""The files of a checkpoint that this rank will read."""


@dataclass(frozen=True)
class Choice:
    """The checkpoint to use; the files that this rank needs are intact."""

    checkpoint: Checkpoint
    damaged: list[Path]
    """Folders of newer checkpoints, which were passed over."""


def choose(
    run_dir: Path,
    topology: Topology,
    model: Mapping[str, Any],
    needs: Needs,
    *,
    fallback: bool,
    step: int | None = None,
    is_training: bool = False,
    blocks: Sequence[int] | None = None,
    attempts: int = 3,
) -> Choice | None:
    """The newest checkpoint; with `fallback`, the newest intact one; with `step`, that one and no
    other. None where there is none. Collective.

    model: what the checkpoint must agree with. is_training: it will be continued. blocks: those
    that it must have; None: all. attempts: while a run goes on it may remove what was just found;
    then newer ones are looked for. Raises CheckpointError, the same on every rank, if it is damaged
    or foreign; the message names the file and the newest step that is intact.
    """
    folder = run_dir / "checkpoints"
    found: list[Path] = []
    with topology.agree("reading the run directory"):
        found = saved_folders(folder, blocks)
    seen: list[Any] = topology.gather([path.name for path in found])
    newest = [names[-1] if names else "none" for names in seen]
    if is_training and len(set(newest)) > 1:
        raise CheckpointError(
            f"{run_dir} is not the same folder on all ranks: they see checkpoints {newest}"
        )
    # While a run is evaluated it may go on: not all ranks see its newest and its oldest.
    common = [path for path in found if all(path.name in names for names in seen)]
    if step is not None:
        common = [path for path in common if step_of(path) == step]
        if not common:
            steps = sorted(map(step_of, found))
            raise CheckpointError(
                f"{folder} has no checkpoint of step {step}; it has {steps or 'none'}"
            )
    damaged: list[tuple[Path, str]] = []
    for path in reversed(common):
        checkpoint, reason = _verdict(path, topology, model, needs, blocks)
        if checkpoint is None:
            if not is_training and attempts > 1 and any(topology.gather(not path.is_dir())):
                return choose(
                    run_dir,
                    topology,
                    model,
                    needs,
                    fallback=fallback,
                    step=step,
                    blocks=blocks,
                    attempts=attempts - 1,
                )
            damaged.append((path, reason))
            continue
        if damaged:
            _tell(damaged, checkpoint, topology, fallback, is_training)
        return Choice(checkpoint, [path for path, _ in damaged])
    if not damaged:
        return None
    rest = "no other checkpoint is intact; bring the file back from a copy, or give another run_dir"
    if step is not None:
        rest = "give another --eval.step, or leave it out for the newest"
    raise CheckpointError(f"{damaged[0][1]}; {rest}")


def set_aside(folders: Iterable[Path], blocks: Sequence[int] | None = None) -> None:
    """Renames damaged checkpoints, so that they neither count nor are met again; with `blocks`,
    these blocks' files alone, as the others' may be intact. Raises CheckpointError where that is
    not allowed."""
    for path in folders:
        try:
            if blocks is None:
                _rename(path, f"{path.name}.damaged")
                continue
            (path / MANIFEST).unlink(missing_ok=True)  # it named all blocks
            for block in blocks:
                files = path.glob(f"block-{block}.*")
                for file in sorted(files, key=lambda f: f.suffix != ".json"):  # its part first
                    _rename(file, f"damaged-{file.name}")
        except OSError as error:
            raise CheckpointError(
                f"{path} is damaged and cannot be renamed ({error.strerror})"
            ) from None


def _rename(path: Path, name: str) -> None:
    number, free = 1, name
    while (path.parent / free).exists():
        number += 1
        free = f"{name}-{number}"
    os.rename(path, path.parent / free)


def _verdict(
    path: Path,
    topology: Topology,
    model: Mapping[str, Any],
    needs: Needs,
    blocks: Sequence[int] | None,
) -> tuple[Checkpoint | None, str]:
    """(the checkpoint, "") if it is intact for every rank, else (None, the first rank's reason)."""
    checkpoint, reason = None, None
    try:
        checkpoint = open_folder(path, blocks)
        checkpoint.check_sizes()
        checkpoint.check_fits(model)
        for file in needs(checkpoint):
            checkpoint.check(file)
    except CheckpointError as error:
        reason = str(error)
    except OSError as error:  # a run that goes on may remove it meanwhile
        reason = f"{path} cannot be read ({error.strerror})"
    reasons = [str(told) for told in topology.gather(reason) if told is not None]
    return (None, reasons[0]) if reasons else (checkpoint, "")


def _tell(
    damaged: list[tuple[Path, str]],
    intact: Checkpoint,
    topology: Topology,
    fallback: bool,
    is_training: bool,
) -> None:
    """Warns that an older checkpoint is used, on rank 0; raises CheckpointError where it may not
    be."""
    reason, use = damaged[0][1], "continue from" if is_training else "use"
    if not fallback:
        raise CheckpointError(
            f"{reason}; step {intact.step} is intact: add --checkpoint.fallback true to {use} it"
        )
    if topology.is_coordinator:
        end = "; what is damaged is renamed" if is_training else ""
        print(
            f"warning: {reason}; step {intact.step} is the newest intact one and is used{end}",
            file=sys.stderr,
        )
