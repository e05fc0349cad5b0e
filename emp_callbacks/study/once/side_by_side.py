"""Several models of a study on trained models at the same time, each in a process of its own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from rich.console import Console

from emp_callbacks.study.once.measuring import OnceStudy, measured
from emp_callbacks.study.progress import StudyProgress
from emp_callbacks.study.quiet import one_of_many
from emp_callbacks.study.recipe.recipe import Recipe
from emp_callbacks.study.run_store import RunStore

__all__ = ["measured_side_by_side"]


def measured_side_by_side(
    study: OnceStudy,
    cells: Sequence[tuple[Recipe, int]],
    store: RunStore,
    models: Path,
    jobs: int,
    progress: StudyProgress,
) -> list[dict[str, Any]]:
    """Return the records of all models, in order, measured by `jobs` processes of one CPU thread each.

    Args:
        study: What to measure.
        cells: Recipes with their seeds.
        store: Open, and this process's alone: the others write the models' own files in it.
        models: Folder of the trained models.
        jobs: Number of processes, >= 1.
        progress: Is told of every finished model.
    """
    context, others = multiprocessing.get_context("spawn"), multiprocessing.active_children()
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=one_of_many) as pool:
        running = {
            pool.submit(
                _measure, study, recipe.path, recipe.overrides, recipe.called, seed, store.out, store.recipe_digest,
                models, progress.is_quiet,
            ): f"{recipe.path.stem} seed {seed}"
            for recipe, seed in cells
        }  # fmt: skip
        try:
            for future in as_completed(running):
                if isinstance(future.exception(), Exception):  # which says nothing of the model
                    progress.note(f"{running[future]} failed; finished cases are kept")
                progress.advance(future.result()[1])
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in {*multiprocessing.active_children()}.difference(others):
                child.terminate()  # a signal to this process alone does not reach them; what is finished is on disk
            raise
    return [future.result()[0] for future in running]


def _measure(
    study: OnceStudy,
    path: Path,
    overrides: Sequence[str],
    called: str,
    seed: int,
    out: Path,
    recipe_digest: str,
    models: Path,
    quiet: bool,
) -> tuple[dict[str, Any], str]:
    recipe, store = Recipe(path, overrides, called=called), RunStore(out, recipe_digest)
    progress = StudyProgress(Console(quiet=quiet, force_terminal=False), 1, "")
    return measured(study, recipe, seed, store, models, progress)
