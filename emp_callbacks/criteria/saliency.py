"""Score = mean |dL/dw|."""

from typing import final

from torch import Tensor

from emp_callbacks.criteria.base import Criterion
from emp_callbacks.layer import Layer, UnitLayer


@final
class Saliency(Criterion):
    """Absolute gradient, averaged over the gathered batches (Simonyan et al., arXiv:1312.6034, on weights).

    For a head, neuron or node: averaged over the weights that pruning it zeroes as well. For a feature: |dL/da|
    averaged over samples and positions.
    """

    targets = ("weights", "heads", "neurons", "experts", "features", "kan_nodes")
    needs = "gradients"

    def of_batch(self, weight: Tensor, gradient: Tensor) -> Tensor:  # noqa: ARG002
        return gradient.abs()

    def score(self, layer: Layer) -> Tensor:
        found = self.evidence(layer)
        return found / layer.unit_sizes(lambda member: member.masked) if isinstance(layer, UnitLayer) else found
