"""A function of the user's that a recipe names by where it is: 'module.function'."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any


def function_at(path: str, setting: str) -> Callable[..., Any]:
    """Return what 'module.function' names.

    Args:
        path: Dotted, with at least one dot.
        setting: What it was given for, for the message.

    Raises:
        ValueError: It cannot be imported, or is no function.
    """
    module, _, name = path.rpartition(".")
    try:
        found: Callable[..., Any] = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{setting} {path!r} cannot be imported ({error}); write 'module.function' of an installed module, or one "
            "in the current folder"
        ) from error
    return found
