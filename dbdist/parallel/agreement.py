"""What all ranks must have alike: compared at the start, named where it differs."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from dbdist.errors import TopologyError

Facts = Mapping[str, object]
"""Key -> a small value that JSON can hold. Ranks need not have the same keys."""


def find_difference(
    facts: Facts, ranks: Sequence[int], group: dist.ProcessGroup | None = None
) -> str | None:
    """Returns the first key that two ranks have otherwise; None if all agree. Collective.

    It reads `rank 2 has train.lr 0.002, rank 0 0.001`. ranks: the group's. Only digests travel as
    long as they agree.
    """
    own = {key: json.loads(json.dumps(value)) for key, value in facts.items()}
    digest = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()
    if len(set(_gather(digest, ranks, group).values())) == 1:
        return None
    for key, values in _by_key(_gather(own, ranks, group)).items():
        texts = {rank: json.dumps(value) for rank, value in values.items()}
        usual, _ = Counter(texts.values()).most_common(1)[0]
        odd = next((rank for rank, text in texts.items() if text != usual), None)
        if odd is not None:
            like = next(rank for rank, text in texts.items() if text == usual)
            return f"rank {odd} has {key} {texts[odd]}, rank {like} has {usual}"
    return None


def check_agreement(facts: Facts, num_ranks: int) -> None:
    """Raises TopologyError, on all ranks, where they differ. Collective."""
    if difference := find_difference(facts, range(num_ranks)):
        raise TopologyError(f"{difference}; start all ranks with the same options, code and data")


def flat(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Nested values by dotted keys."""
    found: dict[str, object] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


@torch.no_grad()
def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and values, in order of names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        data = tensors[name].detach().cpu().contiguous().reshape(-1)
        digest.update(name.encode())
        digest.update(data.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _gather(
    value: object, ranks: Sequence[int], group: dist.ProcessGroup | None
) -> dict[int, object]:
    values: list[object] = [None] * len(ranks)
    dist.all_gather_object(values, value, group=group)
    return dict(zip(ranks, values, strict=True))


def _by_key(facts: dict[int, object]) -> dict[str, dict[int, object]]:
    """Key -> rank -> value, of the ranks that have it."""
    found: dict[str, dict[int, object]] = {}
    for rank, own in facts.items():
        assert isinstance(own, dict)
        for key, value in own.items():
            found.setdefault(key, {})[rank] = value
    return found
