"""Scores of attention edges: a query's keys compete before the softmax."""

from __future__ import annotations

from typing import Any, final

from torch import Tensor

from emp_callbacks.criteria.base import Criterion


class _EdgeCriterion(Criterion):
    """Scored where attention is computed, in every forward pass; see `targets.attention_edges`."""

    targets = ("attention_edges",)
    needs = "activations"

    def score(self, layer: Any) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} scores edges while attention is computed")


@final
class AttentionWeight(_EdgeCriterion):
    """The softmax weight of a key: N_eff of a row is then the effective number of keys that a query reads."""


@final
class AttentionLogit(_EdgeCriterion):
    """The logit of a key above the lowest of its row's allowed keys.

    Logits have both signs and no zero of their own, so they are shifted, not taken absolutely.
    """

    signed = "shift"


EDGE_SCORES: dict[type[Criterion], str] = {AttentionWeight: "weight", AttentionLogit: "logit"}
"""Criterion -> what `edge_sites` calls it."""
