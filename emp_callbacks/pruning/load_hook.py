"""A word after the model's `load_state_dict`, left behind in no copy of the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final
from weakref import WeakMethod


@final
class LoadHook:
    """A hook of `register_load_state_dict_post_hook`; copies and pickles of the module hold one that does nothing.

    Args:
        act: A bound method, called after each load while its object lives; None: nothing is.
    """

    def __init__(self, act: Callable[[], None] | None = None) -> None:
        self._act = None if act is None else WeakMethod(act)

    def __call__(self, module: Any, incompatible_keys: Any) -> None:  # noqa: ARG002
        act = None if self._act is None else self._act()
        if act is not None:
            act()

    def __reduce__(self) -> tuple[type[LoadHook], tuple[()]]:
        return LoadHook, ()
