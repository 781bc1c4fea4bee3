"""What every command line shares: one line for a mistake, exit codes, help."""

import argparse
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from dbdist.errors import ConfigError, Fault, UserError
from dbdist.parallel.launch import Launch


def fail(prog: str, message: object, code: int = 2) -> NoReturn:
    """One line on stderr and an exit code; after a user's mistake, processes of one launcher wait
    for each other, so that it stops none of them before its line."""
    say(prog, f"error: {message}")
    if code == 2:
        current_launch().leave_together()
    # No interpreter shutdown: a process group that lost its peers must not hold the exit code back.
    with suppress(OSError):
        sys.stdout.flush()
    os._exit(code)


def say(prog: str, message: object) -> None:
    """One line on stderr, with the rank where there are several."""
    text = " ".join(str(message).split())
    launch = current_launch()
    rank = f"[r{launch.rank}] " if launch.world_size > 1 else ""
    with suppress(OSError):  # nobody listens any more, which must not keep anybody from ending
        sys.stderr.flush()
        os.write(2, f"{rank}{prog}: {text}\n".encode())  # at once: ranks share the terminal


def guarded(
    prog: str,
    run: Callable[[], None],
    interrupted: str = "the same command continues from the newest checkpoint",
) -> None:
    """Runs a command; a UserError ends it with one line and exit code 2, a Fault with 1, Ctrl-C
    with 130 and a line that says `interrupted`."""
    try:
        run()
    except UserError as error:
        fail(prog, error)
    except Fault as fault:
        fail(prog, fault, code=1)
    except KeyboardInterrupt:
        if current_launch().rank == 0:
            print(f"\n{prog}: interrupted; {interrupted}", file=sys.stderr)
        os._exit(130)


def without_local_rank(argv: list[str]) -> list[str]:
    """The words without the `--local_rank N` that some launchers add.

    Raises ConfigError where N is not the environment's LOCAL_RANK, which is what counts.
    """
    from dbdist.parallel.launch import Launch

    words, given = [*argv], None
    for i, word in enumerate(argv):
        name, is_joined, value = word.partition("=")
        if name in ("--local_rank", "--local-rank"):
            given = value if is_joined else "".join(argv[i + 1 : i + 2])
            del words[i : i + (1 if is_joined else 2)]
            break
    if given is not None and given != (known := str(Launch.from_environment().local_rank)):
        raise ConfigError(
            f"--local_rank is {given}, but the launcher's environment says {known}; leave it out"
        )
    return words


class OneLineParser(argparse.ArgumentParser):
    """argparse, its complaints in one line."""

    def error(self, message: str) -> NoReturn:
        fail(self.prog, f"{message}; see --help")


def current_launch() -> "Launch":
    """This process among those the launcher started; a process alone if that cannot be told."""
    from dbdist.parallel.launch import Launch

    try:
        return Launch.from_environment()
    except UserError:
        return Launch(0, 1, 0, 1)
