"""Score = max(mean |incoming|, mean |outgoing|) of a KAN node's spline coefficients."""

from typing import final

import torch
from torch import Tensor

from emp_callbacks.criteria.base import Criterion
from emp_callbacks.layer import Member, UnitLayer


@final
class Spline(Criterion):
    """A KAN node's larger mean absolute spline coefficient, over incoming or over outgoing edges.

    Source: arXiv:2509.25606, KAN nodes; Liu et al., arXiv:2404.19756, section 2.5.1, scores nodes by the larger edge.
    """

    targets = ("kan_nodes",)

    def score(self, layer: UnitLayer) -> Tensor:
        return torch.maximum(_mean_size(layer, "input"), _mean_size(layer, "output"))


def _mean_size(layer: UnitLayer, role: str) -> Tensor:
    def chosen(member: Member) -> bool:
        return member.scored and member.role == role

    return layer.unit_sums(torch.abs, chosen) / layer.unit_sizes(chosen)
