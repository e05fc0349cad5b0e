"""Reads the YAML of a recipe, and refuses what would grow without bounds while it is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from emp_callbacks.study.recipe.check import RecipeError, nearest

__all__ = ["check_yaml", "counts_given", "read_recipe"]

_COUNTS = (
    "limit_train_batches",
    "limit_val_batches",
    "limit_test_batches",
    "limit_predict_batches",
    "overfit_batches",
    "val_check_interval",
)
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
    values = _Values()
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            values.count(event)
            if len(values.opened) > _MOST_LEVELS:
                raise RecipeError(f"{source} nests more than {_MOST_LEVELS} levels of values; no recipe needs that")
            if values.total > _MOST_VALUES:
                raise RecipeError(f"{source} holds more than {_MOST_VALUES:,} values (aliases count); no recipe does")
    except yaml.YAMLError:
        return


def counts_given(files: Sequence[str], words: Sequence[str]) -> dict[str, int]:
    """Return the Trainer's settings that are a whole number of batches, as recipes and options give them.

    Their type is int | float, a number of batches or a fraction of them, and 1 means another thing than 1.0. Python
    keeps one object for int | float and float | int, whichever is made first in the process, so that the parser may
    have read a 1 as 1.0: all batches.
    """
    given: dict[str, Any] = {}
    for file in files:
        trainer = read_recipe(file).get("trainer")
        given |= {name: trainer[name] for name in _COUNTS if name in trainer} if isinstance(trainer, Mapping) else {}
    for i, word in enumerate(words):
        name, equals, text = word.removeprefix("--trainer.").partition("=")
        if word.startswith("--trainer.") and name in _COUNTS:
            given[name] = yaml.safe_load(text if equals else "".join(words[i + 1 : i + 2]))
    return {name: value for name, value in given.items() if isinstance(value, int) and not isinstance(value, bool)}


class _Values:
    """Counts the values of a YAML text, those behind an alias each time it stands there."""

    def __init__(self) -> None:
        self.total = 0
        self.opened: list[tuple[str | None, int]] = []  # lists and mappings: anchor, and values before it
        self._behind: dict[str | None, int] = {}  # anchor -> values

    def count(self, event: yaml.Event) -> None:
        """Count what begins or ends with an event."""
        if isinstance(event, yaml.AliasEvent):
            # Unknown inside of what it stands for: written out, that would never end.
            self.total += self._behind.get(event.anchor, _MOST_VALUES)
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = self.opened.pop()
            self._behind[anchor] = self.total - before
        elif isinstance(event, yaml.CollectionStartEvent):
            self.opened.append((event.anchor, self.total))
            self.total += 1
        elif isinstance(event, yaml.ScalarEvent):
            self._behind[event.anchor] = 1
            self.total += 1
