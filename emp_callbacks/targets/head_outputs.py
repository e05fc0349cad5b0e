"""What the heads of an attention hand to its output projection, on its way there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.modules.conv import _ConvNd
from torch.utils.hooks import RemovableHandle

from emp_callbacks.core.kernels.tables import to_device
from emp_callbacks.targets.intercept import Intercept, Interception

Change = Callable[[Tensor], Tensor | None]
"""Takes what the heads hand on, returns what is to be handed on instead; None: the same."""


@dataclass(frozen=True, eq=False)
class HeadOutputs:
    """The input of an attention's output projection: one slice of neighbours, or one stride, for each head.

    Attributes:
        name: Name of the attention in the user's model, without what wrappers added.
        module: The attention.
        projection: Its output projection.
        unit_of: Head of each input of the projection, shape (C,), int64, on the CPU; with grouped queries a key/value
            head and all query heads that read it.
        units: Number of heads.
        is_called: Whether the attention calls the projection; nn.MultiheadAttention only reads its weight.
        in_blocks: Whether each head's inputs of the projection are neighbours, head after head.
    """

    name: str
    module: nn.Module
    projection: nn.Module
    unit_of: Tensor
    units: int
    is_called: bool
    in_blocks: bool = field(init=False, repr=False)
    _there: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "in_blocks", bool((self.unit_of.diff() >= 0).all()))

    def channels(self, ndim: int) -> int:
        """Return the dimension of what is handed on that counts the projection's inputs: of images 1, else the last."""
        return 1 if isinstance(self.projection, _ConvNd) and ndim > 2 else ndim - 1

    def spread(self, per_head: Tensor, like: Tensor) -> Tensor:
        """Return a number for each head in a shape that broadcasts over what is handed on.

        Args:
            per_head: Shape (units,); or with one number per position, too, (..., units), `like` with heads for
                channels, where channels are the last dimension.
            like: What is handed on.
        """
        spread = per_head[..., self.unit_on(per_head.device)]
        channels = self.channels(like.ndim)
        return spread if channels == like.ndim - 1 else spread.view(-1, *[1] * (like.ndim - 1 - channels))

    def unit_on(self, device: torch.device) -> Tensor:
        """Return `unit_of` on a device, where it stays: a graph that is compiled or recorded must not make it."""
        if device not in self._there:
            unit_of = to_device(self.unit_of, device)
            if torch.compiler.is_compiling():
                return unit_of
            self._there[device] = unit_of
        return self._there[device]

    def register(self, change: Change) -> list[RemovableHandle]:
        """Let every forward of the attention hand on what `change` returns, until the handles are removed.

        `change` takes what the heads hand on: floating, channels as `channels` says; a nested tensor as it is. It is
        called in autograd, and by compiled code traced.
        """
        self.unit_on(next(self.projection.parameters()).device)
        if self.is_called:
            return [self.projection.register_forward_pre_hook(_BeforeProjection(change).enter)]
        site = _InsideMultihead(change)
        return [
            self.module.register_forward_pre_hook(site.enter, with_kwargs=True),
            self.module.register_forward_hook(site.leave, always_call=True),
        ]


class _BeforeProjection:
    """A hook on an output projection, of which a copy of the model gets its own."""

    def __init__(self, change: Change) -> None:
        self._change = change

    def enter(self, module: nn.Module, args: Any) -> Any:  # noqa: ARG002
        changed = self._change(args[0]) if args else None  # named arguments do not come by here
        return None if changed is None else (changed, *args[1:])


class _InsideMultihead:
    """Hooks on an nn.MultiheadAttention, whose one function calls `linear` only to project its heads."""

    def __init__(self, change: Change) -> None:
        self._change = change
        self._interception = Interception()

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> Any:  # noqa: ARG002
        return self._interception.begin(Intercept({"linear": self._project}, anywhere=False), args, kwargs)

    def leave(self, module: nn.Module, args: Any, output: Any) -> Any:  # noqa: ARG002
        ended, changed = self._interception.end(output)
        if ended is not None and output is not None and not ended.calls:
            raise RuntimeError(
                f"a {type(module).__name__} ran without torch's multi_head_attention_forward, so that its heads cannot "
                "be reached: exclude it"
            )
        return changed

    def _project(self, values: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        changed = self._change(values)
        return F.linear(values if changed is None else changed, weight, bias)
