"""What every criterion offers."""

from abc import ABC, abstractmethod

from torch import Tensor

from emp_callbacks.segment import Segment


class Criterion(ABC):
    """A rule that gives each component a score; EMP uses the absolute value."""

    @abstractmethod
    def score(self, segment: Segment) -> Tensor:
        """Return the scores of one segment, whose dense weights are in place.

        Args:
            segment: Only read.

        Returns:
            Layout of `segment.weight`, floating dtype, either sign. May be `segment.weight` itself.
        """
