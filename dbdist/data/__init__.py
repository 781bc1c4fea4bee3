"""Samples: files on disk, data sets, and the order in which a block sees them."""
