"""Block-parallel training of residual transformers as DiffusionBlocks (arXiv 2506.14202).

`dbdist.train(config)`, `dbdist.evaluate(run_dir)` and `dbdist.load(folder)` are what a program
needs; torch is imported when one of them is called, not with the package.
"""

from typing import TYPE_CHECKING

from dbdist import older_names
from dbdist.version import __version__

if TYPE_CHECKING:
    from dbdist.evaluate import evaluate
    from dbdist.inference.exported import load
    from dbdist.train import train

older_names.install()

__all__ = ["__version__", "evaluate", "load", "train"]


def __getattr__(name: str) -> object:
    if name == "load":
        from dbdist.inference.exported import load

        return load
    if name == "train":  # modules that can be called: `python -m dbdist.train` is one of them
        import dbdist.train as module

        return module
    if name == "evaluate":
        import dbdist.evaluate as module

        return module
    raise AttributeError(f"module 'dbdist' has no attribute {name!r}")
