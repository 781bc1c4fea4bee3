"""Which old checkpoints and parts are removed."""

import shutil
from pathlib import Path

from dbdist.checkpoint.manifest import complete_folders
from dbdist.checkpoint.names import MANIFEST, blocks_in, part_file, step_folders, step_of
from dbdist.checkpoint.parts import remove_block


def retire(folder: Path, block: int, keep_last: int, last_step: int) -> None:
    """Removes a block's parts beyond its newest up to a step; never from the newest complete
    checkpoints, of which as many are kept. Raises OSError."""
    own = sorted((p for p in step_folders(folder) if block in blocks_in(p)), key=step_of)
    own = [path for path in own if step_of(path) <= last_step]
    complete = complete_folders(folder)[-keep_last:]
    for path in own[:-keep_last]:
        if path not in complete:
            (path / MANIFEST).unlink(missing_ok=True)
            remove_block(path, block)


def remove_checkpoint(path: Path) -> None:
    """Removes a checkpoint; raises OSError."""
    (path / MANIFEST).unlink(missing_ok=True)
    for block in blocks_in(path):
        (path / part_file(block)).unlink(missing_ok=True)
    shutil.rmtree(path)  # from here on it is none
