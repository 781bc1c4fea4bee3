"""Tasks, one file each: how a batch becomes condition, target and loss, and how the chain is read
out."""
