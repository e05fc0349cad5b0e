"""Reads the YAML of a recipe, and refuses what would grow without bounds while it is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from emp_callbacks.study.recipe.check import RecipeError, nearest

__all__ = ["check_yaml", "read_recipe"]

# Recipes have some hundred bytes, values and a handful of levels.
_MOST_BYTES, _MOST_VALUES, _MOST_LEVELS = 1_000_000, 10_000, 50


def read_recipe(path: str | Path) -> Mapping[str, Any]:
    """Return the mapping in a YAML file.

    Raises:
        FileNotFoundError: If there is no such file.
        RecipeError: If the file is not YAML, not a mapping, or far larger than a recipe.
    """
    file = Path(path)
    if not file.is_file():
        siblings = [str(other) for other in file.parent.glob("*.y*ml")]
        raise FileNotFoundError(f"recipe {file} does not exist{nearest(str(file), siblings)}")
    if (size := file.stat().st_size) > _MOST_BYTES:
        raise RecipeError(f"recipe {file} has {size:,} bytes, and a recipe at most {_MOST_BYTES:,}; name another file")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"recipe {file} is not UTF-8 text: byte {error.object[error.start]:#04x} at position {error.start}; save "
            "it as UTF-8"
        ) from error
    check_yaml(text, f"recipe {file}")
    try:
        recipe = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2020-13-45
        raise RecipeError(f"recipe {file} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(recipe, Mapping):
        raise RecipeError(f"recipe {file} must be a mapping of keys to values, got {type(recipe).__name__}")
    return recipe


def check_yaml(text: str, source: str) -> None:
    """Raise RecipeError if YAML nests too deep, or has too many values once its aliases are written out.

    Looks at the stream of events, which needs no recursion and expands nothing. What is no YAML is left to the reader.
    """
    sizes: dict[str, int] = {}
    open_: list[tuple[str | None, int]] = []  # anchor, and values in all before it
    total = 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, (yaml.CollectionEndEvent)):
                anchor, before = open_.pop()
                sizes[anchor or ""] = total - before
            elif isinstance(event, yaml.AliasEvent):
                total += sizes.get(event.anchor, _MOST_VALUES)  # an alias to what it stands in never ends
            elif isinstance(event, yaml.NodeEvent):
                total += 1
                if isinstance(event, yaml.CollectionStartEvent):
                    open_.append((event.anchor, total - 1))
                elif event.anchor:
                    sizes[event.anchor] = 1
            if len(open_) > _MOST_LEVELS:
                raise RecipeError(f"{source} nests more than {_MOST_LEVELS} levels of values; no recipe needs that")
            if total > _MOST_VALUES:
                raise RecipeError(f"{source} holds more than {_MOST_VALUES:,} values (aliases count); no recipe does")
    except yaml.YAMLError:
        return
