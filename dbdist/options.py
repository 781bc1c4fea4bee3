"""The old names of the data set's options, kept for scripts."""

from dbdist.data.options import AugmentOptions as AugmentConfig
from dbdist.data.options import ImageOptions as DataConfig

__all__ = ["AugmentConfig", "DataConfig"]
