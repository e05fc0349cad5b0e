"""Where tables and messages go."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unicodedata import category

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["make_console", "printable", "warnings_in_lines"]


def make_console() -> Console:
    """Return a console on stdout that shows text as it is: names in files are no markup, and steer no terminal."""
    from rich.console import Console

    class PlainConsole(Console):
        """Every text of a table or a message passes `render_str`."""

        def render_str(self, text: str, **settings: Any) -> Any:
            return super().render_str(printable(text), **{**settings, "markup": False, "emoji": False})

    # A pipe or a file has no width: tables there must not be cut at 80 columns.
    return PlainConsole(width=None if sys.stdout.isatty() else 160, markup=False, emoji=False)


def printable(text: str) -> str:
    r"""Return text with control characters written out, but for the end of a line.

    Example:
        >>> print(printable("a\x1b[31m b"))
        a\x1b[31m b
    """
    return "".join(c.encode("unicode_escape").decode() if category(c)[0] == "C" and c != "\n" else c for c in text)


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
