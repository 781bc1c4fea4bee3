"""Launchers and their ranks as processes of this machine, for tests that kill and signal them."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
LAUNCHERS_OWN = re.compile(
    r"(RANK|WORLD_SIZE|(LOCAL|GROUP|CROSS|ROLE|MASTER|TORCHELASTIC|SLURM|ACCELERATE)_.*|"
    r"TORCH_DISTRIBUTED_DEBUG|CUDA_VISIBLE_DEVICES)"
)


class Machine:
    """Starts launchers here, each with its output in a file, and leaves no process behind.

    All that descend from them carry one mark in their environment: torchrun gives its ranks
    sessions of their own, so that no process group has them all.
    """

    def __init__(self, folder):
        self.folder = folder
        self.mark = uuid.uuid4().hex
        self.logs = {}
        self.environment = {k: v for k, v in os.environ.items() if not LAUNCHERS_OWN.fullmatch(k)}
        self.environment |= {
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "DBDIST_TEST": self.mark,
        }

    def start(self, *words, **variables):
        log = self.folder / f"{len(self.logs)}.log"
        with log.open("w") as file:
            process = subprocess.Popen(
                list(map(str, words)),
                cwd=ROOT,
                env=self.environment | {k: str(v) for k, v in variables.items()},
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )
        self.logs[process.pid] = log
        return process

    def finish(self, *processes, timeout_s=240):
        """What they printed, after all ended with exit code 0."""
        deadline = time.monotonic() + timeout_s
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, deadline - time.monotonic()))
        printed = [self.logs[process.pid].read_text() for process in processes]
        assert [process.returncode for process in processes] == [0] * len(processes), printed
        return "\n".join(printed)

    def run(self, *words, **variables):
        return self.finish(self.start(*words, **variables))

    def processes(self):
        """{pid: environment} of all that descend from what was started here."""
        found = {}
        for path in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):  # it has just ended, or is another user's
                variables = path.read_bytes().decode(errors="replace").split("\0")
                if f"DBDIST_TEST={self.mark}" in variables:
                    found[int(path.parent.name)] = dict(v.split("=", 1) for v in variables if v)
        return found

    def close(self, patience_s=10):
        """Ends whatever is left; what that was after some seconds of waiting."""
        deadline = time.monotonic() + patience_s
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.05)
        while found := self.processes():
            for pid in found:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        return left


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def wait_for_checkpoint(machine, process, run_dir, timeout_s=240):
    """Returns as soon as there is a complete checkpoint, while the run goes on."""
    deadline = time.monotonic() + timeout_s
    while not list(run_dir.glob("checkpoints/step-*/manifest.json")):
        assert process.poll() is None, machine.logs[process.pid].read_text()
        assert time.monotonic() < deadline, machine.logs[process.pid].read_text()
        time.sleep(0.01)


def pid_of(machine, rank, **variables):
    """Of the process that is this rank, among those with these variables."""
    wanted = {"RANK": str(rank)} | {k: str(v) for k, v in variables.items()}
    pids = [p for p, v in machine.processes().items() if wanted.items() <= v.items()]
    assert pids, machine.processes()
    return min(pids)


def kill_rank(machine, rank):
    os.kill(pid_of(machine, rank), signal.SIGKILL)


def start_ranks(machine, world_size, *words, **variables):
    """Ranks without a launcher that would end them, as on several nodes: rank 0 holds the store."""
    port = free_port()
    return [
        machine.start(
            *(sys.executable, "-m", *words),
            **{"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size},
            **{"LOCAL_WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
            **variables,
        )
        for rank in range(world_size)
    ]
