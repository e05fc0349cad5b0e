"""Says in one line which entry of a recipe could not be built, and why."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from emp_callbacks.blame import in_a_line, raised_by_us, where_raised
from emp_callbacks.study.recipe.check import RecipeError

__all__ = ["building"]

# What jsonargparse says of the alternatives of a type that a value was not meant for.
_NOT_MEANT = ("Expected a", "Not a valid", "Does not validate", "a class path", "a dict ")


@contextmanager
def building(config: Mapping[str, Any]) -> Iterator[None]:
    """Turn whatever a class of the recipe raises while it is built into one line that names its entry.

    Classes come from anywhere (timm, torch, Lightning, the user), and what a recipe gives them is checked by them
    alone: any error of theirs is about the recipe. Errors that name the entry themselves stay as they are.

    Args:
        config: The parsed recipe: section -> values.

    Raises:
        RecipeError: Something raised; the cause is chained.
    """
    try:
        yield
    except Exception as error:
        if raised_by_us(error):
            raise
        entry = _entry(str(error), config)
        raise RecipeError(f"bad value for '{entry}': {_reason(error)}") from error


def _entry(message: str, config: Mapping[str, Any]) -> str:
    """Return the entry whose value a message of jsonargparse shows, else the trainer: it is built last, from all."""
    trainer = config.get("trainer")
    entries = {
        **{key: config.get(key) for key in ("model", "data")},
        **{f"trainer.{key}": value for key, value in getattr(trainer, "__dict__", {}).items()},
    }
    return next((key for key, value in entries.items() if value and f"value: {value}" in message), "trainer")


def _reason(error: BaseException) -> str:
    """Return the class and the message of what went wrong first, on one line."""
    first, message = error, str(error)
    while first.__cause__ is not None:
        first = first.__cause__
    if (
        where_raised(first)[0] == "jsonargparse"
    ):  # the value had several types, and this is not the one it was meant for
        alternatives = re.findall(r"^ *- (.*)", message, flags=re.MULTILINE)
        text = next((line for line in alternatives if not line.startswith(_NOT_MEANT)), message)
    else:
        text = in_a_line(first)
    return " ".join(text.split())
