"""Workers that load: what ends them, what they say, and that nothing waits for them."""

import gc
import logging
import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from data_files import Points, config, write_folder

from dbdist.data import workers as module
from dbdist.data.base import Batch, Key
from dbdist.data.loader import BatchStream, test_batches
from dbdist.data.sources import load_dataset
from dbdist.data.workers import load_batches
from dbdist.errors import DataError

KEYS = [[0, 1], [2, 3], [4, 5]] * 4

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(autouse=True)
def asked_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL_S", 0.1)


class Fails(Points):
    """Points whose worker meets with something at its third sample."""

    def __init__(self, mishap: Callable[[], Any]) -> None:
        self.mishap = mishap

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        batch = super().__getitems__(keys)
        return {**batch, **(self.mishap() or {})} if 2 in keys else batch


def processes() -> list[Any]:
    """The loaders' processes; those of `ranks.RankPool`, which may be there, are spawned."""
    spawned = multiprocessing.get_context("spawn").Process
    return [p for p in multiprocessing.active_children() if not isinstance(p, spawned)]


def ending(mishap: Callable[[], Any]) -> str:
    """What loading says when this happens in a worker; it must say so within seconds."""
    start = time.monotonic()
    with pytest.raises(DataError) as caught:
        list(load_batches(Fails(mishap), KEYS, num_workers=1))
    assert time.monotonic() - start < 20
    assert str(caught.value).isprintable()
    assert processes() == []
    return str(caught.value)


def kill(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def test_a_worker_that_is_killed_ends_the_loading() -> None:
    assert "was killed, as when memory runs out" in ending(kill(signal.SIGKILL))
    assert "was ended by signal 15" in ending(kill(signal.SIGTERM))
    assert "ended with exit code 3" in ending(lambda: os._exit(3))


def no_room() -> Batch:
    """Files, which shared memory is, may not grow: as with a full /dev/shm."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    return {"large": torch.zeros(100_000)}


def test_a_batch_that_does_not_fit_into_shared_memory_ends_the_loading() -> None:
    for message in (ending(no_room), ending(kill(signal.SIGBUS))):
        assert "found no room for its batch in /dev/shm" in message
        assert "--shm-size" in message
        assert "data.num_workers 0" in message


def test_a_batch_that_cannot_be_sent_ends_the_loading() -> None:
    message = ending(lambda: {"no tensor": cast(Any, lambda: None)})
    assert f"ended with exit code {module.UNSENT}" in message


class NeedsFile:
    """Sending it finds no number for a file, as where a process has opened all that it may."""

    def __reduce__(self) -> Any:
        raise OSError(24, "Too many open files")


def test_workers_without_files_left_end_the_loading() -> None:
    message = ending(lambda: {"x": cast(Any, NeedsFile())})
    assert "has too many open files: raise `ulimit -n`" in message


def test_a_worker_that_stands_still_is_waited_for_so_long_and_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "WAIT_S", 1.5)
    assert "no batch has come for 2 s" in ending(kill(signal.SIGSTOP))


def test_a_death_is_noticed_where_the_next_batch_is_asked_for() -> None:
    """And not wherever the main process is at that moment."""
    batches = load_batches(Points(), KEYS, num_workers=1)
    next(batches)
    (worker,) = processes()
    os.kill(worker.pid, signal.SIGKILL)
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        sum(range(1000))
    with pytest.raises(DataError, match="was killed"):
        list(batches)


def test_a_mistake_in_a_set_keeps_its_traceback() -> None:
    def mistake() -> None:
        raise RuntimeError("wrong shape")

    with pytest.raises(RuntimeError, match=r"(?s)Traceback.*in mistake.*wrong shape"):
        list(load_batches(Fails(mistake), KEYS, num_workers=1))
    assert processes() == []


@pytest.mark.parametrize("num_workers", [0, 1])
def test_any_mapping_of_tensors_is_loaded(num_workers: int) -> None:
    points = Points()
    (batch,) = BatchStream(points, 6, seed=1, block=0, num_steps=1, num_workers=num_workers)
    assert sorted(batch["point"][:, 0].tolist()) == [0, 1, 2, 3, 4, 5]
    assert torch.equal(batch["square"], batch["point"] ** 2)
    batches = list(test_batches(points, 4, num_workers=num_workers))
    assert [(len(batch["point"]), i) for batch, i in batches] == [(4, 0), (2, 1)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_damaged_picture_stops_in_one_sentence_after_the_batches_before(
    tmp_path: Path, num_workers: int
) -> None:
    data = write_folder(tmp_path, "cat", n=6)
    path = tmp_path / "train/cat/3.png"
    path.write_bytes(b"no picture")
    batches = load_batches(load_dataset(data, "train"), KEYS, num_workers)
    assert len(next(batches)["label"]) == 2
    with pytest.raises(DataError) as caught:
        next(batches)
    assert str(caught.value).startswith(f"{path} is not a readable image")
    assert str(caught.value).isprintable()
    assert processes() == []


def test_damaged_pictures_are_replaced_the_same_way_by_any_workers_and_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path, "cat", n=6)
    path = tmp_path / "train/cat/3.png"
    path.write_bytes(b"no picture")
    monkeypatch.setattr(module, "_LOG", log := logging.Logger("test"))
    log.addHandler(caplog.handler)
    data = config("image_folder", tmp_path, image_size=8, on_error="skip")
    seen = []
    for num_workers in (0, 1, 2):
        caplog.clear()
        monkeypatch.setattr(module, "_SHOWN", set())
        batches = list(load_batches(load_dataset(data, "train"), KEYS, num_workers))
        seen.append(torch.cat([batch["image"] for batch in batches]))
        named, count = (record.getMessage() for record in caplog.records)
        assert named.startswith(f"{path} is not a readable image")
        assert named.endswith("takes its place")
        assert count == "samples replaced: 4, because 1 file is damaged"
    list(load_batches(load_dataset(data, "train"), KEYS, 0))
    assert sum("takes its place" in record.getMessage() for record in caplog.records) == 1
    assert all(torch.equal(seen[0], other) for other in seen)


class Garbage:
    """What only the process that made it may let go of, as memory of a GPU."""

    def __init__(self, log: Path) -> None:
        self.log, self.pid, self.itself = log, os.getpid(), self

    def __del__(self) -> None:
        if os.getpid() != self.pid:
            self.log.write_text("let go of in a worker")


class Collects(Points):
    """A set whose reading collects garbage, as any code may."""

    def __getitems__(self, keys: Any) -> Batch:
        gc.collect()
        return super().__getitems__(keys)


def test_workers_do_not_let_go_of_what_their_parent_left(tmp_path: Path) -> None:
    log = tmp_path / "log"
    held = [Garbage(log)]
    gc.disable()
    try:
        batches = test_batches(Collects(), 2, num_workers=1)
        held.clear()
        assert len([*batches]) > 1
    finally:
        gc.enable()
    assert not log.exists()
