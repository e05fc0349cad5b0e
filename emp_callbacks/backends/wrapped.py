"""A method of one object with something around it: for hosts that offer no hook."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import suppress
from typing import Any, final


@final
class Wrapped:
    """A method of one object with something around it, until `remove()`.

    It stands in for the bound method: LR schedulers that wrap `optimizer.step` in turn, and copies and pickles of the
    object, find what they expect.

    Args:
        owner: The object; its class is not touched.
        name: Name of the method.
        around: Called instead, with the method it stands for and the caller's arguments.
    """

    def __init__(self, owner: Any, name: str, around: Callable[..., Any]) -> None:
        inner = getattr(owner, name)
        # First, as it copies all attributes of what it wraps, another Wrapped's too: among them the mark by which an
        # LR scheduler knows its own wrapper.
        functools.update_wrapper(self, inner)
        del self.__dict__["__wrapped__"]
        with suppress(TypeError, ValueError):  # of a method in C
            self.__signature__ = inspect.signature(inner)
        self._owner, self._name, self._around = owner, name, around
        self._was_on_instance = name in vars(owner)
        self._inner, self._removed = inner, False
        setattr(owner, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._inner(*args, **kwargs) if self._removed else self._around(self._inner, *args, **kwargs)

    @property
    def __func__(self) -> Callable[..., Any]:
        """What a bound method has: the same, given the object first."""

        def method(owner: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ARG001
            return self(*args, **kwargs)

        return functools.update_wrapper(method, self)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._owner, self._name)  # a copy of the object has its class's own method

    def remove(self) -> None:
        """Put the method back; under another wrapper, only step aside."""
        self._removed = True
        if vars(self._owner).get(self._name) is not self:
            return
        if self._was_on_instance:
            setattr(self._owner, self._name, self._inner)
        else:
            delattr(self._owner, self._name)
