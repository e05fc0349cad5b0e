"""How every parser of a command looks."""

from __future__ import annotations

import argparse
from typing import NoReturn

from emp_callbacks.terminal import printable

__all__ = ["new_parser"]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


def new_parser(command: str, summary: str, examples: str) -> argparse.ArgumentParser:
    """Return a parser of `emp COMMAND`, whose examples stand as they are."""
    return _Parser(
        prog=f"emp {command}",
        description=summary,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
