"""Which errors are the user's to put right, and so one line; anything else keeps its traceback."""

from __future__ import annotations

import os

from emp_callbacks.blame import TRACEBACK, raised_by_us, where_raised

__all__ = ["for_the_user"]

_LIGHTNING = ("pytorch_lightning", "lightning_fabric", "lightning")


def for_the_user(error: BaseException) -> str | None:
    """Return the message of an error about what the user gave: a file, or a value our own checks refused.

    An error that a call in this package went into, a KeyError say, is a fault of ours. One of a model in training is
    its author's to mend, who needs to see where.
    """
    if os.environ.get(TRACEBACK, "0") != "0":
        return None
    if isinstance(error, OSError) and error.strerror:  # of the system: a file, a full disk
        return f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    return str(error) if raised_by_us(error) or _refused_by_lightning(error) else None


def _refused_by_lightning(error: BaseException) -> bool:
    """Whether Lightning says that it cannot run a recipe so."""
    package, on_purpose = where_raised(error)
    return on_purpose and package in _LIGHTNING and not isinstance(error, RuntimeError)
