"""Tasks, one file each: how a batch becomes condition, target, loss, and how it is read out."""
