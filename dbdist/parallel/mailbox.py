"""Small records from every rank to rank 0, through the launcher's key-value store.

Posting never waits and needs nobody on the other side, so ranks that train independently stay
independent; no tensor travels this way.
"""

import json
from collections import deque
from typing import Any

import torch.distributed as dist

from dbdist.parallel.topology import Topology


class Mailbox:
    """Ordered records per sender and topic; rank 0 reads them."""

    def __init__(self, topology: Topology, topic: str) -> None:
        self._rank = topology.rank
        self._own: deque[Any] = deque()
        self._store = topology.store and dist.PrefixStore(f"mail/{topic}", topology.store)
        self._num_posted = 0
        self._next = dict.fromkeys(range(1, topology.world_size), 0)

    def post(self, record: Any) -> None:
        """Leaves a JSON-able record for rank 0."""
        if self._rank == 0 or self._store is None:
            self._own.append(record)
        else:
            self._store.set(f"{self._rank}/{self._num_posted}", json.dumps(record))
            self._num_posted += 1

    def collect(self) -> list[tuple[int, Any]]:
        """On rank 0: (sender, record) of everything that has arrived since the last call."""
        arrived: list[tuple[int, Any]] = [(0, record) for record in self._own]
        self._own.clear()
        for sender, index in self._next.items():
            assert self._store is not None
            while self._store.check([key := f"{sender}/{index}"]):
                arrived.append((sender, json.loads(self._store.get(key))))
                self._store.delete_key(key)
                index += 1
            self._next[sender] = index
        return arrived
