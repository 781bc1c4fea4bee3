"""Writes what `checkpoint` reads: in the background, and complete or not at all.

Every rank writes its own files and tells the coordinator (through the mailbox: nobody waits), which
writes the manifest, with sizes and SHA-256, when all have arrived. A block with shared modules of
its own writes its part (`parts`) as well, and needs nobody to have saved its work.
"""

import shutil
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from dbdist.checkpoint.manifest import FORMAT, VERSION, complete_folders, is_complete
from dbdist.checkpoint.names import MANIFEST, Files, blocks_in, part_file, step_folders, step_of
from dbdist.checkpoint.parts import remove_block, write_part
from dbdist.checkpoint.retention import remove_checkpoint, retire
from dbdist.checkpoint.snapshot import Snapshot
from dbdist.errors import CheckpointError
from dbdist.parallel.mailbox import Mailbox
from dbdist.parallel.topology import Topology
from dbdist.version import versions
from dbdist.whole_files import sync_folder, write_json

Part = dict[str, Any]
"""What a rank reports of a step: `files`, the manifest's entries of what it wrote, or `error`."""
T = TypeVar("T")


class CheckpointWriter:
    """Writes this rank's part of each checkpoint; on the coordinator also completes and retires
    them.

    `save` copies the tensors and returns; threads do all that touches the disk. Only the caller's
    thread communicates, in `poll`, which every rank calls after each step. A checkpoint that cannot
    be written is given up and told; those before it stay as they are.
    """

    def __init__(
        self,
        run_dir: Path,
        topology: Topology,
        writers: set[int],
        keep_last: int,
        block: int | None = None,
        trained: tuple[int, ...] | None = None,
    ) -> None:
        """writers: the ranks that write files, known to all. block: of which this rank writes the
        part; None where there are no parts, or another rank writes it. trained: the blocks of a run
        that leaves the others' files to other runs; None: all blocks."""
        self.folder = run_dir / "checkpoints"
        self.keep_last = keep_last
        self.warn: Callable[[str], None] = lambda text: print(f"warning: {text}", file=sys.stderr)
        """Shows one line about a checkpoint that was given up."""
        self.is_recorded: Callable[[int], bool] = lambda step: True
        """On the coordinator: whether the metrics up to a step are in their file. Its checkpoint is
        complete no sooner: who continues from it would never write them."""
        self._topology = topology
        self._writers = writers
        self._block, self._trained = block, trained
        self._mailbox = Mailbox(topology, "checkpoints")
        self._background = _Background()
        self._snapshots: dict[str, Snapshot] = {}
        self._part: Future[Part] | None = None
        """What this rank has still to report."""
        self._is_alone = trained is not None
        """Whether there is nobody to report it to."""
        self._about: dict[int, dict[str, Any]] = {}
        self._arrived: dict[int, dict[int, Part]] = {}
        self._completing: dict[int, Future[str | None]] = {}
        self.last_step: int | None = None
        """Saved last."""
        self._last_failure: tuple[int, str] | None = None

    def clean(self, forget_after: int | None = None) -> None:
        """Removes what an interrupted run left of files without a part or a manifest, and parts
        older than the newest complete checkpoint; of a run of some blocks only what is theirs. On
        the coordinator, before anybody writes. forget_after: parts of later steps are forgotten,
        as this run will come to others."""
        with suppress(OSError, CheckpointError):  # what stays does no harm
            for path in step_folders(self.folder) if forget_after is not None else ():
                for block in blocks_in(path) if step_of(path) > (forget_after or 0) else ():
                    (path / MANIFEST).unlink(missing_ok=True)
                    remove_block(path, block)
            if self._trained is None:
                self._remove_incomplete()
            for path in step_folders(self.folder) if self._trained is not None else ():
                for block in set(self._trained or ()) - set(blocks_in(path)):
                    if not (path / MANIFEST).is_file():
                        remove_block(path, block)

    def save(
        self,
        step: int,
        files: Files,
        about: dict[str, Any],
        is_alone: bool = False,
        refusal: str | None = None,
    ) -> None:
        """Takes a copy of this rank's files of a step, to be written from now on. Waits only if the
        part before is still being written: there is one copy, always in the same memory. about: the
        rest of the part and the manifest. refusal: why this rank's part must not be written; the
        checkpoint is given up then.

        is_alone: this rank's part and nothing else. Nothing is told or asked, also of the steps
        before, and there is no manifest; the parts of all blocks are a checkpoint all the same.
        So are all that follow, and all of a run of some blocks."""
        rank = self._topology.rank
        is_alone = is_alone or self._is_alone
        assert rank in self._writers or not files, f"rank {rank} writes {list(files)}"
        assert not (is_alone and files) or self._block is not None, "there is no part to write"
        if is_alone:
            self.stay_alone()
        if self._part is not None:
            wait([self._part])
            self.poll()
        self.last_step = step
        if self._topology.is_coordinator and not is_alone:
            self._about[step] = about
        if rank in self._writers:
            if refusal is None:
                self._take(files)
                self._part = self._background.start(lambda: self._write_part(step, about))
            else:
                self._part = Future()
                self._part.set_result({"step": step, "error": refusal})

    def stay_alone(self) -> None:
        """From now on nothing is told or asked: there may be nobody to hear of it."""
        if not self._is_alone:
            with suppress(RuntimeError):  # the store is gone too
                self.poll()
            self._about.clear()
            self._is_alone = True

    def poll(self) -> None:
        """Reports this rank's part once it is written; on the coordinator also completes every
        checkpoint whose parts have all arrived. Waits for nothing."""
        for step, reason in self._advance():
            self._tell(step, reason)

    def finish(self, timeout_s: float) -> None:
        """Waits until this rank's part is written and, on the coordinator, until every checkpoint
        is complete or given up. Raises CheckpointError if the last one is not complete then."""
        deadline = time.monotonic() + timeout_s
        while self._part is not None or self._about or self._completing:
            if time.monotonic() > deadline:
                missing, self._part = self._what_is_missing(), None
                self._about.clear()
                self._completing.clear()
                raise CheckpointError(missing)
            for step, reason in self._advance():
                if step != self.last_step:
                    self._tell(step, reason)
            time.sleep(0.005)
        if self._last_failure is not None and self._last_failure[0] == self.last_step:
            step, reason = self._last_failure
            raise CheckpointError(
                f"checkpoint of step {step}, the last, failed: {reason}; {self._rest}"
            )

    def close(self, timeout_s: float = 5.0) -> None:
        """After a failure: waits a little for what was saved before it, and raises nothing."""
        self._last_failure = None  # it has been told
        try:
            self.finish(timeout_s)
        except CheckpointError as error:
            self.warn(str(error))
        except RuntimeError:  # the store, and with it the launcher, is gone
            pass

    # On the caller's thread

    def _take(self, files: Files) -> None:
        kept = self._snapshots
        self._snapshots = {
            name: kept[name] if name in kept and kept[name].fits(tensors) else Snapshot(tensors)
            for name, tensors in files.items()
        }
        for name, tensors in files.items():
            self._snapshots[name].fill(tensors)
        if self._topology.device.type == "cuda":
            torch.cuda.current_stream(self._topology.device).synchronize()

    def _advance(self) -> list[tuple[int, str]]:
        """What can be done without waiting. Returns (step, reason) of checkpoints given up."""
        failures: list[tuple[int, str]] = []
        if self._part is not None and self._part.done():
            written, self._part = self._part.result(), None
            if not self._is_alone:
                self._mailbox.post(written)
            elif "error" in written:
                text = f"rank {self._topology.rank}: {written['error']}"
                failures.append((written["step"], text))
        for rank, part in self._mailbox.collect() if self._about else ():
            self._arrived.setdefault(part["step"], {})[rank] = part
        for step in sorted(self._about):
            if self._arrived.get(step, {}).keys() >= self._writers and self.is_recorded(step):
                job = partial(self._complete, step, self._arrived.pop(step), self._about.pop(step))
                self._completing[step] = self._background.start(job)
        for step in [step for step, future in self._completing.items() if future.done()]:
            try:
                reason = self._completing.pop(step).result()
            except _Stays as error:
                self.warn(f"checkpoints beyond checkpoint.keep_last cannot be removed ({error})")
                continue
            if reason is not None:
                failures.append((step, reason))
        if failures:
            self._last_failure = failures[-1]
        return failures

    def _tell(self, step: int, reason: str) -> None:
        self.warn(f"checkpoint of step {step} failed: {reason}; training goes on, {self._rest}")

    @property
    def _rest(self) -> str:
        try:
            if self._is_alone:
                own = [step_of(p) for p in step_folders(self.folder) if self._block in blocks_in(p)]
                newest = f"is of step {max(own)}" if own else "does not exist"
                return f"block {self._block}'s newest part {newest}"
            if not (complete := complete_folders(self.folder)):
                return "none is complete"
            return f"the newest complete one is step {step_of(complete[-1])}"
        except (OSError, CheckpointError):
            return f"{self.folder} cannot be read"

    def _what_is_missing(self) -> str:
        if self._part is not None:
            return f"rank {self._topology.rank} did not write its part of step {self.last_step}"
        step = min({*self._about, *self._completing})
        missing = sorted(self._writers - self._arrived.get(step, {}).keys())
        if step in self._completing:
            return f"checkpoint of step {step}: the manifest is not written"
        if not missing:
            return f"checkpoint of step {step}: a rank's metrics have not arrived"
        return f"checkpoint of step {step}: rank {missing[0]} did not write its part"

    # In the background

    def _write_part(self, step: int, about: dict[str, Any]) -> Part:
        path = self._path(step)
        try:
            files = self._write_files(path)
            sync_folder(path)
            if self._block is not None:
                write_part(path, self._own_part(step, about, files))
            if self._trained is not None:
                self._retire_own(step)
        except OSError as error:
            if self._block is not None:
                with suppress(OSError):  # the next run cleans up
                    remove_block(path, self._block)
            return {"step": step, "error": f"{path} cannot be written ({error.strerror})"}
        return {"step": step, "files": files}

    def _own_part(self, step: int, about: dict[str, Any], files: dict[str, Any]) -> Part:
        own = {k: v for k, v in files.items() if k.startswith(f"block-{self._block}.")}
        state = {"step": step, "block": self._block, "is_alone": self._trained is not None}
        return {**state, **about, **versions(), "files": own}

    def _write_files(self, path: Path) -> dict[str, Any]:
        for attempt in range(3):
            try:
                path.mkdir(parents=True, exist_ok=True)
                (path / MANIFEST).unlink(missing_ok=True)  # a step that is saved again
                if self._block is not None:
                    (path / part_file(self._block)).unlink(missing_ok=True)
                return {name: copy.write(path / name) for name, copy in self._snapshots.items()}
            except (FileNotFoundError, FileExistsError):  # another run found the folder empty
                if attempt == 2:
                    raise
        raise AssertionError

    def _complete(self, step: int, parts: dict[int, Part], about: dict[str, Any]) -> str | None:
        """Makes the parts a checkpoint and retires the oldest, or removes them and returns why;
        blocks' own parts stay. Raises _Stays if the oldest cannot be removed."""
        path = self._path(step)
        reasons = [
            f"rank {rank}: {part['error']}"
            for rank, part in sorted(parts.items())
            if "error" in part
        ]
        if not reasons:
            try:
                self._write_manifest(step, parts, about)
            except OSError as error:
                reasons = [f"rank 0: {path / MANIFEST} cannot be written ({error.strerror})"]
        if reasons:
            with suppress(OSError, CheckpointError):  # the next run cleans up
                self._give_up(path)
            return reasons[0]
        try:
            # Later ones may have all their parts already: they are completed after this one.
            done = [path for path in complete_folders(self.folder) if step_of(path) <= step]
            for old in done[: -self.keep_last]:
                remove_checkpoint(old)
            self._remove_incomplete(step)
        except (OSError, CheckpointError) as error:
            raise _Stays(str(error)) from None
        return None

    def _give_up(self, path: Path) -> None:
        """Removes what was written of a step, but for parts, of which each block keeps the last."""
        if not (blocks := blocks_in(path)):
            remove_checkpoint(path)
        for block in blocks:
            retire(self.folder, block, self.keep_last, step_of(path))

    def _remove_incomplete(self, before: int | None = None) -> None:
        """Removes folders without any part, and those older than the newest checkpoint; before: of
        steps below this, None: of all. Raises OSError."""
        complete = complete_folders(self.folder)
        newest = step_of(complete[-1]) if complete else -1
        for path in step_folders(self.folder):
            is_useless = step_of(path) < newest or not blocks_in(path)
            is_due = before is None or step_of(path) < before
            if is_useless and is_due and not is_complete(path):
                shutil.rmtree(path)

    def _retire_own(self, step: int) -> None:
        with suppress(OSError, CheckpointError):  # the part is written; the next time tries again
            if self._block is not None:
                retire(self.folder, self._block, self.keep_last, step)

    def _write_manifest(self, step: int, parts: dict[int, Part], about: dict[str, Any]) -> None:
        path = self._path(step)
        files = {name: entry for part in parts.values() for name, entry in part["files"].items()}
        for name, entry in files.items():
            if not (path / name).is_file() or (path / name).stat().st_size != entry["bytes"]:
                raise CheckpointError(
                    f"{path / name} was written by another rank but is not here; "
                    "run_dir must be one folder that all nodes share"
                )
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "step": step,
            **about,
            **versions(),
            "files": dict(sorted(files.items())),
        }
        # Every rank has brought its files, and their names, to disk before it reported them.
        write_json(path / MANIFEST, manifest)
        for folder in (path, self.folder, self.folder.parent):
            sync_folder(folder)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"


class _Stays(Exception):
    """What should be removed cannot be."""


class _Background:
    """Runs jobs one after the other, beside the caller. Leaving the process waits for none."""

    def __init__(self) -> None:
        self._last: Future[Any] | None = None

    def start(self, job: Callable[[], T]) -> Future[T]:
        before, future = self._last, Future[T]()
        self._last = future

        def run() -> None:
            if before is not None:
                wait([before])
            try:
                future.set_result(job())
            except BaseException as error:  # for whoever asks for the result
                future.set_exception(error)

        threading.Thread(target=run, name="dbdist-checkpoint", daemon=True).start()
        return future
