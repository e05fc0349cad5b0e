"""A training, or a study, as jobs for Slurm: which there are, in what order, and what hands them over."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from emp_callbacks.study.arm_settings import fitting_arms
from emp_callbacks.study.arms import DEFAULT_ARMS, TrainingJob, fits_in_order, needed_cells, plan_jobs
from emp_callbacks.study.comparison import what_trains
from emp_callbacks.study.recipe.recipe import Recipe
from emp_callbacks.study.run_store import RunStore, digest, write_atomically
from emp_callbacks.study.training import recipe_config

__all__ = ["Job", "StudyPlan", "array_of", "has_slurm", "levels", "shell_lines", "study_jobs", "submit", "write_cells"]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One call of sbatch; it waits for the job before it, if `follows`.

    Args:
        what: What it does, for people.
        words: The script and its arguments.
        array: Numbers of its tasks, such as "1-4,7%2"; None: it is no array.
        follows: Whether it begins once every task of the job before it has ended well.
    """

    what: str
    words: Sequence[str]
    array: str | None = None
    follows: bool = False

    def options(self, before: str | None) -> list[str]:
        """Return what sbatch is told about this job, given the number of the job before it."""
        array = [f"--array={self.array}"] if self.array else []
        # Without the second it would wait for ever for a job that failed.
        return [*array, *([f"--dependency=afterok:{before}", "--kill-on-invalid-dep=yes"] if self.follows else [])]


class StudyPlan:
    """The trainings of a study, known without building its model or finding its GPUs: login nodes have neither.

    Args:
        recipe: The parsed recipe.
        out: Folder of the study.
        processes: How many train each cell.

    Attributes:
        cells: The trainings, in the order of `emp compare --list-cells`.
    """

    def __init__(self, recipe: Recipe, out: Path, processes: int) -> None:
        study = recipe.study
        by_default = tuple(study.arms) == DEFAULT_ARMS
        self._arms = fitting_arms(study.arms, recipe_config(recipe)) if by_default else study.arms
        self._points = study.points
        self._jobs: dict[str, TrainingJob] = {
            job.fit.name: job for job in plan_jobs(self._arms, study.seeds, study.points)
        }
        self.cells = [cell.name for cell in fits_in_order(self._arms, study.seeds, study.points)]
        resolved = recipe.resolved()
        self._resolved = {**resolved, "study": {**resolved["study"], "out": str(out)}}
        trained = what_trains(resolved) | ({"world_size": processes} if processes > 1 else {})
        self._store = RunStore(out, digest(trained))

    def open_folder(self, *, overwrite: bool) -> None:
        """Make the folder of the study ready, or see that it is.

        Raises:
            BusyError: A command works in it.
            FileExistsError: It holds runs of a different recipe, or other things.
        """
        self._store.open(self._resolved, overwrite)
        self._store.close()

    def needs(self, *, anew: bool = False) -> dict[str, list[str]]:
        """Return the trainings without records of all their runs (or all of them, `anew`), each with those it needs."""

        def is_left(name: str) -> bool:
            records = (self._store.runs / f"{cell.file}.json" for cell in self._jobs[name].cells)
            return anew or not all(record.is_file() for record in records)

        found = {name: needed_cells(self._jobs[name].fit, self._arms, self._points) for name in self.cells}
        return {name: [cell.name for cell in needed] for name, needed in found.items() if is_left(name)}


def levels(needs: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """Return trainings in groups, each of which needs earlier groups alone.

    Args:
        needs: What is left to train, each with the trainings that it needs; those that are no key are finished.

    Examples:
        >>> levels({"dense:0": [], "random:0": ["freeze:0"], "freeze:0": []})
        [['dense:0', 'freeze:0'], ['random:0']]
    """
    found: list[list[str]] = []
    left = dict(needs)
    while left:
        found.append([name for name, needed in left.items() if not left.keys() & set(needed)])
        assert found[-1], "trainings need each other"
        left = {name: needed for name, needed in left.items() if name not in found[-1]}
    return found


def array_of(numbers: Iterable[int], throttle: int | None = None) -> str:
    """Return numbers of tasks as sbatch's --array has them, at most `throttle` of them at a time.

    Examples:
        >>> array_of([1, 2, 3, 7], 2)
        '1-3,7%2'
    """
    runs = [[n for _, n in run] for _, run in groupby(enumerate(sorted(numbers)), lambda pair: pair[1] - pair[0])]
    text = ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return text if throttle is None else f"{text}%{throttle}"


def write_cells(cells: Sequence[str], out: Path, *, dry: bool = False) -> Path:
    """Write the cells of a study, one a line, and return the file; unless `dry`, when it is named only.

    Its name tells its content, so that jobs which wait keep the list that they were submitted with.
    """
    file = out / f"cells-{digest(list(cells))[:8]}.txt"
    if not dry:
        write_atomically(file, "".join(f"{cell}\n" for cell in cells))
    return file


def study_jobs(
    cells: Sequence[str],
    needs: Mapping[str, Sequence[str]],
    script: Path,
    words: Sequence[str],
    throttle: int | None = None,
) -> list[Job]:
    """Return the jobs of a study: an array for each of its levels, then the merge.

    Args:
        cells: All trainings, as the file of cells has them: the task of line n has number n.
        needs: Those that are left, as for `levels`.
        script: The batch script.
        words: Its arguments.
        throttle: Most tasks of an array at a time.
    """
    number = {cell: n for n, cell in enumerate(cells, start=1)}
    found: list[Job] = []
    for level in levels(needs):
        array = array_of((number[cell] for cell in level), throttle)
        what = f"{len(level)} training{'s' if len(level) > 1 else ''}"
        found.append(Job(what=what, words=[str(script), *words], array=array, follows=bool(found)))
    # To the script, task 0 is the merge.
    return [*found, Job(what="merge and report", words=[str(script), *words], array="0", follows=bool(found))]


def submit(jobs: Sequence[Job], options: Sequence[str]) -> list[str]:
    """Hand jobs to sbatch, each with these options, and return their numbers.

    Raises:
        ValueError: sbatch refused one; the message has its words, and what was submitted before.
    """
    # The jobs run the emp that submits them: sbatch hands the environment on.
    beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    numbers: list[str] = []
    for job in jobs:
        told = [*options, *job.options(numbers[-1] if numbers else None)]
        done = subprocess.run(
            ["sbatch", "--parsable", *told, *job.words],
            capture_output=True,
            text=True,
            env={**os.environ, "PATH": beside},
        )
        if done.returncode != 0:
            before = f"; submitted before it, and waiting: scancel {' '.join(numbers)}" if numbers else ""
            raise ValueError(f"sbatch refused the job of {job.what}: {done.stderr.strip()}{before}")
        numbers.append(done.stdout.strip().split(";")[0])  # ID;CLUSTER where there are several clusters
    return numbers


def shell_lines(jobs: Sequence[Job], options: Sequence[str]) -> list[str]:
    """Return the same as lines for a shell."""
    found = []
    for n, job in enumerate(jobs, start=1):
        told = [*options, *job.options("JOB")]
        words = shlex.join(["sbatch", "--parsable", *told, *job.words]).replace("afterok:JOB", f"afterok:$JOB{n - 1}")
        found.append(f"JOB{n}=$({words})  # {job.what}")
    return found


def has_slurm() -> bool:
    """Whether jobs can be submitted from here."""
    return shutil.which("sbatch") is not None
