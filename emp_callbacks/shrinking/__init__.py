"""Pruned heads, neurons and channels taken out of a model for good: smaller tensors, the same outputs."""

from emp_callbacks.shrinking.removal import shrink
from emp_callbacks.shrinking.report import ShrinkReport, ShrunkLayer, save_shrunk
from emp_callbacks.shrinking.shrunk_file import load_shrunk
from emp_callbacks.shrinking.surgery import Cut
from emp_callbacks.shrinking.units import pruned_units

__all__ = ["Cut", "ShrinkReport", "ShrunkLayer", "load_shrunk", "pruned_units", "save_shrunk", "shrink"]
