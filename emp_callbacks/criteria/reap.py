"""Score = mean over an expert's tokens of router weight * l2 norm of its output."""

from typing import final

from torch import Tensor

from emp_callbacks.criteria.base import Criterion
from emp_callbacks.layer import Layer, UnitLayer


@final
class Reap(Criterion):
    """Router-weighted expert activation pruning (Lasby et al., arXiv:2510.13999, eq. 9).

    S_e = mean over the tokens x that the router sends to expert e of g_e(x) * ||f_e(x)||_2, with g_e(x) the weight by
    which its output f_e(x) is multiplied; 0 of an expert that no token of the window reached. What is pruned puts out
    zeros, and so has the score 0 at the next refresh.
    """

    targets = ("experts",)
    needs = "activations"

    def check(self, layer: Layer) -> None:
        if not layer.sites:
            raise ValueError(
                f"criterion 'reap' reads what the experts of {layer.name!r} are called with, as transformers 5 calls "
                "them (tokens, chosen experts, their weights), and these are called otherwise; use criterion "
                "'weight_norm' or 'taylor', or exclude it"
            )

    def score(self, layer: UnitLayer) -> Tensor:
        return self.evidence(layer)
