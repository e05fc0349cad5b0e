"""How every parser of a command looks."""

from __future__ import annotations

import argparse

__all__ = ["new_parser"]


def new_parser(command: str, summary: str, examples: str) -> argparse.ArgumentParser:
    """Return a parser of `emp COMMAND`, whose examples stand as they are."""
    return argparse.ArgumentParser(
        prog=f"emp {command}",
        description=summary,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
