"""Where tables go."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["make_console"]


def make_console() -> Console:
    """Return a console on stdout."""
    from rich.console import Console

    # A pipe or a file has no width: tables there must not be cut at 80 columns.
    return Console() if sys.stdout.isatty() else Console(width=160)
