"""The budget of a language model in a folder by its measured loss."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from emp_callbacks.config import EMPConfig
from emp_callbacks.cost.bracket import Bracket, Tried
from emp_callbacks.cost.budget_search import BOUNDS, LOSS_FLOOR, BudgetSearch, check_search, search_result
from emp_callbacks.folders.pruning import FolderReport

__all__ = ["FolderTrials", "smallest_folder_budget"]


class FolderTrials(Protocol):
    """How a budget is tried.

    Attributes:
        place: The folder in which budgets are tried, one after the other; it is removed.
    """

    place: Path

    def prune(self, config: EMPConfig) -> FolderReport:
        """Prune by a configuration into `place`."""

    def loss(self) -> float:
        """Return the loss of the model in `place`, in nats per token."""


def smallest_folder_budget(
    trials: FolderTrials,
    config: EMPConfig,
    dense_loss: float,
    *,
    loss_tolerance: float,
    evaluations: int = 12,
    on_tried: Callable[[Tried], None] = lambda _: None,
) -> BudgetSearch:
    """Return the smallest beta at which pruning a folder costs no more loss than is tolerated, as `smallest_budget`.

    Each budget that is tried is a folder of pruned weights, written and measured.

    Args:
        trials: How one is tried.
        config: What is pruned and how.
        dense_loss: Of the model as it is, in nats per token.
        loss_tolerance: Relative rise of the loss, >= 0.
        evaluations: At most so many are tried.
        on_tried: Called after each.

    Raises:
        ValueError: The tolerance is invalid, or no budget is within it.
    """
    check_search(loss_tolerance, LOSS_FLOOR, BOUNDS, evaluations)
    once, limit = config.once(beta=1.0), dense_loss + loss_tolerance * max(abs(dense_loss), LOSS_FLOOR)
    bracket = Bracket(*BOUNDS, evaluations)
    try:
        while (beta := bracket.next()) is not None:
            shutil.rmtree(trials.place, ignore_errors=True)
            report = trials.prune(once.once(beta=beta))
            masks = json.dumps([row.keep for row in report.rows]).encode()
            if bracket.knows(masks, beta):
                continue
            loss, everything = trials.loss(), all(row.keep == row.n for row in report.rows)
            tried = Tried(beta, report.density, loss, math.isfinite(loss) and loss <= limit, everything)
            bracket.add(masks, tried)
            on_tried(tried)
    finally:
        shutil.rmtree(trials.place, ignore_errors=True)
    told = {"dense_loss": dense_loss, "limit": limit, "loss_tolerance": loss_tolerance, "loss_floor": LOSS_FLOOR}
    found = search_result(bracket, settings=once, **told)
    if found.beta is None:
        raise ValueError(f"no budget is within --tolerance {loss_tolerance:g}: {found.says}")
    return found
