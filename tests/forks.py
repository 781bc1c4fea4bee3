"""Python commands that begin at once: forks of a process that has imported torch and dbdist.

    process = Forks().start(["-m", "dbdist.train", "--config", …], environment, folder, log)

A command gets a session, an environment and an output file of its own, and ends with its own exit
code; only the imports are those of the process that it was forked from. torchrun started in this
way (`-m torch.distributed.run`) forks its ranks as well, and is torch's own agent in all else.
"""

import atexit
import gc
import importlib
import io
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path

IMPORTED = (
    "torch.distributed.launcher.api",
    "torch._dynamo",  # which DDP imports
    "torch.utils.tensorboard",
    "dbdist.monitor.painter",
    "dbdist.training.setup",
    "dbdist.inference.of_run",
    "dbdist.parallel.session",
    "dbdist.config.parse",
    "dbdist.data.small_sets",
    "dbdist.models.vit",
    "dbdist.tasks.classification",
    "dbdist.processes.gaussian",
)
"""What a rank has imported after its first steps, and torchrun's agent."""
SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


class Forks:
    """The process that is forked, from the side of the test."""

    def __init__(self) -> None:
        here, there = socket.socketpair()
        self._connection = Connection(here.detach())
        self._host = subprocess.Popen(
            [sys.executable, __file__, str(there.fileno())], pass_fds=[there.fileno()]
        )
        there.close()
        self.exit_codes: dict[int, int] = {}

    def start(
        self, words: list[str], environment: dict[str, str], folder: Path, log: Path
    ) -> "Forked":
        """words: what follows `python` in the command."""
        return Forked(self, self._ask((words, environment, str(folder), str(log))))

    def preload(self, module: str) -> None:
        """Whatever is forked from now on has imported it."""
        self._ask(module)

    def close(self) -> None:
        """Ends the process, and all of its forks that still run."""
        self._connection.close()
        self._host.wait(30)

    def hear(self, timeout_s: float = 0.0) -> None:
        """Learns which forks have ended."""
        while self._connection.poll(timeout_s):
            pid, code = self._connection.recv()
            self.exit_codes[pid] = code
            timeout_s = 0.0

    def _ask(self, request: object) -> int:
        self._connection.send(request)
        while True:
            pid, code = self._connection.recv()
            if code is None:
                return pid
            self.exit_codes[pid] = code


class Forked:
    """What tests use of subprocess.Popen, for a fork."""

    def __init__(self, forks: Forks, pid: int) -> None:
        self.pid = pid
        self._forks = forks

    @property
    def returncode(self) -> int | None:
        return self._forks.exit_codes.get(self.pid)

    def poll(self) -> int | None:
        self._forks.hear()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            left = 60.0 if deadline is None else deadline - time.monotonic()
            if left <= 0:
                raise subprocess.TimeoutExpired(f"fork {self.pid}", timeout or 0.0)
            self._forks.hear(left)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


# -- the process that is forked --------------------------------------------------------------------


def host(connection: Connection) -> None:
    """Forks on request, and reports what has ended as (pid, exit code)."""
    for module in IMPORTED:
        importlib.import_module(module)
    # As in the tests' own process; see `ask_for_a_picture`.
    sys.modules["dbdist.monitor.painter"].Painter.ask = lambda *_: None  # type: ignore[attr-defined]
    gc.collect()
    gc.freeze()  # else a fork's first collection would copy all of it
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    running: set[int] = set()
    while True:
        ready = wait([connection, reader])
        if reader in ready:
            with suppress(BlockingIOError):
                os.read(reader, 1000)
        while running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            running.discard(pid)
            with suppress(OSError):
                connection.send((pid, os.waitstatus_to_exitcode(status)))
        if connection in ready:
            try:
                request = connection.recv()
            except EOFError:
                break
            pid = 0
            if isinstance(request, str):
                importlib.import_module(request)
            elif (pid := os.fork()) == 0:
                words, environment, folder, log = request
                os.close(reader)
                os.close(writer)
                connection.close()
                with open(log, "w") as out:
                    os.dup2(out.fileno(), 1)
                    os.dup2(out.fileno(), 2)
                os.chdir(folder)
                become(words, environment)
            else:
                running.add(pid)
            connection.send((pid, None))
    for pid in running:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    os._exit(0)


def become(words: list[str], environment: dict[str, str]) -> None:
    """Makes this fork the command `python words…`; does not return."""
    os.setsid()
    signal.set_wakeup_fd(-1)
    for number in (*SIGNALS, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.environ.clear()
    os.environ.update(environment)
    sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb", 0), write_through=True)
    sys.stderr = io.TextIOWrapper(os.fdopen(2, "wb", 0), write_through=True)
    code = 1
    try:
        run_python(words)
        code = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    threading._shutdown()  # type: ignore[attr-defined]  # as at the end of a program
    atexit._run_exitfuncs()
    os._exit(code)


def run_python(words: list[str]) -> None:
    while words[0] in ("-u", "-B"):
        words = words[1:]
    if words[0] == "-m":
        sys.argv, sys.path[0] = words[1:], os.getcwd()
        sys.modules.pop(words[1], None)
        if words[1] == "torch.distributed.run":
            fork_ranks()
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv, sys.path[0] = ["-c", *words[2:]], os.getcwd()
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv, sys.path[0] = words, str(Path(words[0]).parent)
        runpy.run_path(words[0], run_name="__main__")


def fork_ranks() -> None:
    """From now on torchrun's agent in this process forks its ranks, in place of starting them."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    def start(_: object, args: tuple[str, ...], env: dict[str, str]) -> "Child":
        return Child([*args[1:]], env)

    subprocess_handler.SubprocessHandler._popen = start  # type: ignore[method-assign]


class Child:
    """What torchrun's agent uses of subprocess.Popen, for a rank that is forked."""

    def __init__(self, words: list[str], environment: dict[str, str]) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            say_who_it_is(environment)
            become(words, environment)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("rank", timeout)
            time.sleep(0.01)
        return code


def say_who_it_is(environment: dict[str, str]) -> None:
    """A line in RANKS: /proc shows the variables with which a process began, not a fork's."""
    names = ("RANK", "TORCHELASTIC_RESTART_COUNT")
    words = [str(os.getpid()), *(environment[name] for name in names)]
    with open(environment["DBDIST_TEST_RANKS"], "a") as file:
        file.write(" ".join(words) + "\n")


if __name__ == "__main__":
    host(Connection(int(sys.argv[1])))
