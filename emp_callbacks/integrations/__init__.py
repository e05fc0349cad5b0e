"""Translate the events of a training framework into calls of the pruner; decide nothing."""
