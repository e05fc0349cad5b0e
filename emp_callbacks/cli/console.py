"""How a command begins, and how it shows warnings."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

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

    before, warnings.formatwarning = warnings.formatwarning, line
    try:
        with warnings.catch_warnings():
            warnings.onceregistry.clear()  # type: ignore[attr-defined]  # of an earlier command in this process
            warnings.simplefilter("once", append=True)  # Lightning repeats its advice for every Trainer
            yield
    finally:
        if warnings.formatwarning is line:  # Lightning has its own from then on
            warnings.formatwarning = before
