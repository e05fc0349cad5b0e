"""A model's outputs on an example, before and after it is shrunk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["difference", "evaluating", "measured", "outputs", "relative"]

_TOLERANCE = 1e-4


def outputs(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], parameters: dict[str, Tensor] | None = None
) -> list[Tensor]:
    """Return the floating-point tensors in what the model gives for the example, with other parameters if given."""
    with nullcontext() if torch.is_grad_enabled() else _asking_for_nothing(model):
        # torch ties parameters by name: of a module with two names it would put the second one's stand-in back.
        held = (
            model(*args, **kwargs)
            if parameters is None
            else functional_call(model, parameters, args, kwargs, tie_weights=False)
        )
    return list(_tensors(held))


def _tensors(held: Any) -> Iterator[Tensor]:
    if isinstance(held, Tensor) and held.is_floating_point():
        yield held
    elif isinstance(held, (Mapping, list, tuple)):
        for value in _apart_from_caches(held) if isinstance(held, Mapping) else held:
            yield from _tensors(value)


def _apart_from_caches(held: Mapping[Any, Any]) -> Iterator[Any]:
    """Yield what a model gives out but the keys and values of its heads, of which fewer are left, for the next call."""
    return (value for name, value in held.items() if name != "past_key_values")


@torch.no_grad()
def measured(run: Callable[[], list[Tensor]]) -> tuple[list[Tensor], int]:
    """Return the outputs of a run and its floating-point operations."""
    with FlopCounterMode(display=False) as counter:
        found = run()
    return found, counter.get_total_flops()


def difference(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Return the largest relative difference of two runs' outputs.

    Raises:
        NotImplementedError: The outputs have other shapes.
        ArithmeticError: They differ by more than rounding.
    """
    worst = 0.0
    for old, new in zip(before, after, strict=True):
        if old.shape != new.shape:
            raise NotImplementedError(
                f"the model's output would shrink from {tuple(old.shape)} to {tuple(new.shape)}; "
                "leave its layer out with exclude"
            )
        found = relative(old, new)
        if not found <= max(_TOLERANCE, 8 * torch.finfo(old.dtype).eps):  # also if it is NaN
            raise ArithmeticError(
                f"the shrunk model's outputs differ by {found:.2g} of the largest output: units in `kept` are not "
                "zero in this model (apply the masks first), or zero units still have an effect (on a norm, a sigmoid)"
            )
        worst = max(worst, found)
    return worst


def relative(old: Tensor, new: Tensor) -> float:
    """Return the largest |difference| of two tensors of one shape, relative to the largest magnitude of the first."""
    return float((old - new).abs().max()) / (float(old.abs().max()) or 1.0)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode for the block."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _asking_for_nothing(model: nn.Module) -> Iterator[None]:
    """Let no parameter ask for a gradient: where none is made, torch's counter of operations fails on one as input."""
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)
