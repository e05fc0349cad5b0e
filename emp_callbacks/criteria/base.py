"""What every criterion offers."""

from abc import ABC, abstractmethod

from torch import Tensor


class Criterion(ABC):
    """A rule that gives each component a score; EMP uses the absolute value."""

    @abstractmethod
    def score(self, name: str, weight: Tensor) -> Tensor:
        """Return the scores of one parameter.

        Args:
            name: The parameter's name in the model.
            weight: The dense weights, any shape.

        Returns:
            Same shape, floating dtype, either sign. May be `weight` itself; it is only read.
        """
