"""`shrink`: pruned heads, neurons and channels out of a model, with all that depends on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from emp_callbacks.shrinking.channels import cut_channels
from emp_callbacks.shrinking.example_run import difference, evaluating, measured, outputs
from emp_callbacks.shrinking.report import ShrinkReport, ShrunkLayer
from emp_callbacks.shrinking.surgery import Surgery, cuttable_modules, perform, snapshot
from emp_callbacks.shrinking.try_heads import cut_heads_that_fit
from emp_callbacks.shrinking.units import unit_layer
from emp_callbacks.targets import adapted_weights

__all__ = ["shrink"]


def shrink(
    model: nn.Module,
    kept: Mapping[str, Tensor],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> ShrinkReport:
    """Remove pruned heads, neurons and channels from a masked model, in place, with all that depends on them.

    The parameters become new, smaller ones: an optimizer has to be made anew.

    Args:
        model: A plain model whose pruned units are zero, as a pruner leaves them; not sharded.
        kept: Module name -> bool, shape (units,), True = kept: `pruner.masks`, or `pruned_units(model)`.
        args: Positional arguments of an example call, on the model's device; the outputs before and after are
            compared on it.
        kwargs: Keyword arguments of the example call.

    Returns:
        What was removed and what had to stay, parameter counts and FLOPs, and the largest difference.

    Raises:
        ImportError: Neurons are to be removed and torch-pruning is not installed.
        ValueError: `kept` names no such layer, or has another number of units.
        NotImplementedError: Adapters of PEFT, or the shrunk model does not run; the model is as it was.
        ArithmeticError: The outputs changed by more than 1e-4 (relative; 8 units of rounding in half precision): the
            model was not masked, or its zeros become something else on their way. The model is as it was.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> with torch.no_grad():
        ...     model[0].weight[1] = 0
        ...     model[0].bias[1] = 0
        >>> shrink(model, {"0": torch.tensor([True, False, True])}, (torch.ones(1, 2),)).parameters
        (13, 9)
        >>> model[2].in_features
        2
    """
    run = partial(outputs, model, tuple(args), dict(kwargs or {}))
    with evaluating(model):
        before, flops_before = measured(run)
        parameters_before = _parameter_count(model)
        surgery, layers = _plan(model, kept, run, before)
        undo = snapshot(model, surgery)
        try:
            perform(model, surgery)
            after, flops_after = _run_shrunk(run)
            worst = difference(before, after)
        except Exception:
            undo()
            raise
    return ShrinkReport(
        layers=tuple(layers),
        surgery=surgery,
        parameters=(parameters_before, _parameter_count(model)),
        flops=(flops_before, flops_after),
        difference=worst,
    )


def _plan(
    model: nn.Module, kept: Mapping[str, Tensor], run: Callable[..., Any], before: Sequence[Tensor]
) -> tuple[Surgery, list[ShrunkLayer]]:
    """Return what to cut off every module, and what that means for each layer in `kept` with pruned units."""
    if adapted_weights(model):
        raise NotImplementedError(
            "a model with adapters of PEFT cannot be shrunk: merge them first, model = model.merge_and_unload(), and "
            "mask what comes of it, pruner.mask(model)"
        )
    surgery: Surgery = {}
    attentions, channels = [], []
    cuttable = cuttable_modules(model)
    for name, mask in kept.items():
        if mask.all():
            continue
        target, pruned = unit_layer(model, name), ~mask.cpu()
        if len(pruned) != target.units:
            raise ValueError(
                f"the mask of {name!r} is for {len(pruned)} units, the layer has {target.units}; "
                "pass its own pruner.masks"
            )
        if any(member.role == "output" for member in target.members):
            attentions.append((target, pruned))
        else:
            channels.append((target, pruned))
    layers = cut_heads_that_fit(model, attentions, cuttable, run, before, surgery)
    if channels:
        layers += cut_channels(model, channels, cuttable, run, surgery)
    return surgery, layers


def _run_shrunk(run: Callable[[], list[Tensor]]) -> tuple[list[Tensor], int]:
    try:
        return measured(run)
    except Exception as error:
        raise NotImplementedError(
            f"the shrunk model does not run ({' '.join(str(error).split())[:300]}); "
            "leave the layers concerned out with exclude, or export without --shrink"
        ) from error


def _parameter_count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
