"""What a study on trained models measures of one of them, case by case, and the record that is kept of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from emp_callbacks.config import EMPConfig
from emp_callbacks.pruning.signatures import SAID_OF_A_REFRESH
from emp_callbacks.study.arms import Cell
from emp_callbacks.study.comparison import what_trains
from emp_callbacks.study.once.dense_models import DenseModel, dense_model
from emp_callbacks.study.once.results import Row
from emp_callbacks.study.progress import StudyProgress
from emp_callbacks.study.recipe.recipe import Recipe
from emp_callbacks.study.report.page import Page
from emp_callbacks.study.run_store import RunStore, digest
from emp_callbacks.study.training import check_metric

__all__ = ["Cases", "OnCase", "OnceStudy", "measured"]

OnCase = Callable[[int, int], None]


class Cases:
    """The cases of one model: how far they are, and those that an interrupted call has finished.

    Args:
        store: Keeps finished cases until the model's record is there.
        cell: The model.
        fingerprint: Of everything that decides its rows.
        progress: Is told how many cases are done.
    """

    def __init__(self, store: RunStore, cell: Cell, fingerprint: str, progress: StudyProgress) -> None:
        self._store, self._cell, self._fingerprint, self._progress = store, cell, fingerprint, progress
        self._finished: dict[str, list[Row]] = store.finished_cases(cell, fingerprint)

    def __call__(self, done: int, total: int) -> None:
        """Show that so many cases are done."""
        self._progress.on_step(done, total)

    def rows(self, name: str, measure: Callable[[], list[Row]]) -> list[Row]:
        """Return the rows of a case, measured now and kept on disk unless an earlier call has done so."""
        if name not in self._finished:
            self._finished[name] = measure()
            self._store.save_cases(self._cell, self._fingerprint, self._finished)
            self._progress.note(f"{self._cell.arm} seed {self._cell.seed}: {name}")
        return self._finished[name]


def _any_recipe(recipe: Recipe) -> None:
    """Take every recipe."""


@dataclass(frozen=True, kw_only=True)
class OnceStudy:
    """What is measured of a trained model, and what is said of it; with --jobs it travels between processes.

    Attributes:
        command: Of `emp`, such as "sweep-beta".
        settings: Whatever decides the rows, plain data.
        measure: Takes a dense model, the settings and its cases, to be called with (case, cases); returns its rows.
        page: Takes the results of all models; returns the findings.
        check: Takes the EMP settings of a recipe and those of the study; raises ValueError where they do not go
            together.
        check_recipe: Takes a recipe; raises ValueError where it is none for the study.
        shown: What the findings depend on and the rows do not, plain data.
    """

    command: str
    settings: Mapping[str, Any]
    measure: Callable[[DenseModel, Mapping[str, Any], Cases], list[Row]]
    page: Callable[[Mapping[str, Any]], Page]
    check: Callable[[EMPConfig, Mapping[str, Any]], object]
    check_recipe: Callable[[Recipe], object] = _any_recipe
    shown: Mapping[str, Any] = field(default_factory=dict)


def measured(
    study: OnceStudy, recipe: Recipe, seed: int, store: RunStore, models: Path, progress: StudyProgress
) -> tuple[dict[str, Any], str]:
    """Return the record of one model, from the store if it is there, and a line about it."""
    name = recipe.path.stem
    fingerprint = digest([store.recipe_digest, what_trains(recipe.resolved()), name, seed])
    cell = Cell(name, seed)
    if record := store.finished(cell, fingerprint):
        return record, f"{name} seed {seed}: measured earlier"
    progress.begin(f"train {name} seed {seed}", part=(0.0, 0.5))
    dense = dense_model(recipe, seed, models, progress.on_step)
    check_metric(recipe.study.metric, dense.metrics, name)
    progress.begin(f"{study.command} {name} seed {seed}", part=(0.5, 1.0))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=SAID_OF_A_REFRESH)  # the report has the figures
        rows = study.measure(dense, study.settings, Cases(store, cell, fingerprint, progress))
    trained = "trained earlier" if dense.reused else "trained"
    metric = recipe.study.metric
    record = store.save(cell, {
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
    return record, (
        f"{name} seed {seed}: {metric} {dense.metrics[metric]:.4f}, {trained} in {dense.seconds:.0f} s, "
        f"{len(rows)} cases measured"
    )
