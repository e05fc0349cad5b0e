"""Several runs of a study at the same time, each in a process of its own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Console

from emp_callbacks.study.comparison import StudyInterrupted, run_study, study_needs
from emp_callbacks.study.progress import StudyProgress
from emp_callbacks.study.quiet import one_of_many
from emp_callbacks.study.recipe.recipe import Recipe

__all__ = ["run_side_by_side"]


def run_side_by_side(
    recipe: Recipe, out: Path, jobs: int, *, overwrite: bool = False, console: Console | None = None
) -> dict[str, Any]:
    """Run a study with several trainings at a time, and return its results; see `run_study`.

    Each process trains one cell after the other on one CPU thread, all on the same device where it has one. Cells
    begin in the order of the study, as soon as those that they need are finished. On a GPU that many small networks
    share, NVIDIA's MPS lets them run at the same time.

    Args:
        recipe: The parsed recipe.
        out: Folder of the results.
        jobs: Number of processes, >= 1.
        overwrite: Move what the folder holds aside and start anew.
        console: Where progress is shown; silent if None.

    Raises:
        ValueError: `jobs` is not positive; or what `run_study` raises, in whichever process.
        StudyInterrupted: The user pressed Ctrl-C; finished runs stay.
    """
    if jobs < 1:
        raise ValueError(f"jobs must be >= 1, got {jobs}: the number of trainings at a time")
    waiting = study_needs(recipe, out, overwrite=overwrite)
    total, context = len(waiting), multiprocessing.get_context("spawn")
    progress = StudyProgress(console or Console(quiet=True), total, "")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=one_of_many) as pool, progress:
        running: dict[Future[None], str] = {}
        try:
            while waiting or running:
                busy = {*waiting, *running.values()}
                ready = [name for name, needs in waiting.items() if not busy.intersection(needs)]
                for name in ready[: jobs - len(running)]:
                    del waiting[name]
                    running[pool.submit(_run_cell, recipe.path, recipe.overrides, recipe.called, out, name)] = name
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    name = running[future]
                    if isinstance(future.exception(), Exception):  # which says nothing of the cell
                        progress.note(f"{name} failed; finished runs are kept")
                    future.result()
                    del running[future]
                    progress.advance(name)
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            if isinstance(error, KeyboardInterrupt):
                raise StudyInterrupted(total - len(waiting) - len(running), total) from error
            raise
    results = run_study(recipe, out, console=console)
    assert results is not None, "nothing was left to run"
    return results


@cache
def _parsed(path: Path, overrides: Sequence[str], called: str) -> Recipe:
    return Recipe(path, overrides, called=called)


def _run_cell(path: Path, overrides: Sequence[str], called: str, out: Path, name: str) -> None:
    run_study(_parsed(path, overrides, called), out, only=[name])
