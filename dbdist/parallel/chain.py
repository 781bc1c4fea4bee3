"""Inference across ranks: states flow from block to block, in micro-batches.

They are sent point to point. While block 1 works on the first micro-batch, block 0 is at the
second, and so on. Conditions never travel: each rank loads its own. Knows nothing of what a state
or a block is.
"""

from collections import deque
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from dbdist.parallel.topology import Topology

IN_FLIGHT = 4
"""Micro-batches that a rank has asked for ahead of its work, and sends that may be under way."""


class Chain:
    """This rank's link in the chain of its replica."""

    def __init__(self, topology: Topology) -> None:
        assert topology.block is not None, "a dedicated coordinator is not part of a chain"
        ranks = topology.layout.chain(topology.replica)
        block = topology.block
        self._topology = topology
        self._previous = ranks[block - 1] if block > 0 else None
        self._next = ranks[block + 1] if block + 1 < len(ranks) else None

    def run(
        self,
        sizes: list[int],
        state_shape: tuple[int, ...],
        dtype: torch.dtype,
        first: Callable[[int], Tensor],
        work: Callable[[int, Tensor], Tensor],
    ) -> Iterator[int]:
        """Passes every micro-batch through this rank's block; yields its number once it is sent.

        So whoever reads the numbers may look at a micro-batch while the next block has it already.

        sizes: rows of each micro-batch, the same on all ranks of the chain. state_shape: of one
        row. first(i): the initial states of micro-batch i, asked for on block 0 alone. work(i,
        states): this block's work, returning what the next block receives.
        """
        device, wire = self._topology.device, self._topology.wire_device
        meter, group = self._topology.meter, self._topology.p2p_group
        asked: deque[tuple[Tensor, dist.Work]] = deque()
        under_way: deque[tuple[Tensor, dist.Work]] = deque()  # keeps sent buffers alive
        next_to_ask = 0
        for i in range(len(sizes)):
            while self._previous is not None and next_to_ask < min(i + IN_FLIGHT, len(sizes)):
                buffer = torch.empty(sizes[next_to_ask], *state_shape, dtype=dtype, device=wire)
                asked.append(
                    (buffer, _started(dist.irecv(buffer, src=self._previous, group=group)))
                )
                next_to_ask += 1
            if self._previous is None:
                states = first(i)
            else:
                buffer, receiving = asked.popleft()
                receiving.wait()
                meter.received["chain"] += buffer.nbytes
                states = buffer.to(device)
            states = work(i, states)
            if self._next is not None:
                if len(under_way) == IN_FLIGHT:
                    under_way.popleft()[1].wait()
                buffer = states.to(wire, dtype).contiguous()
                assert buffer.shape == (sizes[i], *state_shape), (
                    f"{tuple(buffer.shape)} for {sizes[i]} rows"
                )
                under_way.append(
                    (buffer, _started(dist.isend(buffer, dst=self._next, group=group)))
                )
                meter.sent["chain"] += buffer.nbytes
            yield i
        for _, sending in under_way:
            sending.wait()


def _started(work: dist.Work | None) -> dist.Work:
    assert work is not None
    return work
