"""Writes what `manifest` reads: in the background, and complete or not at all.

1. Every rank copies its tensors and writes its own files. A block with shared modules of its own
   writes its part (`parts`) as well: with it, its work is saved whatever others do.
2. Every rank reports its files, or why it could not write them, through the mailbox.
3. When all reports of a step have arrived, and its metrics are recorded, rank 0 writes the manifest
   with all sizes and SHA-256, and removes the oldest checkpoints.

Nobody waits for another rank, but in `finish`.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dbdist import log
from dbdist.checkpoint.background import Background
from dbdist.checkpoint.manifest import complete_folders, write_manifest
from dbdist.checkpoint.names import (
    MANIFEST,
    Files,
    blocks_in,
    part_file,
    step_folder,
    step_folders,
    step_of,
)
from dbdist.checkpoint.parts import remove_block, write_part
from dbdist.checkpoint.retention import Retention
from dbdist.checkpoint.snapshot import Snapshot
from dbdist.errors import CheckpointError
from dbdist.parallel.mailbox import Mailbox
from dbdist.parallel.topology import Topology
from dbdist.version import versions
from dbdist.whole_files import sync_folder

Report = dict[str, Any]
"""What a rank reports of a step: `files`, the manifest's entries of what it wrote, or `error`."""


@dataclass
class _Pending:
    """On rank 0: a step that is not complete yet."""

    about: dict[str, Any] | None = None
    """What rank 0 says of it in the manifest; None before rank 0 itself has come to this step."""
    reports: dict[int, Report] = field(default_factory=dict)
    """By rank, those that have arrived."""
    completing: Future[str | None] | None = None
    """The manifest that is being written; in the end why it was not."""


