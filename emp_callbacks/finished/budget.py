"""`emp prune --tolerance`: the budget of a finished model by its measured loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from emp_callbacks.cost.budget_search import BudgetSearch, Tried, smallest_budget
from emp_callbacks.cost.training_loss import training_loss
from emp_callbacks.terminal import FittedTable

if TYPE_CHECKING:
    from emp_callbacks.config import EMPConfig
    from emp_callbacks.study.recipe.parts import RecipeParts

__all__ = ["EVALUATIONS", "budget_table", "find_budget"]

EVALUATIONS = 12


def find_budget(
    recipe: RecipeParts,
    config: EMPConfig,
    batches: Sequence[Any],
    loss_tolerance: float,
    on_tried: Callable[[Tried], None] | None = None,
) -> BudgetSearch:
    """Return the smallest budget whose loss, that of the recipe's training step, stays within the tolerance.

    Args:
        recipe: Its module holds the weights of the finished model.
        config: What is pruned and how.
        batches: As the training step takes them.
        loss_tolerance: Relative rise of the loss, >= 0.
        on_tried: Called after each evaluation, of EVALUATIONS at most.

    Raises:
        ValueError: The tolerance is invalid, or no budget is within it.
    """
    found = smallest_budget(
        recipe.module,
        list(enumerate(batches)),
        lambda module, pair: training_loss(module, pair[1], pair[0]),
        loss_tolerance=loss_tolerance,
        evaluations=EVALUATIONS,
        on_tried=on_tried,
        config=config,
    )
    if found.beta is None:
        raise ValueError(f"no budget is within --tolerance {loss_tolerance:g}: {found.says}")
    return found


def budget_table(found: BudgetSearch) -> FittedTable:
    """Return the budgets that were measured for a terminal, by rising beta."""
    title = f"loss {found.dense_loss:.6g} dense, tolerated up to {found.limit:.6g} ({found.loss_tolerance:+.2%})"
    table = FittedTable(title)
    for heading in ("beta", "density", "loss", "change"):
        table.add_column(heading)
    table.add_column("", words=True)
    for one in found.tried:
        change = (one.loss - found.dense_loss) / max(abs(found.dense_loss), found.loss_floor)
        verdict = "chosen" if one.beta == found.beta else "within" if one.within else "beyond"
        table.add_row(f"{one.beta:.4g}", f"{one.density:.3f}", f"{one.loss:.6g}", f"{change:+.2%}", verdict)
    return table
