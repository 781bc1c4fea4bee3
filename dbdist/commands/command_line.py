"""What every command line shares: one line for a mistake, exit codes, words that mean files."""

import argparse
import faulthandler
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

from dbdist.errors import ConfigError, Fault, UserError
from dbdist.parallel import reports
from dbdist.parallel.launch import Launch, current_launch, error_file


def fail(prog: str, message: object, code: int = 2) -> NoReturn:
    """Ends this process with one line on stderr and an exit code.

    After a user's mistake, processes of one launcher wait for each other, so that it stops none of
    them before its line.
    """
    say(prog, f"error: {message}")
    if (path := error_file()) is not None:
        reports.write_line(path, _one_line(prog, f"error: {message}"))
    if code == 2:
        current_launch().leave_together()
    # No interpreter shutdown: a process group that lost its peers must not hold the exit code back.
    with suppress(OSError):
        sys.stdout.flush()
    os._exit(code)


def say(prog: str, message: object) -> None:
    """One line on stderr, with the rank where there are several."""
    line = f"{_one_line(prog, message)}\n".encode(errors="backslashreplace")
    with suppress(OSError):  # nobody listens any more, which must not keep anybody from ending
        sys.stderr.flush()
        os.write(2, line)  # at once: ranks share the terminal


def _one_line(prog: str, message: object) -> str:
    launch = current_launch()
    rank = f"[r{launch.rank}] " if launch.world_size > 1 else ""
    return f"{rank}{prog}: {' '.join(str(message).split())}"


def announce(prog: str) -> None:
    """Says on rank 0 that the command has begun, before the import of torch takes its seconds."""
    launch = current_launch()
    if launch.rank == 0 and "torch" not in sys.modules:
        ranks = f" {launch.world_size} ranks" if launch.world_size > 1 else ""
        with suppress(OSError, ValueError):  # a lost terminal
            print(f"{prog}: starting{ranks}, importing torch", flush=True)


def guarded(
    prog: str,
    run: Callable[[], None],
    interrupted: str = "the same command starts anew",
) -> None:
    """Runs a command and turns its errors into one line and an exit code.

    A UserError ends it with exit code 2, a Fault with 1, Ctrl-C with 130 and a line that says
    `interrupted`.
    """
    print_anything()
    path = error_file()
    if path is not None:
        with suppress(OSError, ValueError):  # no stderr of its own
            faulthandler.enable()
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
    except Exception as error:
        if path is not None:
            reports.write_traceback(path, error)
        raise


def print_anything() -> None:
    """From here on, a letter that the terminal cannot show is printed as its number."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError, OSError):  # replaced by a notebook, or closed
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def with_first(option: str, argv: list[str]) -> list[str]:
    """The same with a leading word as the value of an option: `RUN` for `--run_dir RUN`."""
    return [option, *argv] if argv and not argv[0].startswith("-") else argv


def without_local_rank(argv: list[str]) -> list[str]:
    """The words without the `--local_rank N` that some launchers add.

    Raises ConfigError where N is not the environment's LOCAL_RANK, which is what counts.
    """
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
    """argparse with its complaints in one line, and `~` as the home folder in every word.

    A description keeps its lines.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        fail(self.prog, f"{message}; see --help")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # type: ignore[override]
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args([with_home(word) for word in words], namespace)


def with_home(word: str) -> str:
    """`~/x`, `--out=~/x` and `0=~/x` with the home folder in place of `~`."""
    name, is_joined, path = word.partition("=~")
    return f"{name}={os.path.expanduser(f'~{path}')}" if is_joined else os.path.expanduser(word)
