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

    def see_forward(self, activation: Tensor, positions: Tensor | None) -> None:
        """Gather what statistics need of an activation; of the positions that count, shape (B, T), None: of all."""

    def see_gradient(self, activation: Tensor, gradient: Tensor, positions: Tensor | None) -> None:
        """Gather what statistics need of an activation and the gradient of the output made of it."""

    def choose(self, scores: Tensor, noise: Tensor | None) -> Tensor:
        """Return what is kept, shape of `scores`, bool: the highest, or with noise what it draws (`choose_rows`)."""


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


def let_compiled_code_see_hooks() -> None:
    """Make compiled code fit a module's hooks, also where they come and go, or a twin of its class has none.

    By default torch.compile takes it for granted that a module which had no hooks gets none, so code that was compiled
    before is run without them, and shared by all instances. From the first call on in a process it checks; what was
    compiled without that check is dropped and compiled again at its next call.
    """
    from torch._dynamo import config  # slow to import; whoever has made an optimizer has done so

    if config.skip_nnmodule_hook_guards:
        config.skip_nnmodule_hook_guards = False
        torch.compiler.reset()


@torch.library.custom_op("emp_callbacks::watch", mutates_args=(), **_TAGS)
def watch(output: Tensor, activation: Tensor, positions: Tensor | None, number: Tensor, gradient: bool) -> Tensor:
    """Return a copy of `output` and show the activation, or later the gradient of the copy, to a watcher."""
    if not gradient:
        _WATCHERS[int(number)].see_forward(activation, positions)
    return output.clone()


@torch.library.custom_op("emp_callbacks::watch_gradient", mutates_args=(), **_TAGS)
def _watch_gradient(gradient: Tensor, activation: Tensor, positions: Tensor | None, number: Tensor) -> Tensor:
    _WATCHERS[int(number)].see_gradient(activation, gradient, positions)
    return gradient.clone()


@torch.library.custom_op("emp_callbacks::choose", mutates_args=(), **_TAGS)
def choose(scores: Tensor, noise: Tensor | None, number: Tensor) -> Tensor:
    """Return a watcher's choice; the noise is an argument, so that whoever replays the graph can replay its noise."""
    return _WATCHERS[int(number)].choose(scores, noise)


@watch.register_fake
def _(
    output: Tensor,
    activation: Tensor,  # noqa: ARG001
    positions: Tensor | None,  # noqa: ARG001
    number: Tensor,  # noqa: ARG001
    gradient: bool,  # noqa: ARG001
) -> Tensor:
    return torch.empty_like(output)


@_watch_gradient.register_fake
def _(gradient: Tensor, activation: Tensor, positions: Tensor | None, number: Tensor) -> Tensor:  # noqa: ARG001
    return torch.empty_like(gradient)


@choose.register_fake
def _(scores: Tensor, noise: Tensor | None, number: Tensor) -> Tensor:  # noqa: ARG001
    return torch.empty_like(scores, dtype=torch.bool)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    _, activation, positions, number, ctx.gradient = inputs
    if ctx.gradient:  # with the positions of this forward: another batch may come before its backward
        ctx.save_for_backward(activation, positions, number)


def _show(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
    shown = _watch_gradient(gradient, *ctx.saved_tensors) if ctx.gradient else gradient
    return shown, None, None, None, None


watch.register_autograd(_show, setup_context=_remember)
