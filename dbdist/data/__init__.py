"""Samples: files on disk, data sets, and the order in which a block sees them."""

from typing import Any


def __getattr__(name: str) -> Any:
    """`load_dataset`, `dataset_spec` and `prepare` of `dbdist.data.sources`, when asked for.

    Options are read without torch, which those need.
    """
    if name in ("dataset_spec", "load_dataset", "prepare"):
        from dbdist.data import sources

        return getattr(sources, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
