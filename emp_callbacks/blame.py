"""Who raised an error: this package on purpose, or a call in it, or in another package, that went wrong."""

from __future__ import annotations

import dis

__all__ = ["raised_by_us", "where_raised"]

_KINDS = (OSError, ValueError, TypeError, ArithmeticError, NotImplementedError, ImportError)


def raised_by_us(error: BaseException) -> bool:
    """Return whether a `raise` of this package made the error, rather than a call in it that went wrong."""
    return isinstance(error, _KINDS) and where_raised(error) == ("emp_callbacks", True)


def where_raised(error: BaseException) -> tuple[str, bool]:
    """Return the package that an error comes from, and whether a `raise` statement there made it."""
    trace = error.__traceback__
    if trace is None:
        return "", False
    while trace.tb_next is not None:
        trace = trace.tb_next
    package = trace.tb_frame.f_globals.get("__name__", "").partition(".")[0]
    return package, trace.tb_frame.f_code.co_code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"]
