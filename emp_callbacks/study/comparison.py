"""`emp compare`: the same training with each arm and seed, differing in nothing but the pruning."""

from __future__ import annotations

import dataclasses
import datetime
import gc
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import emp_callbacks
from emp_callbacks.study.arm_settings import fitting_arms
from emp_callbacks.study.arms import Cell, TrainingJob, fits_in_order, plan_jobs
from emp_callbacks.study.cells import CellRunner
from emp_callbacks.study.progress import StudyProgress
from emp_callbacks.study.ranks import Ranks, check_alone
from emp_callbacks.study.recipe.check import nearest
from emp_callbacks.study.recipe.recipe import Recipe
from emp_callbacks.study.recipe.study_config import StudyConfig
from emp_callbacks.study.report.convergence import convergence
from emp_callbacks.study.run_store import RunStore, digest, write_atomically
from emp_callbacks.study.training import check_metric, recipe_config

__all__ = ["StudyInterrupted", "environment", "run_study", "study_cells", "what_trains"]

Record = dict[str, Any]

# Trainer settings that change what is shown or stored, never what is trained.
_PRESENTATION = (
    "logger",
    "log_every_n_steps",
    "enable_progress_bar",
    "enable_model_summary",
    "enable_checkpointing",
    "default_root_dir",
    "profiler",
)


class StudyInterrupted(KeyboardInterrupt):
    """The user stopped a study; `finished` of `total` runs are on disk and will be reused."""

    def __init__(self, finished: int, total: int) -> None:
        super().__init__(f"interrupted after {finished} of {total} runs; run the same command again to continue")
        self.finished, self.total = finished, total


def run_study(
    recipe: Recipe,
    out: str | Path | None = None,
    *,
    overwrite: bool = False,
    only: Sequence[str] | None = None,
    console: Console | None = None,
) -> dict[str, Any] | None:
    """Train every arm with every seed of a recipe's study and write results.json.

    All arms of a seed start from the same weights and see the same batches for the same number of steps; the
    final weights are tested, none is chosen by a metric. Runs that an earlier call finished are reused.

    Args:
        recipe: The parsed recipe.
        out: Folder of the results; by default the recipe's `study.out`, or runs/ plus the recipe's name.
        overwrite: Move what the folder holds to a folder named OUT.old-1 (-2, ...) and start anew.
        only: Cells such as "training_feedback:0" to run alone, of those that `study_cells` names.
        console: Where progress is shown; silent if None.

    Returns:
        The results, as written to results.json; None if `only` left runs for another call.

    Raises:
        ValueError: An arm does not go with the recipe; a cell is unknown, or takes its density from one that has not
            finished.
        FileExistsError: The folder holds runs of a different recipe, or other things.
        StudyInterrupted: The user pressed Ctrl-C; finished runs stay.
    """
    study = _Study(recipe, Path(out or recipe.study.out or Path("runs", recipe.path.stem)), console)
    return study.run(overwrite, only)


def study_cells(recipe: Recipe) -> list[str]:
    """Return the trainings of a recipe as "arm:seed", each of which can run alone; later ones may need earlier ones.

    With points "arm@point:seed". `one_shot` and `dense` of a seed are one training, named after `dense`.
    """
    study = _fitting_study(recipe)
    return [cell.name for cell in fits_in_order(study.arms, study.seeds, study.points)]


def study_needs(recipe: Recipe, out: Path, *, overwrite: bool = False) -> dict[str, list[str]]:
    """Return the trainings of a study that are not finished, in order, each with those that it needs before.

    Args:
        recipe: The parsed recipe.
        out: Folder of the results.
        overwrite: Move what the folder holds aside, so that none is finished.

    Raises:
        ValueError: As `run_study`.
        FileExistsError: The folder holds runs of a different recipe, or other things.
    """
    study = _Study(recipe, out, None)
    check_alone(recipe.trainer, "--jobs trains each cell")
    study.runner.check()
    try:
        study.store.open(study.resolved, overwrite)
        study.collect()
    finally:
        study.store.close()
    done = {job.fit.name for job in study.jobs if not any(study.is_open(cell) for cell in job.cells)}
    needed = {job.fit.name: [cell.name for cell in study.runner.needed(job.fit)] for job in study.jobs}
    return {name: needs for name, needs in needed.items() if name not in done}


