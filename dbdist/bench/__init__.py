"""Measurements that anyone can repeat: `python -m dbdist.bench.NAME --help`."""
