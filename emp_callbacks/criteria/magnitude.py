"""Score = |w|."""

from typing import final

from torch import Tensor

from emp_callbacks.criteria.base import Criterion


@final
class Magnitude(Criterion):
    """Weight magnitude, s = |w| (Han et al., arXiv:1506.02626)."""

    def score(self, name: str, weight: Tensor) -> Tensor:  # noqa: ARG002
        return weight  # EMP takes |.| itself: no copy of the model
