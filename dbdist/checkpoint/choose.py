"""Which checkpoint a run continues from, or is evaluated or exported with.

That is the newest, the one of a step, or with `checkpoint.fallback` the newest intact one. Every
rank checks the manifest and hashes the files that it will read, and no others; the verdicts are
gathered, so all ranks choose the same step. Nothing is changed before `set_aside`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dbdist import log
from dbdist.checkpoint.manifest import Checkpoint, open_folder, saved_folders
from dbdist.checkpoint.names import MANIFEST, step_of
from dbdist.checkpoint.retention import rename_free
from dbdist.errors import CheckpointError, OtherModelError
from dbdist.parallel.topology import Topology

Needs = Callable[[Checkpoint], Iterable[str]]
"""The files of a checkpoint that this rank will read."""
ATTEMPTS = 3
"""A run that goes on may remove what was just found: then its folder is read anew."""


@dataclass(frozen=True)
class Choice:
    """The checkpoint to use; the files that this rank needs are intact."""

    checkpoint: Checkpoint
    damaged: list[Path]
    """Folders of newer checkpoints, which were passed over."""


class _Gone(Exception):
    """On all ranks: a checkpoint was removed while it was looked at."""


class Candidates:
    """The checkpoints of a run directory that a command may use.

    A checkpoint that is chosen to be read, not continued, is held: a run that goes on removes it no
    sooner than `Checkpoint.close`.
    """

    def __init__(
        self,
        run_dir: Path,
        topology: Topology,
        model: Mapping[str, Any],
        needs: Needs,
        *,
        fallback: bool,
        is_training: bool = False,
        blocks: Sequence[int] | None = None,
    ) -> None:
        """Sets what the checkpoint has to fulfil.

        model: what the checkpoint must agree with. fallback: whether an older one will do where the
        newest is damaged. is_training: it will be continued. blocks: those that it must have; None:
        all.
        """
        self._run_dir, self._folder = run_dir, run_dir / "checkpoints"
        self._topology, self._model, self._needs = topology, model, needs
        self._fallback, self._is_training, self._blocks = fallback, is_training, blocks

    def newest(self) -> Choice | None:
        """The newest checkpoint, or with fallback the newest intact one; None where there is none.

        Collective. Raises CheckpointError, the same on every rank, if it is damaged or foreign; the
        message names the file and the newest step that is intact.
        """
        return self._retried(None)

    def of_step(self, step: int) -> Choice:
        """The checkpoint of a step and no other. Collective; raises CheckpointError."""
        choice = self._retried(step)
        assert choice is not None
        return choice

    def _retried(self, step: int | None) -> Choice | None:
        reason = ""
        for _ in range(ATTEMPTS):
            try:
                return self._choose(step)
            except _Gone as gone:
                reason = str(gone)
        raise CheckpointError(reason)

    def _choose(self, step: int | None) -> Choice | None:
        damaged: list[tuple[Path, CheckpointError]] = []
        for path in reversed(self._found(step)):
            verdict = self._verdict(path)
            if isinstance(verdict, Checkpoint):
                if damaged:
                    self._accept_older(damaged[0][1], verdict)
                return Choice(verdict, [path for path, _ in damaged])
            if not self._is_training and any(self._topology.gather(not path.is_dir())):
                raise _Gone(str(verdict))
            damaged.append((path, verdict))
        if not damaged:
            return None
        if isinstance(damaged[0][1], OtherModelError):
            raise damaged[0][1]
        rest = "give another --eval.step, or leave it out for the newest"
        if step is None:
            rest = "no other checkpoint is intact; bring the file back from a copy, or give another"
            rest += " run_dir"
        raise CheckpointError(f"{damaged[0][1]}; {rest}")

    def _found(self, step: int | None) -> list[Path]:
        """The folders that all ranks see, oldest first; of this step, if one is given."""
        found: list[Path] = []
        with self._topology.agree("reading the run directory"):
            found = saved_folders(self._folder, self._blocks)
        seen = self._topology.gather([path.name for path in found])
        newest = [names[-1] if names else "none" for names in seen]
        if self._is_training and len(set(newest)) > 1:
            raise CheckpointError(
                f"{self._run_dir} is not the same folder on all ranks: they see checkpoints "
                f"{newest}"
            )
        # While a run is evaluated it may go on: not all ranks see its newest and its oldest.
        common = [path for path in found if all(path.name in names for names in seen)]
        if step is None:
            return common
        if not (wanted := [path for path in common if step_of(path) == step]):
            steps = sorted(map(step_of, found))
            raise CheckpointError(
                f"{self._folder} has no checkpoint of step {step}; it has {steps or 'none'}"
            )
        return wanted

    def _verdict(self, path: Path) -> Checkpoint | CheckpointError:
        """The checkpoint if it is intact for every rank, else the first rank's reason."""
        checkpoint, reason = None, None
        try:
            checkpoint = open_folder(path, self._blocks, hold=not self._is_training)
            checkpoint.check_sizes()
            checkpoint.check_fits(self._model)
            for file in self._needs(checkpoint):
                checkpoint.check(file)
        except CheckpointError as error:
            reason = error
        except OSError as error:  # a run that goes on may remove it meanwhile
            reason = CheckpointError(f"{path} cannot be read ({error.strerror})")
        reasons = [given for given in self._topology.gather(reason) if given is not None]
        if not reasons:
            assert checkpoint is not None
            return checkpoint
        if checkpoint is not None:
            checkpoint.close()
        return reasons[0]

    def _accept_older(self, reason: CheckpointError, intact: Checkpoint) -> None:
        """Warns that an older checkpoint is used; raises CheckpointError where it may not be."""
        use = "continue from" if self._is_training else "use"
        if not self._fallback:
            intact.close()
            raise CheckpointError(
                f"{reason}; step {intact.step} is intact: add --checkpoint.fallback true to {use} "
                "it"
            )
        if self._topology.is_coordinator:
            end = "; what is damaged is renamed" if self._is_training else ""
            log.warning(f"{reason}; step {intact.step} is the newest intact one and is used{end}")


def set_aside(folders: Iterable[Path], blocks: Sequence[int] | None = None) -> None:
    """Renames damaged checkpoints, so that they neither count nor are met again.

    blocks: renames only these blocks' files, as the others' may be intact. Raises CheckpointError
    where that is not allowed.
    """
    for path in folders:
        try:
            if blocks is None:
                rename_free(path, f"{path.name}.damaged")
                continue
            (path / MANIFEST).unlink(missing_ok=True)  # it named all blocks
            for block in blocks:
                files = path.glob(f"block-{block}.*")
                for file in sorted(files, key=lambda f: f.suffix != ".json"):  # its part first
                    rename_free(file, f"damaged-{file.name}")
        except OSError as error:
            raise CheckpointError(
                f"{path} is damaged and cannot be renamed ({error.strerror})"
            ) from None
