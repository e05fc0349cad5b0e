"""The runs of a study by arm and point, and one summary for each.

A study may train its arms at several densities, its points. An arm at a point is what is compared: its label is
"arm @ 0.1", and "arm" where there is no point. Everything here goes by labels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from emp_callbacks.study.arms import ARMS
from emp_callbacks.study.report.statistics import (
    Interval,
    Pair,
    PairedDifference,
    Range,
    Verdict,
    all_differences,
    mean_interval,
    metric_range,
    verdict,
)

SCHEMA = 1
REFERENCE = "one_shot"
_AT = " @ "
Results = Mapping[str, Any]
Run = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ArmSummary:
    """One row of the table; `difference` and `verdict` are None for the reference and without common seed.

    `arm` and all other names are labels. `reference`: what it is compared with, None where that has no run at the
    same point. `once`, `once_difference` and `once_verdict`: the arm that prunes in the same form once after training,
    where that is not the reference, and the comparison with it.
    """

    arm: str
    seeds: tuple[int, ...]
    metric: Interval
    density: Interval
    difference: PairedDifference | None
    verdict: Verdict | None
    seconds: float | None
    once: str | None = None
    once_difference: PairedDifference | None = None
    once_verdict: Verdict | None = None
    reference: str | None = None


def labelled(arm: str, point: float | None) -> str:
    """Return the label of an arm at a point.

    Examples:
        >>> labelled("random", 0.1), labelled("dense", None)
        ('random @ 0.1', 'dense')
    """
    return arm if point is None else f"{arm}{_AT}{point:g}"


def label_of(run: Run) -> str:
    """Return the label of a run."""
    return labelled(run["arm"], run.get("point"))


def is_pair(run: Run, other: Run) -> bool:
    """Return whether two runs keep the same count: up to a thousandth of all, which floors in many groups may lose."""
    if run.get("keep") is None or other.get("keep") is None:
        return False
    return bool(abs(run["keep"] - other["keep"]) <= run.get("n", 0) / 1000)


def arm_of(label: str) -> str:
    """Return the arm of a label."""
    return label.partition(_AT)[0]


def points_of(results: Results) -> list[float]:
    """Return the densities at which the study trains its arms, from high to low; empty for a study without points."""
    return sorted(results["study"].get("points") or (), reverse=True)


def arm_names(results: Results) -> list[str]:
    """Return the labels that have a run, in the order of the study, each arm from its highest point to its lowest."""
    planned = list(results["study"].get("arms", ()))
    found = {label_of(run): run for run in results["runs"]}

    def order(label: str) -> tuple[int, str, float]:
        arm = found[label]["arm"]
        return planned.index(arm) if arm in planned else len(planned), arm, -(found[label].get("point") or 2.0)

    return sorted(found, key=order)


def runs_of(results: Results, label: str) -> list[Run]:
    """Return the runs of a label, by seed."""
    return sorted((run for run in results["runs"] if label_of(run) == label), key=lambda run: run["seed"])


def prunes_by_n_eff(arm: str) -> bool:
    """Return whether N_eff decides during an arm's training how much is kept."""
    return ARMS[arm].trains_with_emp if arm in ARMS else arm.startswith(("training_", "emp_"))


def reference_label(results: Results, label: str) -> str | None:
    """Return the label with which another is compared, at the same point; None without a run there."""
    arm = str(results["study"].get("reference", REFERENCE))
    reference = arm + label[len(arm_of(label)) :]
    return reference if reference in map(label_of, results["runs"]) else None


def first_training_arm(results: Results) -> str | None:
    """Return the label of the first arm that prunes during training by N_eff, or None."""
    return next((label for label in arm_names(results) if prunes_by_n_eff(arm_of(label))), None)


