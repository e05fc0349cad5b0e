"""Warnings, and the word at the start, as a command shows them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from emp_callbacks.terminal import printable

__all__ = ["warnings_in_lines"]


@contextmanager
def warnings_in_lines() -> Iterator[None]:
    """Show each warning as one line that steers no terminal, without the code that gave it."""

    def line(message: Warning | str, *_: object, **__: object) -> str:
        return f"emp: warning: {printable(' '.join(str(message).split()))}\n"

    before, warnings.formatwarning = warnings.formatwarning, line
    try:
        yield
    finally:
        if warnings.formatwarning is line:  # Lightning has its own from then on
            warnings.formatwarning = before
