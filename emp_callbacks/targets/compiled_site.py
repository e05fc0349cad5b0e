"""What a site does beside the model's own arithmetic, as operators that torch.compile leaves whole in its graphs.

Statistics are kept in Python and choices are made by a rule written in Python. Traced, both would break graphs apart;
as operators they are called each time the compiled code runs, and nothing about them is compiled.
"""

from __future__ import annotations

from itertools import count
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor


class Watcher(Protocol):
    """What the operators call."""

    def see_forward(self, activation: Tensor) -> None:
        """Gather what statistics need of an activation."""

    def see_gradient(self, activation: Tensor, gradient: Tensor) -> None:
        """Gather what statistics need of an activation and the gradient of the output made of it."""

    def choose(self, scores: Tensor) -> Tensor:
        """Return what is kept, shape of `scores`, bool."""


# Operators take no objects, and torch.compile would compile once more for each number: hence numbers in tensors.
_WATCHERS: WeakValueDictionary[int, Watcher] = WeakValueDictionary()
_NUMBERS = count()
# A CUDA graph replays kernels and would not come back to Python.
_TAGS: dict[str, Any] = {"tags": (torch.Tag.cudagraph_unsafe,)} if hasattr(torch.Tag, "cudagraph_unsafe") else {}


def number_of(watcher: Watcher) -> Tensor:
    """Return a new number, shape (), int64, on the CPU, under which operators find the watcher as long as it lives."""
    number = next(_NUMBERS)
    _WATCHERS[number] = watcher
    return torch.tensor(number, device="cpu")


@torch.library.custom_op("emp_callbacks::watch", mutates_args=(), **_TAGS)
def watch(output: Tensor, activation: Tensor, number: Tensor, gradient: bool) -> Tensor:
    """Return a copy of `output` and show the activation, or later the gradient of the copy, to a watcher."""
    if not gradient:
        _WATCHERS[int(number)].see_forward(activation)
    return output.clone()


@torch.library.custom_op("emp_callbacks::watch_gradient", mutates_args=(), **_TAGS)
def _watch_gradient(gradient: Tensor, activation: Tensor, number: Tensor) -> Tensor:
    _WATCHERS[int(number)].see_gradient(activation, gradient)
    return gradient.clone()


@torch.library.custom_op("emp_callbacks::choose", mutates_args=(), **_TAGS)
def choose(scores: Tensor, number: Tensor) -> Tensor:
    """Return a watcher's choice."""
    return _WATCHERS[int(number)].choose(scores)


@watch.register_fake
def _(output: Tensor, activation: Tensor, number: Tensor, gradient: bool) -> Tensor:  # noqa: ARG001
    return torch.empty_like(output)


@_watch_gradient.register_fake
def _(gradient: Tensor, activation: Tensor, number: Tensor) -> Tensor:  # noqa: ARG001
    return torch.empty_like(gradient)


@choose.register_fake
def _(scores: Tensor, number: Tensor) -> Tensor:  # noqa: ARG001
    return torch.empty_like(scores, dtype=torch.bool)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    _, activation, number, ctx.gradient = inputs
    if ctx.gradient:
        ctx.save_for_backward(activation, number)


def _show(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
    shown = _watch_gradient(gradient, *ctx.saved_tensors) if ctx.gradient else gradient
    return shown, None, None, None


watch.register_autograd(_show, setup_context=_remember)
