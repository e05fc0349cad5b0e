"""Which errors are the user's to put right, and so one line; anything else keeps its traceback."""

from __future__ import annotations

import dis

__all__ = ["for_the_user"]


def for_the_user(error: BaseException | None) -> str | None:
    """Return the message of an error about what the user gave: a file, or a value our own checks refused."""
    if error is None:
        return None
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    # Lightning has a word for a recipe that it cannot run.
    if _raised_by_us(error) or type(error).__name__ == "MisconfigurationException":
        return str(error)
    if _where_raised(error)[0] == "jsonargparse":  # it wraps what a class in the recipe said
        return for_the_user(error.__cause__)
    return None


def _raised_by_us(error: BaseException) -> bool:
    """Return whether a `raise` of this package made the error, rather than a call in it that went wrong."""
    kinds = (OSError, ValueError, TypeError, ArithmeticError, NotImplementedError, ImportError)
    return isinstance(error, kinds) and _where_raised(error) == ("emp_callbacks", True)


def _where_raised(error: BaseException) -> tuple[str, bool]:
    """Return the package that an error comes from, and whether a `raise` statement there made it."""
    trace = error.__traceback__
    if trace is None:
        return "", False
    while trace.tb_next is not None:
        trace = trace.tb_next
    package = trace.tb_frame.f_globals.get("__name__", "").partition(".")[0]
    return package, trace.tb_frame.f_code.co_code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"]
