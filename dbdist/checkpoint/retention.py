"""Which checkpoints and blocks' files are removed, and which folders are set aside instead.

A folder that another process reads (`whole_files.hold`) stays until the next time.
"""

import os
import re
import shutil
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from dbdist import log
from dbdist.checkpoint.manifest import complete_folders, is_complete
from dbdist.checkpoint.names import MANIFEST, blocks_in, part_file, step_folders, step_of
from dbdist.checkpoint.parts import remove_block
from dbdist.errors import CheckpointError
from dbdist.whole_files import is_held

OURS = re.compile(r"(damaged-)?(block-\d+|shared)\..*|manifest\.json.*")
"""The names of all files that a writer leaves in a step's folder, whole or not."""


class Retention:
    """What is kept in RUN/checkpoints."""

    def __init__(self, folder: Path, keep_last: int, trained: Collection[int] | None) -> None:
        """trained: the blocks of a run that leaves other blocks' files alone; None: all blocks."""
        self.folder, self.keep_last, self.trained = folder, keep_last, trained

    def clean(self, forget_after: int | None = None) -> None:
        """Removes what an interrupted run has left, before anybody writes.

        That is files without a part or a manifest, and parts older than the newest complete
        checkpoint; of a run of some blocks only what is theirs. forget_after: also removes blocks'
        files of later steps, as this run will come to others.
        """
        with suppress(OSError, CheckpointError):  # what stays does no harm
            if forget_after is not None:
                self._forget(forget_after)
            if self.trained is None:
                self.remove_incomplete()
                return
            for path in step_folders(self.folder):
                for block in set(self.trained) - set(blocks_in(path)):
                    if not (path / MANIFEST).is_file():
                        remove_block(path, block)

    def _forget(self, step: int) -> None:
        for path in step_folders(self.folder):
            for block in blocks_in(path) if step_of(path) > step else ():
                (path / MANIFEST).unlink(missing_ok=True)
                remove_block(path, block)

    def retire_checkpoints(self, step: int) -> None:
        """Removes the oldest checkpoints after that of a step; raises OSError, CheckpointError."""
        # Later ones may have all their files already: they are completed after this one.
        done = [path for path in complete_folders(self.folder) if step_of(path) <= step]
        for old in done[: -self.keep_last]:
            remove_checkpoint(old)
        self.remove_incomplete(step)

    def retire_block(self, block: int, step: int) -> None:
        """Removes a block's files beyond its newest up to a step; raises OSError.

        Never from the newest complete checkpoints, of which as many are kept.
        """
        own = sorted((p for p in step_folders(self.folder) if block in blocks_in(p)), key=step_of)
        own = [path for path in own if step_of(path) <= step]
        complete = complete_folders(self.folder)[-self.keep_last :]
        for path in own[: -self.keep_last]:
            if path not in complete and not is_held(path):
                (path / MANIFEST).unlink(missing_ok=True)
                remove_block(path, block)

    def give_up(self, path: Path) -> None:
        """Removes what was written of a step, but for blocks' own files: each keeps its last."""
        if not (blocks := blocks_in(path)):
            remove_checkpoint(path)
        for block in blocks:
            self.retire_block(block, step_of(path))

    def remove_incomplete(self, before: int | None = None) -> None:
        """Removes folders without any part, and those older than the newest checkpoint.

        before: only of steps below this one. Raises OSError.
        """
        complete = complete_folders(self.folder)
        newest = step_of(complete[-1]) if complete else -1
        for path in step_folders(self.folder):
            is_useless = step_of(path) < newest or not blocks_in(path)
            is_due = before is None or step_of(path) < before
            if is_useless and is_due and not is_complete(path) and not is_held(path):
                _remove_or_set_aside(path)


def remove_checkpoint(path: Path) -> None:
    """Removes a checkpoint that nobody reads; raises OSError."""
    if is_held(path):
        return
    (path / MANIFEST).unlink(missing_ok=True)
    for block in blocks_in(path):
        (path / part_file(block)).unlink(missing_ok=True)
    shutil.rmtree(path)  # from here on it is none


def rename_free(path: Path, name: str) -> Path:
    """Renames a file or folder beside itself, with a number where the name is taken."""
    number, free = 1, name
    while (path.parent / free).exists():
        number += 1
        free = f"{name}-{number}"
    os.rename(path, path.parent / free)
    return path.parent / free


def _remove_or_set_aside(path: Path) -> None:
    """Removes a folder of a writer's files; renames one that holds anything else."""
    foreign = sorted(name for name in os.listdir(path) if not OURS.fullmatch(name))
    if not foreign:
        shutil.rmtree(path)
        return
    place = rename_free(path, f"{path.name}.foreign")
    log.warning(f"{path} is no checkpoint of dbdist ({foreign[0]}); it is now called {place.name}")
