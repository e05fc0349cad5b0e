"""The largest cut after which a model runs and gives what it gave."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from emp_callbacks.shrinking.example_run import difference, measured, relative
from emp_callbacks.shrinking.experts import past_removed_experts
from emp_callbacks.shrinking.report import ShrunkLayer
from emp_callbacks.shrinking.surgery import Surgery, perform, snapshot

__all__ = ["Fit", "Planned", "largest_fit"]


class Planned(NamedTuple):
    """A cut, and what becomes of each layer."""

    surgery: Surgery
    layers: dict[str, ShrunkLayer]


class Fit(NamedTuple):
    """A cut with which the model runs.

    Attributes:
        surgery: The cut.
        layers: What becomes of each layer.
        flops: Floating-point operations.
        difference: Of the outputs, relative to the largest.
        rerouted: What it changes of the outputs that tokens of removed experts go to others, relative to the largest.
    """

    surgery: Surgery
    layers: dict[str, ShrunkLayer]
    flops: int
    difference: float
    rerouted: float = 0.0


def largest_fit(
    model: nn.Module,
    names: Sequence[str],
    plan: Callable[[Sequence[str]], Planned],
    run: Callable[[], list[Tensor]],
    before: Sequence[Tensor],
) -> tuple[Fit, dict[str, str]]:
    """Return a cut after which the model runs and gives the same outputs; the model itself is left as it is.

    All layers are tried together; where that fails, halves of them, so that those alone are left out with which the
    model fails.

    Args:
        model: The model.
        names: Layers with pruned units.
        plan: Gives the cut of some of them.
        run: Calls the model on the example.
        before: Its outputs.

    Returns:
        The cut, and layer -> why it was left out.

    Raises:
        ArithmeticError: The model gives other outputs each time that it runs.
    """
    errors: dict[str, str] = {}
    try:
        fit = _tried(model, plan([]), run, before)
    except ArithmeticError as error:
        raise ArithmeticError(
            "the model gives other outputs each time that it runs: make it repeatable (dropout, a seed)"
        ) from error
    waiting = [list(names)] if names else []
    while waiting:
        more = waiting.pop()
        try:
            fit = _tried(model, plan([*fit.layers, *more]), run, before)
        except Exception as error:
            if len(more) == 1:
                errors[more[0]] = _told(error)
            else:
                middle = len(more) // 2
                waiting += [more[middle:], more[:middle]]
    return fit, errors


def _tried(model: nn.Module, planned: Planned, run: Callable[[], list[Tensor]], before: Sequence[Tensor]) -> Fit:
    rerouted = 0.0
    if any("experts" in axes for axes in planned.surgery.values()):
        masked = before
        with past_removed_experts(model, planned.surgery):
            before = measured(run)[0]
        rerouted = max(map(relative, masked, before), default=0.0)
    undo = snapshot(model, planned.surgery)
    try:
        perform(model, planned.surgery)
        after, flops = measured(run)
        return Fit(*planned, flops, difference(before, after), rerouted)
    finally:
        undo()


def _told(error: Exception) -> str:
    text = " ".join(str(error).split())[:200]
    if isinstance(error, ArithmeticError):
        return f"without its zeros {text}"
    if isinstance(error, NotImplementedError):
        return text
    return f"the forward pass needs them ({type(error).__name__}: {text})"
