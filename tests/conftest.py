"""Fixtures for all tests: golden vectors, a pool of real ranks, launchers and their processes.

torch is imported inside them: the process that only hands tests to others does without.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from forks import Forks
    from machine import Machine
    from ranks import RankPool
    from torch import Tensor

# As torchrun sets it: ranks must not fight for two cores, and sums must not depend on the machine.
os.environ["OMP_NUM_THREADS"] = "1"

# Tests start many processes: where Python is to write no bytecode, a test run still does.
sys.dont_write_bytecode = False
os.environ["PYTHONDONTWRITEBYTECODE"] = ""

GOLDEN = Path(__file__).parent / "golden"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def ask_for_a_picture() -> "Iterator[Callable[..., None]]":
    """Runs draw no pictures for TensorBoard, which is half of a short run's time."""
    from dbdist.monitor.painter import Painter

    ask = Painter.ask
    Painter.ask = lambda *_: None  # type: ignore[method-assign]
    yield ask
    Painter.ask = ask  # type: ignore[method-assign]


@pytest.fixture
def pictures(ask_for_a_picture: "Callable[..., None]", monkeypatch: pytest.MonkeyPatch) -> None:
    """But those of this test do."""
    monkeypatch.setattr("dbdist.monitor.painter.Painter.ask", ask_for_a_picture)


@pytest.fixture
def float64() -> Iterator[None]:
    """Everything in double precision."""
    import torch

    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def golden() -> "Callable[[str], dict[str, Tensor]]":
    """`golden("a/vectors")`: tensors that the published code produced."""
    from safetensors.torch import load_file

    return lambda name: load_file(GOLDEN / f"{name}.safetensors")


@pytest.fixture(scope="session")
def forks() -> "Iterator[Forks]":
    """Processes that have imported torch already."""
    from forks import Forks

    host = Forks()
    yield host
    host.close()


@pytest.fixture(scope="session")
def ranks(forks: "Forks") -> "Iterator[RankPool]":
    """Real processes that talk over gloo; see `RankPool.run`."""
    from ranks import RankPool

    pool = RankPool(forks)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def machine(forks: "Forks", tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Machine]":
    """Starts launchers and their ranks; no process of theirs outlives a test."""
    from machine import Machine

    machine = Machine(tmp_path_factory.mktemp("machine"), forks)
    yield machine
    machine.close(0.0)


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    machine = request.getfixturevalue("machine") if "machine" in request.fixturenames else None
    yield
    if machine is not None:
        assert not machine.close(), "no process is left"


class SmallDisk:
    """A file system of 1 MiB."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        self._call("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs")

    def make_writable(self, is_writable: bool) -> None:
        self._call("mount", "-o", f"remount,{'rw' if is_writable else 'ro'}")

    def unmount(self) -> None:
        self._call("umount", "-l")

    def _call(self, *words: str) -> None:
        subprocess.run([*words, str(self.path)], check=True, capture_output=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """A disk that a test can fill or make read-only; skips where none may be mounted."""
    try:
        disk = SmallDisk(tmp_path / "disk")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("may not mount a file system here")
    yield disk
    disk.unmount()
