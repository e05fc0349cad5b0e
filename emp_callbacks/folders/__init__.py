"""Models in folders, larger than memory: read, pruned, measured and written a block at a time."""
