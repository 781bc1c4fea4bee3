"""The old name of `dbdist.config.options`, kept for scripts."""

from dbdist.config.options import *  # noqa: F403
