"""What one row of the layer table is about: the components of a parameter, of an attention, of a module's output."""

from emp_callbacks.layer.base import Batches, Layer, MissingEvidence, PerWeight
from emp_callbacks.layer.features import FeatureLayer
from emp_callbacks.layer.shared_sums import Ranks
from emp_callbacks.layer.units import Member, UnitLayer
from emp_callbacks.layer.weights import WeightLayer

__all__ = [
    "Batches",
    "FeatureLayer",
    "Layer",
    "Member",
    "MissingEvidence",
    "PerWeight",
    "Ranks",
    "UnitLayer",
    "WeightLayer",
]
