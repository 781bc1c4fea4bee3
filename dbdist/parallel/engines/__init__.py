"""Data parallelism among the copies of a block."""
