"""What is pruned together, and how names select it."""

from emp_callbacks.targets.weights import WeightTarget, prunable_weights

TARGETS = ("weights",)

__all__ = ["TARGETS", "WeightTarget", "prunable_weights"]
