"""How every parser of a command looks."""

from __future__ import annotations

import argparse
import re
import textwrap
from typing import NoReturn

from emp_callbacks.terminal import printable

__all__ = ["RECIPE", "new_parser"]

RECIPE = "a YAML file, or a name that emp recipes lists"

_WIDEST = 100  # columns; longer lines are hard to read


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


class _Formatter(argparse.HelpFormatter):
    """Wraps paragraphs, keeps the lines of examples and tables, and shows the defaults of options."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=26)
        self._width = min(self._width, _WIDEST)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs: list[str] = []
        for line in text.splitlines():
            flows = line and not line.startswith(" ") and not line.endswith(":")
            if flows and paragraphs and paragraphs[-1] and paragraphs[-1][-1] not in ":\n":
                paragraphs[-1] += f" {line}"
            else:
                paragraphs.append(line if flows or not line else f"{line}\n")
        wrapped = (_wrapped(paragraph.rstrip("\n"), width - len(indent)) for paragraph in paragraphs)
        return textwrap.indent("\n".join(wrapped), indent)


def _wrapped(line: str, width: int) -> str:
    """Return a line in pieces: of a command so that a shell takes them as one, of a table under its second column."""
    if line.startswith("  emp "):
        pieces = [""]
        for option in re.split(" (?=--)", line):
            if pieces[-1] and len(f"{pieces[-1]} {option}") > width - 2:
                pieces.append("     ")
            pieces[-1] += f" {option}" if pieces[-1] else option
        return " \\\n".join(pieces)
    hanging = " " * (line.rindex("  ") + 2) if line.startswith("  ") and "  " in line.strip() else ""
    return textwrap.fill(line, width, subsequent_indent=hanging, break_on_hyphens=False)


def new_parser(command: str, summary: str, examples: str) -> argparse.ArgumentParser:
    """Return a parser of `emp COMMAND`, whose examples stand as they are."""
    return _Parser(
        prog=f"emp {command}",
        description=summary,
        epilog=examples,
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
