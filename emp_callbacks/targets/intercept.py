"""Functions of torch.nn.functional that a module calls inside its forward, with others in their place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode


class Intercept(TorchFunctionMode):
    """Hands calls of some functions of torch.nn.functional to others, and counts them.

    Args:
        inside_multihead: Name of a function that nn.MultiheadAttention's own function calls -> what is called instead.
        anywhere: Whether it is called instead wherever else such a function is called, too.
    """

    def __init__(self, inside_multihead: Mapping[str, Callable[..., Tensor]], *, anywhere: bool) -> None:
        super().__init__()
        self.calls = 0
        self._over = False
        self._inside = {name: self._counting(stand_in) for name, stand_in in inside_multihead.items()}
        self._direct = {getattr(F, name): stand_in for name, stand_in in self._inside.items()} if anywhere else {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._over:
            return func(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            return _reading(func, self._inside)(*args, **kwargs)
        return self._direct.get(func, func)(*args, **kwargs)

    def leave(self) -> None:
        """Stop intercepting; leave the stack of modes unless a mode that an interrupt left behind lies above."""
        self._over = True
        if torch.overrides._get_current_function_mode() is self:  # type: ignore[no-untyped-call]
            self.__exit__(None, None, None)

    def _counting(self, stand_in: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def counted(*args: Any, **kwargs: Any) -> Tensor:
            self.calls += 1
            return stand_in(*args, **kwargs)

        return counted


def _reading(function: Any, names: Mapping[str, Any]) -> FunctionType:
    """Return the function with other things behind some global names that it reads.

    torch calls the attention inside nn.MultiheadAttention while it already handles that module's own function, where
    no mode is asked.
    """
    copy = FunctionType(function.__code__, {**function.__globals__, **names}, function.__name__, function.__defaults__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


class Interception:
    """What is intercepted while one attention runs, which then sees padded samples where it is given nested ones."""

    def __init__(self) -> None:
        self._running: Intercept | None = None
        self._lengths: list[int] | None = None  # of the samples of a nested tensor

    def begin(self, intercept: Intercept, args: Any, kwargs: Any) -> Any:
        """Intercept from now on; return what a forward pre-hook returns that was given these arguments."""
        self.abandon()
        padded = _padded(args, kwargs)
        self._lengths = None if padded is None else [len(sample) for sample in args[0].unbind()]
        self._running = intercept
        intercept.__enter__()  # type: ignore[no-untyped-call]
        return padded

    def abandon(self) -> Intercept | None:
        """End what is under way, if it is: a forward that was interrupted from the keyboard runs no hooks."""
        ended, self._running = self._running, None
        if ended is not None:
            ended.leave()
        return ended

    def end(self, output: Any) -> tuple[Intercept | None, Any]:
        """Return what was intercepted, and what a forward hook returns that was given this output."""
        ended, lengths = self.abandon(), self._lengths
        self._lengths = None
        if lengths is None or output is None:
            return ended, None
        samples = [sample[:length] for sample, length in zip(output[0], lengths, strict=True)]
        return ended, (torch.nested.as_nested_tensor(samples), *output[1:])


def _padded(args: Any, kwargs: Any) -> Any:
    """Return the arguments of a self-attention of a nested tensor for one of padded samples; None of any other.

    nn.TransformerEncoder makes nested tensors in evaluation, and nn.MultiheadAttention takes them on a path only that
    runs no torch function which could be intercepted.
    """
    if len(args) < 3 or not isinstance(args[0], Tensor) or not args[0].is_nested:
        return None
    nested = args[0]
    padded = nested.to_padded_tensor(0.0)
    lengths = torch.tensor([len(sample) for sample in nested.unbind()], device=padded.device)
    beyond = torch.arange(padded.shape[1], device=padded.device) >= lengths[:, None]
    plain = tuple(padded if arg is nested else arg for arg in args)
    return plain, {**kwargs, "key_padding_mask": beyond}
