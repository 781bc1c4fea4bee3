"""How a clean state is corrupted, and how the sampler undoes it."""
