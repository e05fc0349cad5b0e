"""Score = |gamma|."""

from typing import final

import torch
from torch import Tensor

from emp_callbacks.criteria.base import Criterion
from emp_callbacks.layer import Layer, UnitLayer


@final
class BnScale(Criterion):
    """Absolute batch-norm scale of a channel (Liu et al., Network Slimming, arXiv:1708.06519)."""

    targets = ("neurons",)
    zero_scores_zero = True

    def check(self, layer: Layer) -> None:
        if not any(member.role == "scale" for member in getattr(layer, "members", ())):
            raise ValueError(
                f"criterion 'bn_scale' needs a batch norm after every layer, and {layer.name!r} has none; exclude it, "
                "or use criterion 'weight_norm'"
            )

    def score(self, layer: UnitLayer) -> Tensor:
        return layer.unit_sums(torch.abs, lambda member: member.role == "scale")
