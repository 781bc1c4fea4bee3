"""dbdist: block-parallel training of residual transformers as DiffusionBlocks (arXiv
2506.14202)."""

from typing import TYPE_CHECKING

from dbdist.version import __version__

if TYPE_CHECKING:
    from dbdist.inference.exported import load

__all__ = ["__version__", "load"]


def __getattr__(name: str) -> object:
    if name == "load":  # torch is imported when a model is, not with the package
        from dbdist.inference.exported import load

        return load
    raise AttributeError(f"module 'dbdist' has no attribute {name!r}")
