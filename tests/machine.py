"""Launchers and their ranks as processes of this machine, for tests that kill and signal them."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from dbdist.bench.faults import write_plan
from dbdist.bench.job import Job, send, torchrun
from dbdist.checkpoint.manifest import complete_folders

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
LAUNCHERS_OWN = re.compile(
    r"(RANK|WORLD_SIZE|(LOCAL|GROUP|CROSS|ROLE|MASTER|TORCHELASTIC|SLURM|ACCELERATE)_.*|"
    r"TORCH_DISTRIBUTED_DEBUG|CUDA_VISIBLE_DEVICES)"
)
SMALL = ("--config", "configs/digits.yaml", "--train.max_steps", "20", "--train.log_every", "10")


class Started(Job):
    """A command, new or forked."""

    def __init__(self, process, log, ranks_file):
        super().__init__(process, log)
        self._ranks_file = ranks_file

    @property
    def pid(self):
        return self.process.pid

    @property
    def returncode(self):
        return self.process.returncode

    def poll(self):
        return self.process.poll()

    def wait(self, timeout_s):
        """Its exit code; what it has printed, if it does not come in time."""
        with suppress(subprocess.TimeoutExpired):
            return self.process.wait(timeout_s)
        raise AssertionError(f"no end within {timeout_s} s:\n{self.printed()}")

    def send_signal(self, number):
        send(self.pid, number)

    def ranks(self, start=None):
        """{rank: pid} of those that run now; start: only those of this start of the launcher."""
        ranks, running = super().ranks(start), self.processes()
        lines = self._ranks_file.read_text().splitlines() if self._ranks_file.exists() else []
        for pid, rank, number in (map(int, line.split()) for line in lines):
            if pid in running and start in (None, number):
                ranks[rank] = pid
        return ranks


class Machine:
    """Starts commands here, each with its output in a file, and leaves no process behind.

    `python` commands are forks of a process that has imported torch already, which saves all
    their seconds; `is_new` starts them as a user does.
    """

    def __init__(self, folder, forks):
        self.folder = folder
        self.jobs = []
        self._count = 0
        self._forks = forks
        self._environment = {k: v for k, v in os.environ.items() if not LAUNCHERS_OWN.fullmatch(k)}
        self._environment |= {"PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}

    def start(self, *words, is_new=False, **variables):
        self._count += 1
        log = self.folder / f"{self._count}.log"
        log.touch()
        words, ranks = list(map(str, words)), log.with_suffix(".ranks")
        environment = self._environment | {k: str(v) for k, v in variables.items()}
        if words[0] == sys.executable and not is_new:
            environment["DBDIST_TEST_RANKS"] = str(ranks)
            process = self._forks.start(words[1:], environment, ROOT, log)
        else:
            with log.open("w") as out:
                process = subprocess.Popen(
                    words,
                    cwd=ROOT,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                )
        self.jobs.append(Started(process, log, ranks))
        return self.jobs[-1]

    def torchrun(self, num_ranks, *words, restarts=0, rendezvous="--standalone", **more):
        """words: a module of dbdist and its options."""
        command = torchrun(num_ranks, "-m", *words, restarts=restarts, rendezvous=rendezvous)
        return self.start(*command, **more)

    def failing(self, num_ranks, plan, *words, restarts=0, **more):
        """torchrun of dbdist.train whose ranks fail as planned (dbdist.bench.faults)."""
        path = self.folder / f"plan-{self._count}.json"
        write_plan(path, plan)
        words = ("dbdist.bench.faults", path, *words)
        return self.torchrun(num_ranks, *words, restarts=restarts, **more)

    def python(self, *words, ranks=1, **more):
        """One process of a module of dbdist and its options, or torchrun with some ranks."""
        if ranks > 1:
            return self.torchrun(ranks, *words, **more)
        return self.start(sys.executable, "-m", *words, **more)

    def script(self, code, *words, **more):
        """One process that runs this code."""
        return self.start(sys.executable, "-c", code, *words, **more)

    def start_ranks(self, world_size, *words, **variables):
        """Ranks without a launcher that would end them, as on several nodes: rank 0 holds the
        store."""
        port = free_port()
        return [
            self.start(
                *(sys.executable, "-m", *words),
                **{"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size},
                **{"LOCAL_WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
                **variables,
            )
            for rank in range(world_size)
        ]

    def finish(self, *jobs, timeout_s=200, code=0):
        """What they printed, after all ended with this exit code."""
        deadline = time.monotonic() + timeout_s
        for job in jobs:
            job.wait(max(0.1, deadline - time.monotonic()))
        printed = "\n".join(job.printed() for job in jobs)
        assert [job.returncode for job in jobs] == [code] * len(jobs), printed
        return printed

    def run(self, *words, **more):
        """What a module of dbdist printed, with its options, after it has ended well."""
        return self.finish(self.python(*words, **more))

    def close(self, patience_s=10.0):
        """Ends whatever is left; how many processes that were after some seconds of waiting."""
        left = sum(job.end(patience_s) for job in self.jobs)
        self.jobs = [job for job in self.jobs if job.poll() is None]
        return left

    def assert_refused(self, words, ranks, match, **more):
        """Every rank ends with exit code 2 and one line, which is the last of torchrun's, too."""
        job = self.python(*words, ranks=ranks, **more)
        code, printed = job.wait(120), job.printed()
        lines = [line for line in printed.splitlines() if "error:" in line and "dbdist" in line]
        assert code != 0
        assert all(re.search(match, line) for line in lines), lines
        if ranks > 1:
            assert sorted(set(lines)) == sorted(lines[:-1]), printed
            assert len(lines) == ranks + 1, printed
            assert printed.splitlines()[-1] == lines[-1], printed
            assert "(exitcode: 2)" in printed
        else:
            assert code == 2
            assert len(printed.splitlines()) == len(lines) == 1, printed
        assert "Traceback" not in printed


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def wait_until(job, condition, timeout_s=200):
    """Returns as soon as it holds, while the job goes on."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert job.poll() is None, job.printed()
        assert time.monotonic() < deadline, job.printed()
        time.sleep(0.01)


def wait_for_text(job, text, timeout_s=60):
    wait_until(job, lambda: text in job.printed(), timeout_s)


def wait_for_checkpoint(job, run_dir):
    """Returns as soon as there is a complete checkpoint, while the run goes on."""
    wait_until(job, lambda: complete_folders(run_dir / "checkpoints"))


def signal_group(pid, number=signal.SIGTERM):
    """As torchrun does it."""
    os.killpg(os.getpgid(pid), number)
