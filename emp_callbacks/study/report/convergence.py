"""How soon an arm's validation metric is good."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from emp_callbacks.study.arms import ARMS
from emp_callbacks.study.report.arm_results import Results, Run, arm_names, arm_of, at_middle_point, runs_of
from emp_callbacks.study.report.statistics import (
    Interval,
    PairedDifference,
    Verdict,
    all_differences,
    mean_interval,
    metric_range,
    verdict,
)


@dataclass(frozen=True, slots=True)
class ArmConvergence:
    """How soon one arm's validation metric is good.

    Attributes:
        arm: An arm with a training of its own.
        area: Mean of the validation metric over the training, each point weighted by the steps since the one before.
        difference: Of `area` to that of the baseline; None for the baseline and without common seed.
        verdict: What the difference shows, by p adjusted for all arms of the table.
        seeds: Number of seeds with a curve.
        reached: Number of seeds that ever reach the target.
        first_step: First validation point at the target, over the seeds that reach it; None if none does.
        gap: Validation loss at the last point minus the mean training loss since the point before; None where the
            curve lacks one of them.
    """

    arm: str
    area: Interval
    difference: PairedDifference | None
    verdict: Verdict | None
    seeds: int
    reached: int
    first_step: Interval | None
    gap: Interval | None


@dataclass(frozen=True, slots=True)
class Convergence:
    """The validation curves of a study in numbers.

    Attributes:
        metric: Validation metric of the curves.
        baseline: Arm without EMP in training; None if the study has none.
        target: Mean over seeds of the baseline's last value; None without baseline.
        arms: One row per arm with a training of its own.
    """

    metric: str
    baseline: str | None
    target: float | None
    arms: tuple[ArmConvergence, ...]


def validation_metric(results: Results) -> str | None:
    """Return the validation twin of the study's metric (test/accuracy -> val/accuracy), None if absent."""
    wanted = "val/" + results["study"]["metric"].rpartition("/")[2]
    recorded = {name for run in results["runs"] for row in run.get("curve") or [] for name in row}
    return wanted if wanted in recorded else None


def trained_arms(results: Results) -> list[str]:
    """Return the labels with a training of their own; what is pruned after another arm's training has its curve."""
    labels = arm_names(results)
    arms = {arm_of(label) for label in labels}
    return [label for label in labels if _trained_as(label) == arm_of(label) or _trained_as(label) not in arms]


def curve_of(run: Run, metric: str) -> dict[int, float]:
    """Return step -> value of a validation metric, in the order of the steps."""
    return {row["step"]: row[metric] for row in run.get("curve") or [] if row.get(metric) is not None}


def convergence(results: Results) -> Convergence | None:
    """Compare the validation curves of the trainings with that of dense training; None where no curve was recorded.

    Differences are paired by seed. First steps are not tested: seeds that never get there would be left out. Of a
    study at several points only the one in the middle is shown.
    """
    results = at_middle_point(results)
    metric = validation_metric(results)
    if metric is None:
        return None
    curves = {arm: _curves(results, arm, metric) for arm in trained_arms(results)}
    curves = {arm: by_seed for arm, by_seed in curves.items() if by_seed}
    areas = {arm: {seed: _area(curve) for seed, curve in by_seed.items()} for arm, by_seed in curves.items()}
    baseline = next((arm for arm in curves if _trained_as(arm) == "dense"), None)
    within = metric_range(metric, (value for by_seed in areas.values() for value in by_seed.values()))
    differences = all_differences(areas, [(arm, baseline) for arm in areas if arm != baseline], within)
    target = None
    if baseline:
        target = mean_interval([list(curve.values())[-1] for curve in curves[baseline].values()]).mean
    higher = results["study"]["higher_is_better"]
    rows = []
    for arm, by_seed in curves.items():
        steps = [_first_step(curve, target, higher) for curve in by_seed.values()]
        difference = differences.get((arm, baseline))
        row = ArmConvergence(
            arm=arm,
            area=mean_interval(list(areas[arm].values()), within=within),
            difference=difference,
            verdict=verdict(difference, higher) if difference else None,
            seeds=len(steps),
            reached=sum(step is not None for step in steps),
            first_step=_interval([float(step) for step in steps if step is not None]),
            gap=_interval([gap for run in runs_of(results, arm) if (gap := _gap(run)) is not None]),
        )
        rows.append(row)
    return Convergence(metric, baseline, target, tuple(rows))


def _curves(results: Results, arm: str, metric: str) -> dict[int, dict[int, float]]:
    """Return seed -> step -> value, without the runs that recorded none."""
    curves = {run["seed"]: curve_of(run, metric) for run in runs_of(results, arm)}
    return {seed: curve for seed, curve in curves.items() if curve}


def _interval(values: Sequence[float]) -> Interval | None:
    return mean_interval(values) if values else None


def _trained_as(label: str) -> str:
    """Return the arm whose training an arm, given by its label, is measured on."""
    arm = arm_of(label)
    return (ARMS[arm].shares_fit_of if arm in ARMS else None) or arm


def _area(curve: Mapping[int, float]) -> float:
    steps = np.array(list(curve), dtype=np.float64)
    return float(np.average(list(curve.values()), weights=np.diff(steps, prepend=0.0)))


def _first_step(curve: Mapping[int, float], target: float | None, higher_is_better: bool) -> int | None:
    if target is None:
        return None
    at_target = (step for step, value in curve.items() if (value >= target if higher_is_better else value <= target))
    return next(at_target, None)


def _gap(run: Run) -> float | None:
    last = (run.get("curve") or [{}])[-1]
    return last["val/loss"] - last["train/loss"] if {"val/loss", "train/loss"} <= last.keys() else None
