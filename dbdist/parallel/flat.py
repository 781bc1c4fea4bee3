"""One flat buffer for a fixed, sorted list of tensors, and the check that all ranks mean the same
list."""

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor

from dbdist.errors import TopologyError
from dbdist.parallel.topology import Topology


class FlatBuffer:
    """Packs named tensors into one contiguous vector on the wire's device, in sorted order of
    names."""

    def __init__(
        self, like: Mapping[str, Tensor], device: torch.device, multiple_of: int = 1
    ) -> None:
        """multiple_of: what the number of elements is filled up to with zeros."""
        # Order matters: every rank walks the same sorted names.
        self.layout = [(name, like[name].shape, like[name].dtype) for name in sorted(like)]
        dtypes = {dtype for _, _, dtype in self.layout}
        assert len(dtypes) == 1, f"one dtype, not {dtypes}"
        size = sum(shape.numel() for _, shape, _ in self.layout)
        size += -size % multiple_of
        self.data = torch.zeros(size, dtype=dtypes.pop(), device=device)
        self.views: dict[str, Tensor] = {}
        offset = 0
        for name, shape, _ in self.layout:
            self.views[name] = self.data[offset : offset + shape.numel()].view(shape)
            offset += shape.numel()

    @property
    def num_bytes(self) -> int:
        return self.data.nbytes

    @torch.no_grad()
    def pack(self, tensors: Mapping[str, Tensor | None]) -> None:
        """Copies tensors in; an absent one (a parameter without gradient) counts as zeros."""
        parts = [tensors[name] for name, _, _ in self.layout]
        device = next((part.device for part in parts if part is not None), self.data.device)
        filled = [
            torch.zeros(shape, dtype=dtype, device=device) if part is None else part
            for part, (_, shape, dtype) in zip(parts, self.layout, strict=True)
        ]
        packed = torch.cat([part.reshape(-1) for part in filled])
        self.data[: packed.numel()].copy_(packed)  # one transfer

    @torch.no_grad()
    def unpack(self, tensors: Mapping[str, Tensor]) -> None:
        """Copies the buffer out into tensors of the same names."""
        targets = [tensors[name] for name, _, _ in self.layout]
        sizes = [target.numel() for target in targets]
        data = self.data[: sum(sizes)].to(targets[0].device)  # one transfer
        for target, part in zip(targets, data.split(sizes), strict=True):
            target.copy_(part.view(target.shape))

    def check_equal_on_all_ranks(self, topology: Topology, what: str) -> None:
        """Raises TopologyError, naming rank and tensor, unless all ranks have this layout.
        Collective."""
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
