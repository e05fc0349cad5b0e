"""Score = Frobenius norm of a unit's weights."""

from typing import final

import torch
from torch import Tensor

from emp_callbacks.criteria.base import Criterion
from emp_callbacks.layer import UnitLayer


@final
class WeightNorm(Criterion):
    """Frobenius norm of the weights of a unit (Li et al., arXiv:1608.08710).

    Of a head: its query, key and value rows and its output-projection columns. Of a neuron or channel: its row or
    kernel, without bias. Of an expert: its matrices. Of a KAN node: the spline coefficients of its incoming and
    outgoing edges.
    """

    targets = ("heads", "neurons", "experts", "kan_nodes")

    def score(self, layer: UnitLayer) -> Tensor:
        return layer.unit_sums(
            lambda weight: weight.to(torch.promote_types(weight.dtype, torch.float32)).square()
        ).sqrt()
