"""What pruning costs in loss: curvature, bounds beside measured losses, the loss of a training step."""
