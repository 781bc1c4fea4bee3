"""What a run on one node listens on, as /proc says, with the rendezvous that keeps to the loopback
interface."""

import os
import tomllib

import pytest
from machine import ROOT, wait_for_checkpoint

from dbdist.bench.processes import listeners, listeners_of
from dbdist.parallel import topology

WORDS = """--config configs/digits.yaml --model.num_layers 3 --train.max_steps 60
    --train.schedule_steps 60 --checkpoint.every_steps 20""".split()
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
def test_torchrun_and_its_ranks_listen_on_the_loopback_interface_alone(
    machine, tmp_path, installed
):
    run_dir = tmp_path / "run"
    words = ("dbdist.train", *WORDS, "--run_dir", run_dir)
    loopback = {"rendezvous": "--rdzv-backend=loopback", "PYTHONPATH": installed}
    job = machine.torchrun(3, *words, restarts=1, is_new=True, **loopback)
    wait_for_checkpoint(job, run_dir)
    found = {pid: listeners_of([pid]) for pid in job.processes()}
    job.strike(2)  # the next start uses the same store
    printed = machine.finish(job)
    assert len(found[job.pid]) == 1, "the store"
    assert sum(len(sockets) > 0 for sockets in found.values()) == 4, "… and gloo in every rank"
    assert {s.address for sockets in found.values() for s in sockets} == {"127.0.0.1"}
    assert "continuing from step" in printed
    inodes = {socket.inode for sockets in found.values() for socket in sockets}
    assert not inodes & {listener.inode for listener in listeners()}


@pytest.mark.parametrize("named", [None, "eth7"])
def test_gloo_keeps_to_the_loopback_interface_unless_another_is_named(monkeypatch, named):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", named or "")
    if named is None:
        monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    topology._keep_to_the_loopback_interface()
    assert os.environ["GLOO_SOCKET_IFNAME"] == (named or "lo")
