"""The chain of blocks at inference, and the figures of a test set."""