class CheckpointWriter:
    """Writes this rank's files of each checkpoint; on rank 0 also completes and retires them.

    `save` copies the tensors and returns; threads do all that touches the disk. Only the caller's
    thread communicates, in `poll`, which every rank calls after each step. A checkpoint that cannot
    be written is given up with a warning; those before it stay as they are.
    """

    def __init__(
        self,
        run_dir: Path,
        topology: Topology,
        writers: set[int],
        keep_last: int,
        block: int | None = None,
        trained: tuple[int, ...] | None = None,
        is_recorded: Callable[[int], bool] = lambda step: True,
    ) -> None:
        """Makes the writer of this rank; nothing is read or written yet.

        writers: the ranks that write files, known to all. block: of which this rank writes the
        part; None where there are no parts, or another rank writes it. trained: the blocks of a
        run that leaves the others' files to other runs; None: all blocks. is_recorded: on rank 0,
        whether the metrics up to a step are in their file; its checkpoint is complete no sooner, as
        a run that continues from it would never write them.
        """
        self.folder = run_dir / "checkpoints"
        self._is_recorded = is_recorded
        self._topology = topology
        self._writers = writers
        self._block, self._trained = block, trained
        self._retention = Retention(self.folder, keep_last, trained)
        self._mailbox = Mailbox(topology, "checkpoints")
        self._background = Background()
        self._snapshots: dict[str, Snapshot] = {}
        self._report: Future[Report] | None = None
        """What this rank has still to report."""
        self._is_alone = trained is not None
        """Whether there is nobody to report it to."""
        self._pending: dict[int, _Pending] = {}
        self.last_step: int | None = None
        """Saved last."""
        self._last_failure: tuple[int, str] | None = None

    def clean(self, forget_after: int | None = None) -> None:
        """Removes what an interrupted run has left; on rank 0, see `Retention.clean`."""
        self._retention.clean(forget_after)

    def save(
        self, step: int, files: Files, about: dict[str, Any], refusal: str | None = None
    ) -> None:
        """Copies this rank's files of a step, to be written from now on.

        Waits only if the step before is still being written: there is one copy, always in the same
        memory. about: what the manifest and the part say beside their files. refusal: why this
        rank's files must not be written; the checkpoint is given up then.
        """
        if self._is_alone and refusal is None:
            self.save_own_block(step, files, about)
            return
        assert self._topology.rank in self._writers or not files, f"not a writer of {list(files)}"
        self._begin(step)
        if self._topology.is_coordinator and not self._is_alone:
            self._pending.setdefault(step, _Pending()).about = about
        if self._topology.rank not in self._writers:
            return
        if refusal is None:
            self._write_later(step, files, about)
        else:
            self._report = Future()
            self._report.set_result({"step": step, "error": refusal})

    def save_own_block(self, step: int, files: Files, about: dict[str, Any]) -> None:
        """Writes this rank's block without waiting for other ranks, and no manifest.

        The parts of all blocks are a checkpoint all the same. Every later save does the same.
        """
        assert not files or self._block is not None, "this rank has no block of its own"
        self.leave_others()
        self._begin(step)
        if self._topology.rank in self._writers:
            self._write_later(step, files, about)

    def leave_others(self) -> None:
        """Reports nothing and asks for nothing from now on: no other rank may be there.

        A manifest that is being written still gets its time in `finish`.
        """
        if not self._is_alone:
            with suppress(RuntimeError):  # the store is gone too
                self.poll()
            self._pending = {s: p for s, p in self._pending.items() if p.completing is not None}
            self._is_alone = True

    def poll(self) -> None:
        """Does all that can be done without waiting; every rank calls it after each step."""
        for step, reason in self._advance():
            self._warn_of(step, reason)

    def finish(self, timeout_s: float) -> None:
        """Waits until this rank's files are written and, on rank 0, every checkpoint is complete.

        Raises CheckpointError if the last one is not complete then.
        """
        deadline = time.monotonic() + timeout_s
        while self._report is not None or self._awaited:
            if time.monotonic() > deadline:
                missing, self._report = self._what_is_missing(), None
                self._pending.clear()
                raise CheckpointError(missing)
            for step, reason in self._advance():
                if step != self.last_step:
                    self._warn_of(step, reason)
            time.sleep(0.005)
        if self._last_failure is not None and self._last_failure[0] == self.last_step:
            step, reason = self._last_failure
            raise CheckpointError(
                f"checkpoint of step {step}, the last, failed: {reason}; {self._newest}"
            )

    def close(self, timeout_s: float = 5.0) -> None:
        """Waits a little after a failure for what was saved before it, and raises nothing."""
        self._last_failure = None  # it has been reported
        try:
            self.finish(timeout_s)
        except CheckpointError as error:
            log.warning(str(error))
        except RuntimeError:  # the store, and with it the launcher, is gone
            pass

    # On the caller's thread

    def _begin(self, step: int) -> None:
        if self._report is not None:
            wait([self._report])
            self.poll()
        self.last_step = step

    def _write_later(self, step: int, files: Files, about: dict[str, Any]) -> None:
        kept = self._snapshots
        self._snapshots = {
            name: kept[name] if name in kept and kept[name].fits(tensors) else Snapshot(tensors)
            for name, tensors in files.items()
        }
        for name, tensors in files.items():
            self._snapshots[name].fill(tensors)
        if self._topology.device.type == "cuda":
            torch.cuda.current_stream(self._topology.device).synchronize()
        self._report = self._background.start(lambda: self._write(step, about))

    def _advance(self) -> list[tuple[int, str]]:
        """Takes a round without waiting. Returns (step, reason) of checkpoints given up."""
        failures = self._report_own()
        self._receive()
        self._start_completing()
        failures += self._finished()
        if failures:
            self._last_failure = failures[-1]
        return failures

    def _report_own(self) -> list[tuple[int, str]]:
        """Reports what this rank has written; by itself, it returns (step, reason) of a failure."""
        if self._report is None or not self._report.done():
            return []
        report, self._report = self._report.result(), None
        if not self._is_alone:
            self._mailbox.post(report)
        elif "error" in report:
            return [(report["step"], f"rank {self._topology.rank}: {report['error']}")]
        return []

    @property
    def _awaited(self) -> list[int]:
        """On rank 0: the steps that it has saved and that are not complete, ascending."""
        return sorted(s for s, pending in self._pending.items() if pending.about is not None)

    def _receive(self) -> None:
        """On rank 0: takes the reports that have arrived."""
        if self._is_alone or not self._awaited:
            return
        for rank, report in self._mailbox.collect():
            self._pending.setdefault(report["step"], _Pending()).reports[rank] = report

    def _start_completing(self) -> None:
        """On rank 0: begins to write the manifests of steps that all have reported."""
        for step in self._awaited:
            pending = self._pending[step]
            has_all = pending.reports.keys() >= self._writers
            if pending.completing is None and has_all and self._is_recorded(step):
                assert pending.about is not None
                job = partial(self._complete, step, pending.reports, pending.about)
                pending.completing = self._background.start(job)

    def _finished(self) -> list[tuple[int, str]]:
        """On rank 0: forgets completed steps. Returns (step, reason) of those given up."""
        failures: list[tuple[int, str]] = []
        for step in self._awaited:
            job = self._pending[step].completing
            if job is None or not job.done():
                continue
            del self._pending[step]
            try:
                if (reason := job.result()) is not None:
                    failures.append((step, reason))
            except _Stays as error:
                log.warning(f"checkpoints beyond checkpoint.keep_last cannot be removed ({error})")
        return failures

    def _warn_of(self, step: int, reason: str) -> None:
        log.warning(f"checkpoint of step {step} failed: {reason}; training goes on, {self._newest}")

    @property
    def _newest(self) -> str:
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
        if self._report is not None:
            return f"rank {self._topology.rank} did not write its files of step {self.last_step}"
        step = self._awaited[0]
        pending = self._pending[step]
        missing = sorted(self._writers - pending.reports.keys())
        if pending.completing is not None:
            return f"checkpoint of step {step}: the manifest is not written"
        if not missing:
            return f"checkpoint of step {step}: a rank's metrics have not arrived"
        return f"checkpoint of step {step}: rank {missing[0]} did not write its files"

    # In the background

    def _write(self, step: int, about: dict[str, Any]) -> Report:
        path = self._path(step)
        try:
            files = self._write_files(path)
            sync_folder(path)
            if self._block is not None:
                write_part(path, self._own_part(step, about, files))
                if self._trained is not None:
                    with suppress(OSError, CheckpointError):  # the next time tries again
                        self._retention.retire_block(self._block, step)
        except OSError as error:
            if self._block is not None:
                with suppress(OSError):  # the next run cleans up
                    remove_block(path, self._block)
            return {"step": step, "error": f"{path} cannot be written ({error.strerror})"}
        return {"step": step, "files": files}

    def _own_part(self, step: int, about: dict[str, Any], files: dict[str, Any]) -> dict[str, Any]:
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

    def _complete(self, step: int, reports: dict[int, Report], about: dict[str, Any]) -> str | None:
        """Makes a step a checkpoint and retires the oldest, or removes it and returns why.

        Blocks' parts stay. Raises _Stays if the oldest cannot be removed.
        """
        path = self._path(step)
        reasons = [f"rank {r}: {x['error']}" for r, x in sorted(reports.items()) if "error" in x]
        if not reasons:
            try:
                files = {n: entry for x in reports.values() for n, entry in x["files"].items()}
                write_manifest(path, {"step": step, **about, **versions()}, files)
            except OSError as error:
                reasons = [f"rank 0: {path / MANIFEST} cannot be written ({error.strerror})"]
        if reasons:
            with suppress(OSError, CheckpointError):  # the next run cleans up
                self._retention.give_up(path)
            return reasons[0]
        try:
            self._retention.retire_checkpoints(step)
        except (OSError, CheckpointError) as error:
            raise _Stays(str(error)) from None
        return None

    def _path(self, step: int) -> Path:
        return self.folder / step_folder(step)


class _Stays(Exception):
    """What should be removed cannot be."""