def middle_point(results: Results) -> float | None:
    """Return the point in the middle of the study's, the lower of two; None for a study without points."""
    points = points_of(results)
    return points[len(points) // 2] if points else None


def at_middle_point(results: Results) -> Results:
    """Return the results with the runs of the middle point and those without a point: curves of one density each."""
    if (middle := middle_point(results)) is None:
        return results
    runs = [run for run in results["runs"] if run.get("point") in (None, middle)]
    return {**results, "study": {**results["study"], "points": [middle]}, "runs": runs}


def missing_runs(results: Results) -> list[tuple[str, int]]:
    """Return the planned (label, seed) pairs without a run; not empty for an interrupted study.

    An arm is taken to run at every point if one of its runs has a point; one without any run counts once per seed.
    """
    done = {(label_of(run), run["seed"]) for run in results["runs"]}
    with_points = {run["arm"] for run in results["runs"] if run.get("point") is not None}
    study = results["study"]
    return [
        (label, seed)
        for arm in study.get("arms", ())
        for label in ([labelled(arm, point) for point in points_of(results)] if arm in with_points else [arm])
        for seed in study.get("seeds", ())
        if (label, seed) not in done
    ]


def check_results(results: Results) -> None:
    """Refuse results that cannot be summarised.

    Raises:
        ValueError: On another schema, without runs, if a run occurs twice, or if no run holds the metric.
    """
    if results.get("schema") != SCHEMA:
        found = results.get("schema")
        raise ValueError(f"results have schema {found!r}, this version reads {SCHEMA}: run `emp compare` again")
    if not results["runs"]:
        raise ValueError("results hold no runs: let `emp compare` finish at least one")
    counts = Counter((label_of(run), run["seed"]) for run in results["runs"])
    for (arm, seed), count in counts.items():
        if count > 1:
            raise ValueError(f"arm {arm!r}, seed {seed} occurs {count} times in the results: keep one of them")
    metric = results["study"]["metric"]
    known = sorted({name for run in results["runs"] for name in run["metrics"]})
    if metric not in known:
        names = ", ".join(known) or "none"
        raise ValueError(f"unknown metric {metric!r}; the runs hold: {names}. Set study.metric to one of them")


def summarise(results: Results) -> list[ArmSummary]:
    """Return one row per label that has a run with the study's metric, in the order of the study.

    Differences to the reference arm at the same point are paired by seed; only seeds that both finished count.
    """
    check_results(results)
    values = metric_by_label(results)
    references = {label: reference_label(results, label) for label in values}
    once = {label: _once_of(label) for label in values}
    once = {label: other for label, other in once.items() if other in values and other != references[label]}
    to_reference = [(label, reference) for label, reference in references.items() if reference not in (None, label)]
    differences = all_differences(values, [*to_reference, *once.items()], value_range(results))
    return [
        _arm_summary(results, label, values[label], references[label], once.get(label), differences) for label in values
    ]


def metric_by_label(results: Results) -> dict[str, dict[int, float]]:
    """Return label -> seed -> value of the study's metric, in the order of the study."""
    metric = results["study"]["metric"]
    values = {
        label: {run["seed"]: run["metrics"][metric] for run in runs_of(results, label) if metric in run["metrics"]}
        for label in arm_names(results)
    }
    return {label: by_seed for label, by_seed in values.items() if by_seed}


def value_range(results: Results) -> Range:
    """Return the range of the study's metric."""
    metric = results["study"]["metric"]
    return metric_range(metric, (run["metrics"][metric] for run in results["runs"] if metric in run["metrics"]))


def _once_of(label: str) -> str | None:
    arm = arm_of(label)
    once = ARMS[arm].once if arm in ARMS else None
    return once + label[len(arm) :] if once else None


def _arm_summary(
    results: Results,
    label: str,
    by_seed: Mapping[int, float],
    reference: str | None,
    once: str | None,
    differences: Mapping[Pair, PairedDifference | None],
) -> ArmSummary:
    runs = [run for run in runs_of(results, label) if run["seed"] in by_seed]
    seconds = [run["seconds"] for run in runs if run.get("seconds") is not None]
    higher = results["study"]["higher_is_better"]
    difference, once_difference = differences.get((label, reference)), differences.get((label, once))
    return ArmSummary(
        arm=label,
        seeds=tuple(by_seed),
        metric=mean_interval(list(by_seed.values()), within=value_range(results)),
        density=mean_interval([run["density"] for run in runs], within=(0.0, 1.0)),
        difference=difference,
        verdict=verdict(difference, higher) if difference else None,
        seconds=float(np.mean(seconds)) if seconds else None,
        once=once,
        once_difference=once_difference,
        once_verdict=verdict(once_difference, higher) if once_difference else None,
        reference=reference,
    )
