"""Named tensors end to end in one vector, so that one message carries them all.

Tensors may live there: then nothing is packed or unpacked. Where the wire cannot reach the tensors'
device (gloo and a GPU), the vector has one copy in host memory.
"""

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor

from dbdist.errors import TopologyError
from dbdist.parallel.topology import Topology


class FlatBuffer:
    """Named tensors end to end: dtype after dtype, each in order of names.

    Tensors of odd sizes come last, so that the others stay aligned in memory. Of no tensors it
    holds one number without a name, because an empty message is none.
    """

    def __init__(
        self,
        like: Mapping[str, Tensor],
        device: torch.device,
        wire_device: torch.device | None = None,
        multiple_of: int = 1,
    ) -> None:
        """Allocates memory for tensors of these names, shapes and dtypes.

        like: the tensors. wire_device: None: the same device. multiple_of: what each dtype's number
        of elements is filled up to.
        """
        # Order matters: every rank walks the same names in the same order.
        names = sorted(like, key=lambda name: (like[name].numel() % 16 > 0, name))
        self.layout = [(name, like[name].shape, like[name].dtype) for name in names]
        dtypes = {dtype for _, _, dtype in self.layout} or {torch.float32}
        self._ends: list[tuple[torch.dtype, int, int]] = []
        end = 0
        for dtype in sorted(dtypes, key=lambda dtype: (-dtype.itemsize, str(dtype))):
            size = sum(shape.numel() for _, shape, own in self.layout if own == dtype) or 1
            size += -size % multiple_of
            self._ends.append((dtype, end, end + size * dtype.itemsize))
            end += size * dtype.itemsize
        self.data = torch.zeros(end, dtype=torch.uint8, device=device)
        """All bytes, where the tensors are."""
        self.wire = self.data
        """All bytes, where messages begin and end."""
        if wire_device not in (None, device):
            self.wire = torch.zeros_like(self.data, device=wire_device, pin_memory=True)
        self.segments = self.split(self.data)
        """One vector for each dtype."""
        self.views: dict[str, Tensor] = {}
        for segment in self.segments:
            offset = 0
            for name, shape, dtype in self.layout:
                if dtype == segment.dtype:
                    self.views[name] = segment[offset : offset + shape.numel()].view(shape)
                    offset += shape.numel()

    @property
    def num_bytes(self) -> int:
        return self.data.nbytes

    def split(self, data: Tensor) -> list[Tensor]:
        """Bytes in this buffer's form, as one vector for each dtype."""
        return [data[start:end].view(dtype) for dtype, start, end in self._ends]

    @torch.no_grad()
    def hold(self, tensors: Mapping[str, Tensor]) -> None:
        """Moves tensors here: they keep their values and share this buffer's memory."""
        for name, tensor in tensors.items():
            self.views[name].copy_(tensor)
            tensor.data = self.views[name]

    def lift(self) -> None:
        """Before a message leaves: brings the bytes to the wire."""
        if self.wire is not self.data:
            self.wire.copy_(self.data)

    def land(self) -> None:
        """After a message has arrived: brings the bytes back from the wire."""
        if self.wire is not self.data:
            self.data.copy_(self.wire)

    @torch.no_grad()
    def pack(self, tensors: Mapping[str, Tensor]) -> None:
        """Copies tensors in, which live elsewhere."""
        for name, view in self.views.items():
            view.copy_(tensors[name])

    @torch.no_grad()
    def unpack(self, tensors: Mapping[str, Tensor]) -> None:
        """Copies the buffer out into tensors of the same names."""
        for name, view in self.views.items():
            tensors[name].copy_(view)

    def check_equal_on_all_ranks(self, topology: Topology, what: str) -> None:
        """Raises TopologyError, naming rank and tensor, unless all have this layout. Collective."""
        digest = hashlib.sha256(
            json.dumps([[n, list(s), str(d)] for n, s, d in self.layout]).encode()
        )
        digests = topology.gather(digest.hexdigest())
        if len(set(digests)) == 1:
            return
        layouts = topology.gather(self.layout)
        for rank, layout in enumerate(layouts):
            if layout != layouts[0]:
                assert isinstance(layout, list)
                assert isinstance(layouts[0], list)
                name = next(
                    (a[0] for a, b in zip(layout, layouts[0], strict=False) if a != b),
                    "the number of tensors",
                )
                raise TopologyError(
                    f"{what}: rank {rank} differs from rank 0 in {name}; "
                    "start all ranks with the same code and configuration"
                )
