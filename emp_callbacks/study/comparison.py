"""`emp compare`: the same training with each arm and seed, differing in nothing but the pruning."""

from __future__ import annotations

import dataclasses
import datetime
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import emp_callbacks
from emp_callbacks.config import EMPConfig
from emp_callbacks.study.arms import ARMS, TrainingJob, arm_config, fitting_arms, leading_arm, plan_jobs
from emp_callbacks.study.progress import StudyProgress
from emp_callbacks.study.recipe.check import nearest
from emp_callbacks.study.recipe.recipe import Recipe, StudyConfig
from emp_callbacks.study.report.convergence import convergence
from emp_callbacks.study.run_store import RunStore, digest, write_atomically
from emp_callbacks.study.training import Training, check_metric, recipe_config

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

    `one_shot` and `dense` of a seed are one training, named after `dense`.
    """
    return [_cell(job) for job in _ordered_jobs(_fitting_study(recipe))]


def _fitting_study(recipe: Recipe) -> StudyConfig:
    """Return the study of a recipe with the arms that fit its target."""
    return dataclasses.replace(recipe.study, arms=fitting_arms(recipe.study.arms, recipe_config(recipe)))


def _cell(job: TrainingJob) -> str:
    return f"{job.fit_arm}:{job.seed}"


def _ordered_jobs(study: StudyConfig) -> list[TrainingJob]:
    jobs = plan_jobs(study.arms, study.seeds)
    return sorted(jobs, key=lambda job: ARMS[job.fit_arm].follows_training_arm)


class _Study:
    """One call of `run_study`."""

    def __init__(self, recipe: Recipe, out: Path, console: Console | None) -> None:
        self.recipe = recipe
        self.config = _fitting_study(recipe)
        self.leader = leading_arm(self.config.arms)
        self.console = console or Console(quiet=True)
        resolved = recipe.resolved()
        self.resolved = {**resolved, "study": {**resolved["study"], "out": str(out)}}
        self.recipe_digest = digest(what_trains(resolved))
        self.store = RunStore(out, self.recipe_digest)
        self.records: dict[tuple[str, int], Record] = {}

    def run(self, overwrite: bool, only: Sequence[str] | None) -> dict[str, Any] | None:
        jobs = self._chosen(only) if only else plan_jobs(self.config.arms, self.config.seeds)
        try:
            return self._run(jobs, overwrite, alone=bool(only))
        finally:
            self.store.close()

    def _run(self, jobs: Sequence[TrainingJob], overwrite: bool, *, alone: bool) -> dict[str, Any] | None:
        total = len(self.config.arms) * len(self.config.seeds)
        trained = [(job.fit_arm, job.seed) for job in jobs] if alone else ()
        if moved := self.store.open(self.resolved, overwrite, trained):
            self.console.print(f"moved the earlier contents to {moved}", highlight=False)
        self._collect_finished()
        with StudyProgress(self.console, total, self.config.metric) as progress:
            progress.reused(len(self.records))
            try:
                for job in jobs:
                    self._run_job(job, progress)
            except KeyboardInterrupt as error:
                raise StudyInterrupted(len(self.records), total) from error
        if len(self.records) < total:
            return None
        results = self._results()
        write_atomically(self.store.out / "results.json", json.dumps(results, indent=1) + "\n")
        return results

    def _chosen(self, only: Sequence[str]) -> list[TrainingJob]:
        """Return the jobs of the named cells, checked before anything is written."""
        jobs = {_cell(job): job for job in _ordered_jobs(self.config)}
        for name in only:
            if name not in jobs:
                raise ValueError(f"no cell {name!r} in this study{nearest(name, jobs)}; cells: {', '.join(jobs)}")
            if ARMS[jobs[name].fit_arm].follows_training_arm and self.leader:
                needed = f"{self.leader}:{jobs[name].seed}"
                if needed not in only and not self._is_finished(self.leader, jobs[name].seed):
                    raise ValueError(
                        f"{name} takes its density from {needed}, which has not finished in {self.store.out}; run "
                        f"--only {needed} first"
                    )
        return [job for cell, job in jobs.items() if cell in only]

    def _is_finished(self, arm: str, seed: int) -> bool:
        return self.store.finished(arm, seed, self._fingerprint(arm, seed)) is not None

    def _collect_finished(self) -> None:
        for arm in self.config.arms:
            for seed in self.config.seeds:
                if record := self.store.finished(arm, seed, self._fingerprint(arm, seed)):
                    self._keep(record)

    def _run_job(self, job: TrainingJob, progress: StudyProgress) -> None:
        """Train once and record every arm that this training serves and that has no record yet."""
        missing = [arm for arm in job.arms if (arm, job.seed) not in self.records]
        if not missing:
            return
        progress.begin(f"{job.fit_arm} seed {job.seed}")
        folder = self.store.fresh_folder(job.fit_arm, job.seed)
        training = Training(self.recipe, job.seed, lambda base: self._emp_config(job, base), folder, progress.on_step)
        training.fit()
        for arm in missing:
            pruner = None
            if ARMS[arm].shares_fit_of:
                own_folder = self.store.fresh_folder(arm, job.seed)
                pruner = training.prune_once(arm_config(arm, training.recipe_config), own_folder)
            identity = {"arm": arm, "seed": job.seed, "fingerprint": self._fingerprint(arm, job.seed)}
            record = self.store.save({**identity, **training.record(pruner)})
            self._keep(record)
            progress.done(record)

    def _emp_config(self, job: TrainingJob, base: EMPConfig) -> EMPConfig:
        """Return the EMP settings of a job's training, given those of the recipe."""
        follows = ARMS[job.fit_arm].follows_training_arm and self.leader
        density = self.records[self.leader, job.seed]["density"] if follows and self.leader else 1.0
        return arm_config(job.fit_arm, base, self.leader, density)

    def _fingerprint(self, arm: str, seed: int) -> str:
        """Return a hash of everything that influences one run."""
        leader = self.leader if ARMS[arm].follows_training_arm else None
        parts = [dict(ARMS[name].settings) for name in (arm, leader) if name]
        return digest([self.recipe_digest, arm, leader, parts, seed])

    def _keep(self, record: Record) -> None:
        check_metric(self.config.metric, record["metrics"], record["arm"])
        self.records[record["arm"], record["seed"]] = record

    def _results(self) -> dict[str, Any]:
        arms, seeds = self.config.arms, self.config.seeds
        results: dict[str, Any] = {
            "schema": 1,
            "study": {
                "recipe": self.recipe.called,
                "metric": self.config.metric,
                "higher_is_better": self.config.higher_is_better,
                "reference": "one_shot" if "one_shot" in arms else arms[0],
                "arms": list(arms),
                "seeds": list(seeds),
            },
            "environment": environment(),
            "runs": [self.records[arm, seed] for arm in arms for seed in seeds],
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
        "date": datetime.date.today().isoformat(),
    }
