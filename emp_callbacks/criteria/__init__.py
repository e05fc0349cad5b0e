"""How to score: one file is one formula and one small class."""

from emp_callbacks.criteria.base import Criterion
from emp_callbacks.criteria.magnitude import Magnitude
from emp_callbacks.criteria.random import Random

CRITERIA: dict[str, type[Criterion]] = {"magnitude": Magnitude, "random": Random}

__all__ = ["CRITERIA", "Criterion", "Magnitude", "Random"]
