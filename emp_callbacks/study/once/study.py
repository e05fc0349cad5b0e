"""Studies that prune trained models once: `emp sweep-beta`, `emp compare-criteria`, `emp violations`."""

from __future__ import annotations

import json
import shlex
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from emp_callbacks.config import EMPConfig
from emp_callbacks.pruning.signatures import SAID_OF_A_REFRESH
from emp_callbacks.study.arms import Cell
from emp_callbacks.study.comparison import StudyInterrupted, environment, what_trains
from emp_callbacks.study.once.dense_models import DenseModel, dense_model
from emp_callbacks.study.once.results import Row
from emp_callbacks.study.progress import StudyProgress
from emp_callbacks.study.recipe.recipe import Recipe
from emp_callbacks.study.recipe.seeds import check_seeds
from emp_callbacks.study.report.page import Page
from emp_callbacks.study.run_store import RunStore, digest, write_atomically
from emp_callbacks.study.training import check_metric, recipe_config

__all__ = ["SCHEMA", "OnCase", "OnceStudy", "run_once_study"]

SCHEMA = 1
OnCase = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class OnceStudy:
    """What is measured of a trained model, and what is said of it.

    Attributes:
        command: Of `emp`, such as "sweep-beta".
        settings: Whatever decides the rows, plain data.
        measure: Takes a dense model, the settings and a callback for progress (case, cases); returns its rows.
        page: Takes the results of all models; returns the findings.
        check: Takes the EMP settings of a recipe and those of the study; raises ValueError where they do not go
            together.
        shown: What the findings depend on and the rows do not, plain data.
    """

    command: str
    settings: Mapping[str, Any]
    measure: Callable[[DenseModel, Mapping[str, Any], OnCase], list[Row]]
    page: Callable[[Mapping[str, Any]], Page]
    check: Callable[[EMPConfig, Mapping[str, Any]], object]
    shown: Mapping[str, Any] = field(default_factory=dict)


def run_once_study(
    study: OnceStudy,
    recipes: Sequence[Recipe],
    out: Path,
    *,
    models: Path,
    seeds: Sequence[int] | None = None,
    overwrite: bool = False,
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
        console: Where progress is shown; silent if None.
        words: The command line, for the report.

    Raises:
        ValueError: Two recipes have one name, seeds repeat or are out of range, or a recipe cannot be built or does not
            go with the settings; nothing was written then.
        BusyError: Another command works in `out`.
        FileExistsError: The folder holds results of other settings, or other things.
        StudyInterrupted: The user pressed Ctrl-C; finished models stay.
    """
    names = [recipe.path.stem for recipe in recipes]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"two recipes are named {', '.join(sorted(twice))}: models go by file names; rename one")
    if seeds is not None:
        check_seeds("--seeds", seeds)
    for recipe in recipes:  # before anything is written
        study.check(recipe_config(recipe), study.settings)
    cells = [(recipe, seed) for recipe in recipes for seed in seeds or recipe.study.seeds]
    described = {"study": study.command, "settings": dict(study.settings)}
    store = RunStore(out, digest(described))
    shown = console or Console(quiet=True)
    found: list[dict[str, Any]] = []
    try:
        if moved := store.open({**described, "models": names}, overwrite):
            shown.print(f"moved the earlier contents to {moved}", highlight=False)
        with StudyProgress(shown, len(cells), "") as progress:
            try:
                found = [_measured(study, recipe, seed, store, models, progress) for recipe, seed in cells]
            except KeyboardInterrupt as error:
                raise StudyInterrupted(progress.finished, len(cells)) from error
        results = _results(study, found, words)
        write_atomically(out / "results.json", _one_row_a_line(results))
    finally:
        store.close()
    return results


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


def _measured(
    study: OnceStudy, recipe: Recipe, seed: int, store: RunStore, models: Path, progress: StudyProgress
) -> dict[str, Any]:
    """Return the record of one model, from the store if it is there."""
    name = recipe.path.stem
    fingerprint = digest([store.recipe_digest, what_trains(recipe.resolved()), name, seed])
    cell = Cell(name, seed)
    if record := store.finished(cell, fingerprint):
        progress.advance(f"{name} seed {seed}: measured earlier")
        return record
    progress.begin(f"train {name} seed {seed}")
    dense = dense_model(recipe, seed, models, progress.on_step)
    check_metric(recipe.study.metric, dense.metrics, name)
    progress.begin(f"prune {name} seed {seed}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=SAID_OF_A_REFRESH)  # the report has the figures
        rows = study.measure(dense, study.settings, progress.on_step)
    trained = "trained earlier" if dense.reused else "trained"
    metric = recipe.study.metric
    progress.advance(
        f"{name} seed {seed}: {metric} {dense.metrics[metric]:.4f}, {trained} in {dense.seconds:.0f} s, "
        f"{len(rows)} cases measured"
    )
    return store.save(cell, {
        "arm": name,
        "seed": seed,
        "fingerprint": fingerprint,
        "metric": metric,
        "higher_is_better": recipe.study.higher_is_better,
        "metrics": dense.metrics,
        "parameters": sum(value.numel() for value in dense.training.model.parameters()),
        "seconds": round(dense.seconds, 1),
        "threads": torch.get_num_threads(),
        "rows": rows,
    })  # fmt: skip


def _one_row_a_line(results: Mapping[str, Any]) -> str:
    """Return JSON text in which a changed figure is one changed line."""
    parts = []
    for key, value in results.items():
        if key in ("models", "rows"):
            parts.append(f'"{key}": [\n ' + ",\n ".join(json.dumps(row) for row in value) + "\n]")
        else:
            parts.append(f'"{key}": {json.dumps(value)}')
    return "{\n" + ",\n".join(parts) + "\n}\n"
