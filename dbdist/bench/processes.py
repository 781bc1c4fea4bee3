"""What Linux says in /proc of running processes: their output, memory, files and sockets."""

import os
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

PROC = Path("/proc")
_LISTEN = "0A"


@dataclass(frozen=True)
class Usage:
    """What a process holds at a moment."""

    memory_mb: float
    """Resident, in MiB."""
    open_files: int
    threads: int


@dataclass(frozen=True)
class Listener:
    """A TCP socket that accepts connections."""

    address: str
    port: int
    inode: str


def writers_to(log: Path) -> dict[int, dict[str, str]]:
    """{pid: environment} of the processes whose output goes to this file."""
    found: dict[int, dict[str, str]] = {}
    wanted = log.stat()
    for path in PROC.glob("[0-9]*"):
        with suppress(OSError):  # it has just ended, or is another user's
            if any(os.path.samestat((path / f"fd/{fd}").stat(), wanted) for fd in (1, 2)):
                variables = (path / "environ").read_bytes().decode(errors="replace").split("\0")
                pairs = (variable.partition("=") for variable in variables if variable)
                found[int(path.name)] = {name: value for name, _, value in pairs}
    return found


def parent_of(pid: int) -> int | None:
    """None once the process is gone."""
    with suppress(OSError):
        # The name, in brackets, may hold anything.
        return int((PROC / f"{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return None


def usage_of(pid: int) -> Usage | None:
    """None once the process is gone."""
    with suppress(OSError, KeyError):
        text = (PROC / f"{pid}/status").read_text()
        fields = dict(line.split(":", 1) for line in text.splitlines())
        memory_mb = int(fields["VmRSS"].split()[0]) / 2**10
        return Usage(memory_mb, len(list((PROC / f"{pid}/fd").iterdir())), int(fields["Threads"]))
    return None


def listeners() -> Iterator[Listener]:
    """Everything that listens on this machine."""
    for name, kind in (("tcp", IPv4Address), ("tcp6", IPv6Address)):
        with suppress(OSError):  # a machine without IPv6
            for line in (PROC / "net" / name).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTEN:
                    address, _, port = fields[1].partition(":")
                    yield Listener(str(kind(_in_order(address))), int(port, 16), fields[9])


def listeners_of(pids: Collection[int]) -> set[Listener]:
    """What these processes listen on."""
    own: set[str] = set()
    for pid in pids:
        with suppress(OSError):
            for link in (PROC / f"{pid}/fd").iterdir():
                with suppress(OSError):
                    own.add(str(link.readlink()))
    return {listener for listener in listeners() if f"socket:[{listener.inode}]" in own}


def _in_order(address: str) -> bytes:
    """Brings an address into network order: the kernel prints words of the machine's byte order."""
    data = bytes.fromhex(address)
    return b"".join(data[i : i + 4][::-1] for i in range(0, len(data), 4))
