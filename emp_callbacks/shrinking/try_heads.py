"""Attentions that are cut only if the model runs without their pruned heads, with the same outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from emp_callbacks.shrinking.example_run import difference
from emp_callbacks.shrinking.heads import cut_heads
from emp_callbacks.shrinking.report import ShrunkLayer
from emp_callbacks.shrinking.surgery import Surgery, perform, snapshot
from emp_callbacks.targets.units import UnitTarget

__all__ = ["cut_heads_that_fit"]


def cut_heads_that_fit(
    model: nn.Module,
    attentions: Sequence[tuple[UnitTarget, Tensor]],
    cuttable: set[nn.Module],
    run: Callable[[], list[Tensor]],
    before: Sequence[Tensor],
    surgery: Surgery,
) -> list[ShrunkLayer]:
    """Add to `surgery` the heads that can go, and return what becomes of each attention.

    All are tried at once and, if that does not work, one after the other.

    Args:
        model: The masked model.
        attentions: Each with its pruned heads, bool, shape (heads,).
        cuttable: Modules that can be cut.
        run: Calls the model on the example.
        before: Its outputs.
        surgery: Is changed.
    """
    layers = [cut_heads(model, target, pruned, cuttable, surgery) for target, pruned in attentions]
    if not surgery or not _why_not(model, surgery, run, before):
        return layers
    surgery.clear()
    for i, (target, pruned) in enumerate(attentions):
        with_it = {name: dict(axes) for name, axes in surgery.items()}
        layers[i] = cut_heads(model, target, pruned, cuttable, with_it)
        if layers[i].removed and (why := _why_not(model, with_it, run, before)):
            layers[i] = layers[i]._replace(removed=0, reason=why)
        elif layers[i].removed:
            surgery.update(with_it)
    return layers


@torch.no_grad()
def _why_not(model: nn.Module, surgery: Surgery, run: Callable[[], list[Tensor]], before: Sequence[Tensor]) -> str:
    """Return why the model cannot be cut so, "" if it can; it is left as it was."""
    undo = snapshot(model, surgery)
    try:
        perform(model, surgery)
        difference(before, run())
    except ArithmeticError:
        return "without its zeros the outputs would change: its heads depend on each other"
    except Exception as error:  # whatever a forward pass raises that takes all heads for granted
        return f"the model does not run without them ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    finally:
        undo()
    return ""
