"""Score = |w|."""

from typing import final

from torch import Tensor

from emp_callbacks.criteria.base import Criterion
from emp_callbacks.layer import WeightLayer


@final
class Magnitude(Criterion):
    """Weight magnitude, s = |w| (Han et al., arXiv:1506.02626)."""

    targets = ("weights",)
    zero_scores_zero = True

    def score(self, layer: WeightLayer) -> Tensor:
        return layer.effective  # EMP takes |.| itself: no copy of the model