def _fitting_study(recipe: Recipe) -> StudyConfig:
    """Return the study of a recipe with the arms that fit its target."""
    return dataclasses.replace(recipe.study, arms=fitting_arms(recipe.study.arms, recipe_config(recipe)))


def _names(job: TrainingJob) -> set[str]:
    return {cell.name for cell in (job.fit, *job.cells)}


class _Study:
    """One call of `run_study`."""

    def __init__(self, recipe: Recipe, out: Path, console: Console | None) -> None:
        self.recipe = recipe
        self.config = _fitting_study(recipe)
        self.ranks = Ranks(recipe.trainer)  # the one that was just made, to learn the settings
        self.console = console if console is not None and self.ranks.is_first else Console(quiet=True)
        resolved = recipe.resolved()
        self.resolved = {**resolved, "study": {**resolved["study"], "out": str(out)}}
        trained = what_trains(resolved)
        if self.ranks.world_size > 1:  # a batch is each rank's
            trained["world_size"] = self.ranks.world_size
        self.store = RunStore(out, digest(trained))
        self.jobs = plan_jobs(self.config.arms, self.config.seeds, self.config.points)
        self.records: dict[Cell, Record] = {}
        self.runner = CellRunner(recipe, self.config, self.store, self.records, self.ranks)

    @property
    def cells(self) -> list[Cell]:
        """All runs of the study, by arm, seed and point."""
        places = {arm: i for i, arm in enumerate(self.config.arms)}
        found = [cell for job in self.jobs for cell in job.cells]
        return sorted(found, key=lambda cell: (places[cell.arm], self.config.seeds.index(cell.seed)))

    def run(self, overwrite: bool, only: Sequence[str] | None) -> dict[str, Any] | None:
        self.runner.check()
        if self.ranks.started_elsewhere:
            self.ranks.join()
        try:
            return self._run(overwrite, only)
        finally:
            self.store.close()

    def _run(self, overwrite: bool, only: Sequence[str] | None) -> dict[str, Any] | None:
        cells = self.cells
        found = self.ranks.from_first(lambda: self._begin(overwrite, only))
        jobs = self._serving(only) if only else self.jobs
        own = [cell for job in jobs for cell in job.cells] if only else cells
        if self.ranks.from_first(lambda: any(self.is_open(cell) for cell in own)) and not self.ranks.started_elsewhere:
            self.ranks.join()  # where nobody else starts the others: they, too, begin with what was found
            self.ranks.from_first(lambda: found)
            self.ranks.from_first(lambda: True)
        self.records.update(found)
        seen = (self.store.out / "config.yaml").is_file()
        self.ranks.check_all(
            seen, f"{self.store.out} is not the same on all ranks: choose a folder that all hosts share"
        )
        with StudyProgress(self.console, len(cells), self.config.metric) as progress:
            progress.reused(len(self.records))
            try:
                for job in jobs:
                    self._run_job(job, progress)
                self._pair(own, progress)
            except KeyboardInterrupt as error:
                raise StudyInterrupted(len(self.records), len(cells)) from error
        return self.ranks.from_first(self._finish)

    def _begin(self, overwrite: bool, only: Sequence[str] | None) -> dict[Cell, Record]:
        """Open the folder and return the records that are there."""
        jobs = self._chosen(only) if only else ()
        if moved := self.store.open(self.resolved, overwrite, [job.fit for job in jobs]):
            self.console.print(f"moved the earlier contents to {moved}", highlight=False)
        self.collect()
        return dict(self.records)

    def _finish(self) -> dict[str, Any] | None:
        """Write and return the results, unless runs are left."""
        if any(self.is_open(cell) for cell in self.cells):
            return None
        results = self._results()
        write_atomically(self.store.out / "results.json", json.dumps(results, indent=1) + "\n")
        return results

    def collect(self) -> None:
        """Take up the records that are there."""
        for cell in self.cells:
            if record := self.store.finished(cell, self.runner.fingerprint(cell)):
                self._keep(cell, record)

    def is_open(self, cell: Cell) -> bool:
        """Whether a run has yet to be made, or to be set beside one-shot."""
        return cell not in self.records or self.runner.lacks_pair(cell)

    def _chosen(self, only: Sequence[str]) -> list[TrainingJob]:
        """Return the jobs of the named cells, checked before anything is written."""
        jobs = {name: job for job in self.jobs for name in _names(job)}
        chosen = self._serving(only)
        served = {name for job in chosen for name in _names(job)}
        for name in only:
            if name not in jobs:
                raise ValueError(f"no cell {name!r} in this study{nearest(name, jobs)}; cells: {', '.join(jobs)}")
            for needed in self.runner.needed(jobs[name].fit):
                if needed.name not in served and not self.store.finished(needed, self.runner.fingerprint(needed)):
                    raise ValueError(
                        f"{name} takes its density from {needed.name}, which has not finished in {self.store.out}; run "
                        f"--only {needed.name} first"
                    )
        return chosen

    def _serving(self, only: Sequence[str]) -> list[TrainingJob]:
        """Return the trainings behind the named cells; one-shot's is the dense one."""
        return [job for job in self.jobs if _names(job) & set(only)]

    def _run_job(self, job: TrainingJob, progress: StudyProgress) -> None:
        """Train once and record every cell that this training serves and that has no record yet."""
        missing = [cell for cell in job.cells if cell not in self.records]
        if not missing:
            return
        progress.begin(f"{job.fit.label} seed {job.fit.seed}")
        for cell, record in self.runner.run(job, missing, progress.on_step):
            self._save(cell, record)
            progress.done(cell.label, self.records[cell])
        gc.collect()  # model, data and trainer know each other: left to itself, that went after gigabytes

    def _pair(self, cells: Sequence[Cell], progress: StudyProgress) -> None:
        """Set one-shot at exactly its density beside each cell that has none yet."""
        found = self.ranks.from_first(lambda: [cell for cell in cells if self.runner.lacks_pair(cell)])
        lacking = sorted(found, key=lambda cell: cell.seed)
        for i, cell in enumerate(lacking):
            progress.begin(f"one-shot as dense as {cell.label}", i, len(lacking))
            self._save(cell, self.runner.pair(cell))

    def _save(self, cell: Cell, record: Record) -> None:
        identity = {
            "arm": cell.arm,
            "seed": cell.seed,
            "point": cell.point,
            "fingerprint": self.runner.fingerprint(cell),
        }
        self._keep(cell, self.ranks.from_first(lambda: self.store.save(cell, {**record, **identity})))

    def _keep(self, cell: Cell, record: Record) -> None:
        check_metric(self.config.metric, record["metrics"], record["arm"])
        self.records[cell] = record

    def _results(self) -> dict[str, Any]:
        study = self.config
        results: dict[str, Any] = {
            "schema": 1,
            "study": {
                "recipe": self.recipe.called,
                "metric": study.metric,
                "higher_is_better": study.higher_is_better,
                "reference": "one_shot" if "one_shot" in study.arms else study.arms[0],
                "arms": list(study.arms),
                "seeds": list(study.seeds),
                "points": list(study.points),
                "healing": study.healing,
                "margin": study.margin,
            },
            "environment": {**environment(), "processes": self.ranks.world_size},
            "runs": [self.records[cell] for cell in self.cells],
        }
        found = convergence(results)
        return {**results, "convergence": json.loads(json.dumps(dataclasses.asdict(found))) if found else None}


def what_trains(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a resolved recipe, and of the software, that decides how a run trains."""
    trained = {key: value for key, value in resolved.items() if key not in ("study", "seed_everything")}
    trainer = {key: value for key, value in trained["trainer"].items() if key not in _PRESENTATION}
    versions = {"emp_callbacks": emp_callbacks.__version__, "torch": torch.__version__}
    return {**trained, "trainer": trainer, "versions": versions}


def environment() -> dict[str, Any]:
    """Return versions, machine and date, for results."""
    return {
        "emp_callbacks": emp_callbacks.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "date": datetime.date.today().isoformat(),
    }
