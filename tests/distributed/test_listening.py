"""What a run on one node listens on, as /proc says, with the rendezvous that keeps to the loopback
interface."""

import os
import signal
import time
import tomllib
from pathlib import Path

import pytest

from dbdist.bench.processes import Listener, listeners, listeners_of, marked
from dbdist.bench.soak import Launcher, send
from dbdist.checkpoint.manifest import complete_folders
from dbdist.parallel import topology

ROOT = Path(__file__).resolve().parents[2]
WORDS = (
    f"-m dbdist.train --config {ROOT}/configs/digits.yaml --model.num_layers 3 "
    "--train.max_steps 60 --train.schedule_steps 60 --checkpoint.every_steps 20"
).split()
POINTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]


@pytest.fixture
def installed(tmp_path):
    """A PYTHONPATH that has the entry points of this pyproject.toml, whatever is installed."""
    about = tmp_path / "path/dbdist-0.1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: dbdist\nVersion: 0.1.0\n")
    lines = [f"{name} = {place}" for name, place in POINTS["torchrun.handlers"].items()]
    (about / "entry_points.txt").write_text("\n".join(["[torchrun.handlers]", *lines]))
    return os.pathsep.join([str(about.parent), str(ROOT), os.environ.get("PYTHONPATH", "")])


@pytest.mark.slow
def test_torchrun_and_its_ranks_listen_on_the_loopback_interface_alone(tmp_path, installed):
    run_dir = tmp_path / "run"
    words = [*WORDS, "--run_dir", str(run_dir)]
    launcher = Launcher(
        3, words, tmp_path / "log", 1, "--rdzv-backend=loopback", PYTHONPATH=installed
    )
    try:
        found: dict[int, set[Listener]] = {}
        deadline = time.monotonic() + 200
        while not complete_folders(run_dir / "checkpoints") and time.monotonic() < deadline:
            assert launcher.process.poll() is None, launcher.log.read_text()[-4000:]
            time.sleep(0.1)
        for pid in marked(launcher.mark):
            found[pid] = listeners_of([pid])
        send(launcher.ranks()[2], signal.SIGKILL)  # the next start uses the same store
        assert launcher.process.wait(200) == 0, launcher.log.read_text()[-4000:]
    finally:
        launcher.end()
    assert len(found[launcher.process.pid]) == 1, "the store"
    assert sum(len(sockets) > 0 for sockets in found.values()) == 4, "… and gloo in every rank"
    assert {s.address for sockets in found.values() for s in sockets} == {"127.0.0.1"}
    assert "continuing from step" in launcher.log.read_text()
    inodes = {socket.inode for sockets in found.values() for socket in sockets}
    assert not inodes & {listener.inode for listener in listeners()}


@pytest.mark.parametrize("named", [None, "eth7"])
def test_gloo_keeps_to_the_loopback_interface_unless_another_is_named(monkeypatch, named):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", named or "")
    if named is None:
        monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    topology._keep_to_the_loopback_interface()
    assert os.environ["GLOO_SOCKET_IFNAME"] == (named or "lo")
