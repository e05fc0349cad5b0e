"""Score = |w|."""

from typing import final

from torch import Tensor

from emp_callbacks.criteria.base import Criterion
from emp_callbacks.segment import Segment


@final
class Magnitude(Criterion):
    """Weight magnitude, s = |w| (Han et al., arXiv:1506.02626)."""

    def score(self, segment: Segment) -> Tensor:
        return segment.weight  # EMP takes |.| itself: no copy of the model
