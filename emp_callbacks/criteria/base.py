"""What every criterion offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal, final

from torch import Tensor

from emp_callbacks.layer import Batches, Layer

Evidence = Literal["gradients", "inputs", "activations"]
ScoreFunction = Callable[[Any], Tensor]
"""A criterion of the user's: takes a layer (see `Criterion.score`) and returns its scores."""


class Criterion(ABC):
    """A rule that gives each component a score.

    Attributes:
        targets: What it can score.
        needs: Evidence that must be gathered before a refresh; None if the weights say everything.
        signed: What becomes of scores below 0: "absolute", or "shift": the lowest of those that compete becomes 0.
        zero_scores_zero: Whether a component whose weights are 0 has the score 0.
        certificate: What the sum of the pruned scores bounds: the error of a layer's outputs, or the change of the loss
            to first order; None if nothing.
        seed: What its random numbers follow from, kept with the run; None where it draws none.
    """

    targets: ClassVar[tuple[str, ...]]
    needs: ClassVar[Evidence | None] = None
    signed: Literal["absolute", "shift"] = "absolute"
    zero_scores_zero: ClassVar[bool] = False
    certificate: ClassVar[Literal["output_error", "loss_change"] | None] = None
    seed: int | None = None

    @abstractmethod
    def score(self, layer: Any) -> Tensor:
        """Return the scores of one layer, whose dense weights are in place. Collective.

        On several ranks it is left where it asks for sums, and called anew when those of all layers have come.

        Args:
            layer: Only read. `layer.name`, `layer.span` (shape and place of its components); for weights
                `layer.weight`; for heads, neurons and nodes `layer.unit_sums(...)`, `layer.members`.

        Returns:
            Floating dtype, either sign: layout of `layer.weight`, or shape (units,). May be `layer.weight` itself.
        """

    def of_batch(self, weight: Tensor, gradient: Tensor) -> Tensor:
        """Return what one batch says of each weight, same shape; for criteria that need gradients.

        It is summed over the weights of a unit, taken absolutely, and averaged over batches.
        """
        raise NotImplementedError(f"{type(self).__name__} does not read gradients")

    def check(self, layer: Layer) -> None:
        """Raise ValueError unless this layer can be scored."""

    def evidence(self, layer: Layer) -> Tensor:
        """Return what was gathered for a layer. Collective."""
        return layer.evidence(self.batches)

    batches: Batches = Batches()
    """The batches whose gradients were gathered; set by the pruner before it asks for scores."""


@final
class UserCriterion(Criterion):
    """A function of the user's.

    Args:
        function: Takes a layer, returns scores; see `Criterion.score`. Its attribute `signed`, "absolute" (default) or
            "shift", says what becomes of scores below 0.

    Raises:
        ValueError: `function.signed` is neither.
    """

    targets = ("weights", "heads", "neurons", "experts", "kan_nodes")

    def __init__(self, function: ScoreFunction) -> None:
        self._function = function
        self.signed = getattr(function, "signed", "absolute")
        if self.signed not in ("absolute", "shift"):
            raise ValueError(f"the criterion's signed={self.signed!r} must be 'absolute' or 'shift'")

    def score(self, layer: Any) -> Tensor:
        try:
            scores = self._function(layer)
        except AttributeError as error:
            if hasattr(layer, "weight") or "'weight'" not in str(error):
                raise
            raise ValueError(
                f"the criterion reads layer.weight, and {layer.name!r} is pruned by units: sum what it makes of their "
                "weights by layer.unit_sums(function of a weight)"
            ) from error
        expected = layer.mask_or_ones.shape
        if not isinstance(scores, Tensor) or not scores.is_floating_point() or scores.shape != expected:
            got = f"{tuple(scores.shape)} of {scores.dtype}" if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(
                f"the criterion returned {got} for {layer.name!r}; it must return a floating tensor of shape "
                f"{tuple(expected)}"
            )
        return scores.detach()
