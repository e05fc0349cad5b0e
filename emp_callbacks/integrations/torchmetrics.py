"""N_eff as a torchmetrics metric, for anybody's scores."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from emp_callbacks.core.effective_number import ScoreMoments, check_scores, effective_numbers, score_moments
from emp_callbacks.extras import needs

needs("EffectiveNumber", "lightning", "torchmetrics")

from torchmetrics import Metric  # noqa: E402  (the line above says what is missing)


class EffectiveNumber(Metric):
    """N_eff = (sum |s|)^2 / sum s^2 of all scores seen, over batches and ranks.

    States are the two sums (float64), so batches and ranks add; nothing is gathered.

    Raises:
        FloatingPointError: In `update`, if a score is NaN or Inf; the sums stay as they were.

    Source: arXiv:2509.25606.

    Examples:
        >>> metric = EffectiveNumber()
        >>> metric.update(torch.tensor([3.0, 3.0]))
        >>> metric.update(torch.tensor([0.0, 0.0]))
        >>> metric.compute()
        tensor(2., dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    moments: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("moments", default=torch.zeros(3, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, scores: Tensor) -> None:
        """Add scores of any shape and floating dtype."""
        check_scores(scores)
        new = score_moments(scores.detach().reshape(1, -1)).stack()[0]
        if not bool(torch.isfinite(new).all()):
            raise FloatingPointError(
                f"{int((~torch.isfinite(scores)).sum())} of {scores.numel()} scores are NaN or Inf"
            )
        self.moments = self.moments + new.to(self.moments.device)

    def compute(self) -> Tensor:
        """Return N_eff, a 0-dim float64 tensor, in components; 0 if every score was 0."""
        return effective_numbers(ScoreMoments.unstack(self.moments[None]))[0]
