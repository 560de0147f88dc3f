"""One epoch and what belongs to it: losses by batch, checkpoints, curves, metrics."""
