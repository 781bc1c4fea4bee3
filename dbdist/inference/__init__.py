"""Models from checkpoints, exported folders and published weights."""
