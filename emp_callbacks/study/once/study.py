"""Studies on trained models: `emp sweep-beta`, `emp compare-criteria`, `emp violations`, `emp gates`."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from emp_callbacks.study.comparison import StudyInterrupted, environment
from emp_callbacks.study.once.measuring import Cases, OnCase, OnceStudy, measured
from emp_callbacks.study.once.side_by_side import measured_side_by_side
from emp_callbacks.study.progress import StudyProgress
from emp_callbacks.study.recipe.recipe import Recipe
from emp_callbacks.study.recipe.seeds import check_seeds
from emp_callbacks.study.run_store import RunStore, digest, write_atomically
from emp_callbacks.study.training import recipe_config

__all__ = ["SCHEMA", "Cases", "OnCase", "OnceStudy", "run_once_study"]

SCHEMA = 1


def run_once_study(
    study: OnceStudy,
    recipes: Sequence[Recipe],
    out: Path,
    *,
    models: Path,
    seeds: Sequence[int] | None = None,
    overwrite: bool = False,
    jobs: int | None = None,
    console: Console | None = None,
    words: Sequence[str] = (),
) -> dict[str, Any]:
    """Train what is not trained yet, measure every model, and write results.json.

    Finished models are kept in `models` for every study, and measured ones in `out`: the same call again continues.

    Args:
        study: What to measure.
        recipes: One per model; their file names are the models' names.
        out: Folder of the results.
        models: Folder of the trained models.
        seeds: Default: each recipe's study.seeds.
        overwrite: Move what `out` holds to OUT.old-1 (-2, ...) and start anew.
        jobs: Measure so many models at a time, >= 1, each in a process with one CPU thread; None: one after the other,
            here.
        console: Where progress is shown; silent if None.
        words: The command line, for the report.

    Raises:
        ValueError: Two recipes have one name, seeds repeat or are out of range, or a recipe cannot be built or does not
            go with the settings; nothing was written then.
        BusyError: Another command works in `out`.
        FileExistsError: The folder holds results of other settings, or other things.
        StudyInterrupted: The user pressed Ctrl-C; finished models stay.
    """
    names = _checked(study, recipes, seeds, jobs)
    cells = [(recipe, seed) for recipe in recipes for seed in seeds or recipe.study.seeds]
    described = {"study": study.command, "settings": dict(study.settings)}
    store = RunStore(out, digest(described))
    shown = console or Console(quiet=True)
    try:
        if moved := store.open({**described, "models": names}, overwrite):
            shown.print(f"moved the earlier contents to {moved}", highlight=False)
        with StudyProgress(shown, len(cells), "") as progress:
            try:
                found = _measured_all(study, cells, store, models, jobs, progress)
            except KeyboardInterrupt as error:
                raise StudyInterrupted(progress.finished, len(cells)) from error
        results = _results(study, found, words)
        write_atomically(out / "results.json", _one_row_a_line(results))
    finally:
        store.close()
    return results


def _checked(study: OnceStudy, recipes: Sequence[Recipe], seeds: Sequence[int] | None, jobs: int | None) -> list[str]:
    """Return the models' names, all else checked before anything is written."""
    names = [recipe.path.stem for recipe in recipes]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"two recipes are named {', '.join(sorted(twice))}: models go by file names; rename one")
    if seeds is not None:
        check_seeds("--seeds", seeds)
    if jobs is not None and jobs < 1:
        raise ValueError(f"jobs must be >= 1, got {jobs}: the number of models at a time")
    for recipe in recipes:  # before anything is written
        study.check_recipe(recipe)
        study.check(recipe_config(recipe), study.settings)
    return names


def _measured_all(
    study: OnceStudy,
    cells: Sequence[tuple[Recipe, int]],
    store: RunStore,
    models: Path,
    jobs: int | None,
    progress: StudyProgress,
) -> list[dict[str, Any]]:
    if jobs is not None:
        return measured_side_by_side(study, cells, store, models, jobs, progress)
    found = []
    for recipe, seed in cells:
        record, line = measured(study, recipe, seed, store, models, progress)
        progress.advance(line)
        found.append(record)
    return found


def _results(study: OnceStudy, found: Sequence[Mapping[str, Any]], words: Sequence[str]) -> dict[str, Any]:
    results = {
        "schema": SCHEMA,
        "study": study.command,
        "settings": dict(study.settings),
        "shown": dict(study.shown),
        "command": shlex.join(["emp", *words]) if words else f"emp {study.command}",
        "environment": environment(),
        "models": [{key: value for key, value in record.items() if key != "rows"} for record in found],
        "rows": [{"model": record["arm"], "seed": record["seed"], **row} for record in found for row in record["rows"]],
    }
    return dict(json.loads(json.dumps(results)))


def _one_row_a_line(results: Mapping[str, Any]) -> str:
    """Return JSON text in which a changed figure is one changed line."""
    parts = []
    for key, value in results.items():
        if key in ("models", "rows"):
            parts.append(f'"{key}": [\n ' + ",\n ".join(json.dumps(row) for row in value) + "\n]")
        else:
            parts.append(f'"{key}": {json.dumps(value)}')
    return "{\n" + ",\n".join(parts) + "\n}\n"
