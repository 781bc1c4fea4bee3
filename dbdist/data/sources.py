"""A configured data set, by its registered name: its spec, its samples, its files.

The code behind a name has four functions: `dataset_spec(options)`, `load_dataset(options, split)`,
`prepare(options)` and `spec_from(values)`. It may have a fifth, `located(spec, options)`: a spec
that a checkpoint kept, with the places of files in it, which are no part of its identity.
"""

from typing import Any, Literal

from dbdist.config import registry
from dbdist.config.options import DataOptions
from dbdist.data.base import Dataset


def dataset_spec(options: DataOptions) -> Any:
    """What a model must know of the data set, without reading its samples. Raises DataError."""
    return _code(options).dataset_spec(options)


def stored_spec(values: dict[str, Any], options: DataOptions) -> Any:
    """The spec that a checkpoint kept of the data set, for these options."""
    code = _code(options)
    spec = code.spec_from(values)
    return code.located(spec, options) if hasattr(code, "located") else spec


def load_dataset(options: DataOptions, split: Literal["train", "test"]) -> Dataset:
    """A split of the data set, whose files must be there. Raises DataError."""
    return _code(options).load_dataset(options, split)


def prepare(options: DataOptions) -> None:
    """Makes sure that the files are there, for one process a node. Raises DataError."""
    _code(options).prepare(options)


def _code(options: DataOptions) -> Any:
    return registry.find("data", options.name).load()
