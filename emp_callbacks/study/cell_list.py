"""The cells of a study, read off its recipe alone: a cluster's script asks for them, and need not wait for imports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from emp_callbacks.study.arms import DEFAULT_ARMS, fits_in_order
from emp_callbacks.study.recipe.study_config import StudyConfig

__all__ = ["listed_cells"]

_MOST_BYTES = 1_000_000  # as a recipe has at most


def listed_cells(files: Sequence[str], options: Sequence[str]) -> list[str] | None:
    """Return what is trained, as `study_cells` does, where the study's arms, seeds and points say it.

    None where they do not, or where something is wrong with them: the default arms are those that go with the
    recipe's EMPCallback, and the parser of the recipe says best what is wrong. Whether arms that are named go with the
    recipe is checked when one is trained.

    Args:
        files: The recipe, and what is laid over it.
        options: Further words of the command line, such as ["--study.seeds", "[0]"].
    """
    try:
        study: dict[str, Any] = {}
        for file in files:
            study |= _study_in(Path(file))
        study |= _study_of(options)
        config = StudyConfig(**study)
    except (OSError, TypeError, ValueError, yaml.YAMLError):
        return None
    plain = _are(config.arms, str) and _are(config.seeds, int) and _are(config.points, (int, float))
    if not plain or tuple(config.arms) == DEFAULT_ARMS:
        return None
    return [cell.name for cell in fits_in_order(config.arms, config.seeds, config.points)]


def _study_in(file: Path) -> Mapping[str, Any]:
    if file.stat().st_size > _MOST_BYTES:
        raise ValueError("too large for a recipe")
    recipe = yaml.safe_load(file.read_text(encoding="utf-8"))
    study = recipe.get("study") if isinstance(recipe, Mapping) else {}
    if not isinstance(study or {}, Mapping):
        raise ValueError("no mapping")
    return study or {}


def _study_of(options: Sequence[str]) -> dict[str, Any]:
    """Return the settings of the study among options, "--study.NAME VALUE" or "--study.NAME=VALUE"."""
    found: dict[str, Any] = {}
    for i, word in enumerate(options):
        if not word.startswith("--study"):
            continue
        name, equals, value = word.removeprefix("--study.").partition("=")
        if word.startswith("--study.") and name.isidentifier() and (equals or i + 1 < len(options)):
            found[name] = yaml.safe_load(value if equals else options[i + 1])
        else:
            raise ValueError("not one setting")
    return found


def _are(values: Any, kind: type | tuple[type, ...]) -> bool:
    return isinstance(values, list) and all(isinstance(v, kind) and not isinstance(v, bool) for v in values)
