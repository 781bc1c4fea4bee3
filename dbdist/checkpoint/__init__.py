"""Checkpoints on disk: names, manifests, writing, reading, choosing, retiring."""
