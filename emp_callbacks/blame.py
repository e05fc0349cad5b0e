"""Who raised an error, this package on purpose or a call that went wrong; and whose line a warning is about."""

from __future__ import annotations

import dis
import sys
import warnings

__all__ = ["TRACEBACK", "in_a_line", "raised_by_us", "warn_the_user", "where_raised"]

TRACEBACK = "EMP_TRACEBACK"
"""Environment variable; with 1 the `emp` command shows where an error was raised, whoever can put it right."""

_KINDS = (OSError, ValueError, TypeError, ArithmeticError, NotImplementedError, ImportError)

# What stands between a line of the user's and ours; torch where no_grad decorates one of our methods.
_BETWEEN = {
    "emp_callbacks", "torch", "pytorch_lightning", "lightning", "lightning_fabric", "transformers", "accelerate",
    "deepspeed", "jsonargparse", "contextlib",
}  # fmt: skip


def raised_by_us(error: BaseException) -> bool:
    """Return whether a `raise` of this package made the error, rather than a call in it that went wrong."""
    return isinstance(error, _KINDS) and where_raised(error) == ("emp_callbacks", True)


def in_a_line(error: BaseException) -> str:
    """Return what an error says, and of another's where more is to be seen."""
    text = str(error) if raised_by_us(error) else f"{type(error).__name__}: {error}; {TRACEBACK}=1 shows where"
    return " ".join(text.split())


def where_raised(error: BaseException) -> tuple[str, bool]:
    """Return the package that an error comes from, and whether a `raise` statement there made it."""
    trace = error.__traceback__
    if trace is None:
        return "", False
    while trace.tb_next is not None:
        trace = trace.tb_next
    package = trace.tb_frame.f_globals.get("__name__", "").partition(".")[0]
    return package, trace.tb_frame.f_code.co_code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def warn_the_user(message: str) -> None:
    """Warn at the user's line from which this package, or the host that called it, was called."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _BETWEEN:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
