"""What was found: a line for people, and what a manifest writes down and compares."""

from collections.abc import Sequence
from typing import Any

from dbdist.data.base import Dataset


def describe_found(train: Dataset, test: Dataset) -> str:
    """One line, as `train 1,437 images of 10 classes, test 360`, and what was left out.

    A set may have a `kind`, which says what its samples are.
    """
    kind = getattr(train, "kind", "samples")
    remarks = "".join(f"; {remark}" for dataset in (train, test) for remark in remarks_on(dataset))
    return f"train {len(train):,} {kind}, test {len(test):,}{remarks}"


def remarks_on(dataset: Dataset) -> Sequence[str]:
    """What to say of files that were left out of a split."""
    return getattr(dataset, "remarks", ())


def identity_of(train: Dataset, test: Dataset) -> dict[str, Any]:
    """What tells this data from other data: its spec, and each split's samples by digest."""
    splits = {
        name: {"num_samples": len(dataset), "digest": dataset.digest()}
        for name, dataset in (("train", train), ("test", test))
    }
    return {**train.spec.identity(), **splits}
