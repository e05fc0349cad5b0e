"""Score = |sum of w * dL/dw|: what removing a component changes in the loss, to first order."""

from typing import final

from torch import Tensor

from emp_callbacks.criteria.base import Criterion
from emp_callbacks.layer import Layer


@final
class Taylor(Criterion):
    """First-order Taylor importance (Molchanov et al., arXiv:1906.10771; heads: Michel et al., arXiv:1905.10650).

    For a weight |w * dL/dw|. For a head, neuron or node the sum of w * dL/dw over the weights that pruning it zeroes,
    taken absolutely: for a head, whose output-projection columns are zeroed, that sum is h * dL/dh of its output h,
    summed over the batch. Both averaged over the gathered batches; a batch is what one optimizer step sees, on all
    ranks. For a feature |sum over a sample's positions of a * dL/da|, averaged over samples.
    """

    targets = ("weights", "heads", "neurons", "experts", "features", "kan_nodes")
    needs = "gradients"
    zero_scores_zero = True
    certificate = "loss_change"

    def of_batch(self, weight: Tensor, gradient: Tensor) -> Tensor:
        return weight * gradient

    def score(self, layer: Layer) -> Tensor:
        return self.evidence(layer)
