"""A rendezvous for torchrun on one node, whose store listens on the loopback interface only.

    torchrun --rdzv-backend=loopback --nproc_per_node=3 -m dbdist.train …

torchrun's own (`--standalone`) listens on every interface, unauthenticated. torchrun finds this one
by the entry point `torchrun.handlers`, and imports it in each of its runs: so of dbdist nothing but
`reports` is imported here.
"""

import socket
from collections.abc import Callable

from torch.distributed import PrefixStore, TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
)

from dbdist.parallel.reports import shorten

ADDRESS = "127.0.0.1"


class Loopback(RendezvousHandler):
    """One agent that meets nobody; its ranks use its store, start after start."""

    def __init__(self, parameters: RendezvousParameters) -> None:
        if parameters.max_nodes > 1:
            raise ValueError("--rdzv-backend=loopback is for one node; use c10d for several")
        self._run_id = parameters.run_id
        server = socket.create_server((ADDRESS, 0), backlog=2048)
        self._port = server.getsockname()[1]
        self._store = TCPStore(
            ADDRESS, self._port, is_master=True, master_listen_fd=server.detach()
        )
        self._is_closed = False

    def get_backend(self) -> str:
        return "loopback"

    @property
    def use_agent_store(self) -> bool:
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        store = PrefixStore(self._run_id, self._store)
        return RendezvousInfo(store, 0, 1, RendezvousStoreInfo(ADDRESS, self._port))

    def is_closed(self) -> bool:
        return self._is_closed

    def set_closed(self) -> None:
        self._is_closed = True

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._run_id

    def shutdown(self) -> bool:
        self._is_closed = True
        return True


def handler() -> Callable[[RendezvousParameters], RendezvousHandler]:
    """What torchrun calls by the entry point, in each of its runs."""
    shorten()
    return Loopback
