"""Where every random number comes from: `seeds.at(seed, purpose, *keys)` names a stream.

A stream depends on nothing but its name, so no generator state is ever saved, and a block's batches
and noise are the same whatever the topology, the number of replicas or the step a run resumed from.
"""

import hashlib

import torch

Key = int | str


def at(seed: int, purpose: str, *keys: Key) -> int:
    """A 63-bit seed for the stream of this purpose, e.g. `at(seed, "noise", block, step)`.

    SHA-256 of the name: equal in every process and Python version, unlike `hash()`.
    """
    name = "/".join([str(seed), purpose, *map(str, keys)])
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") >> 1


def generator(seed: int, purpose: str, *keys: Key) -> torch.Generator:
    """Returns a CPU generator at the start of this stream.

    It is on the CPU so that draws do not depend on the device.
    """
    return torch.Generator().manual_seed(at(seed, purpose, *keys))
