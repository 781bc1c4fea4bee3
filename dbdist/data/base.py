"""What every set of samples offers to training and evaluation, whatever its samples are."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

Key = int | tuple[int, int]
"""A sample: its index, or (index, augment_seed) to change it at random by that seed."""
Batch = dict[str, Tensor]
"""Tensors by name, all with as many rows: row i of each belongs to sample i."""


@runtime_checkable
class Spec(Protocol):
    """What a model and a manifest must know of a set of samples."""

    @property
    def name(self) -> str:
        """The name that selects the set in the configuration."""
        ...

    def identity(self) -> dict[str, Any]:
        """What tells this data from other data, as plain values that JSON can hold."""
        ...


@runtime_checkable
class Dataset(Protocol):
    """One split of a set: samples that depend on their keys and on nothing else."""

    @property
    def spec(self) -> Spec:
        """What a model must know of the samples."""
        ...

    @property
    def augments(self) -> bool:
        """Whether the seed in a key changes the sample."""
        ...

    def __len__(self) -> int: ...

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        """The batch of these samples, in the order of the keys."""
        ...

    def digest(self) -> str:
        """SHA-256 that names the samples and their order, the same on every machine."""
        ...


@runtime_checkable
class ChecksFiles(Protocol):
    """A set that knows the content of its files by hash."""

    def damaged_files(self) -> Iterator[str]:
        """A sentence for each file that is not as it was written; reads all of them."""
        ...
