"""How a command begins, and how it shows warnings."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from emp_callbacks.terminal import printable

__all__ = ["say_first", "warnings_in_lines"]


def say_first(told: str) -> None:
    """Say on a terminal what a command does, before the seconds that its imports take; a log needs no such word."""
    ranks = {os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID")}
    if sys.stderr.isatty() and ranks == {"0"}:
        sys.stderr.write(f"emp {printable(told)} ...\n")
        sys.stderr.flush()


@contextmanager
def warnings_in_lines() -> Iterator[None]:
    """Show each warning as one line that steers no terminal, without the code that gave it, and the same one once."""

    def line(message: Warning | str, *_: object, **__: object) -> str:
        return f"emp: warning: {printable(' '.join(str(message).split()))}\n"

    said: set[str] = set()

    def once(message: Warning | str, *place: Any, **more: Any) -> None:
        if str(message) not in said:  # Lightning repeats its advice for every Trainer
            said.add(str(message))
            warnings.formatwarning = line  # Lightning has put its own there
            show(message, *place, **more)

    before, warnings.formatwarning = warnings.formatwarning, line
    show, warnings.showwarning = warnings.showwarning, once
    try:
        yield
    finally:
        warnings.showwarning = show
        warnings.formatwarning = before
