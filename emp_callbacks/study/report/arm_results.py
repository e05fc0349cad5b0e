"""The runs of a study by arm, and one summary for each arm."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from emp_callbacks.study.arms import ARMS
from emp_callbacks.study.report.statistics import (
    Interval,
    PairedDifference,
    Verdict,
    all_differences,
    mean_interval,
    verdict,
)

SCHEMA = 1
Results = Mapping[str, Any]
Run = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ArmSummary:
    """One row of the table; `difference` and `verdict` are None for the reference and without common seed.

    `once`, `once_difference` and `once_verdict`: the arm that prunes in the same form once after training, where that
    is not the reference, and the comparison with it.
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


def arm_names(results: Results) -> list[str]:
    """Return the arms that have a run, in the order of the study."""
    present = {run["arm"] for run in results["runs"]}
    planned = [arm for arm in results["study"].get("arms", ()) if arm in present]
    return planned + sorted(present - set(planned))


def runs_of(results: Results, arm: str) -> list[Run]:
    """Return the runs of `arm`, by seed."""
    return sorted((run for run in results["runs"] if run["arm"] == arm), key=lambda run: run["seed"])


def first_training_arm(results: Results) -> str | None:
    """Return the first arm that prunes during training by N_eff (`training_...`), or None."""
    return next((arm for arm in arm_names(results) if arm.startswith("training_")), None)


def missing_runs(results: Results) -> list[tuple[str, int]]:
    """Return the planned (arm, seed) pairs without a run; not empty for an interrupted study."""
    done = {(run["arm"], run["seed"]) for run in results["runs"]}
    study = results["study"]
    return [(a, s) for a in study.get("arms", ()) for s in study.get("seeds", ()) if (a, s) not in done]


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
    counts = Counter((run["arm"], run["seed"]) for run in results["runs"])
    for (arm, seed), count in counts.items():
        if count > 1:
            raise ValueError(f"arm {arm!r}, seed {seed} occurs {count} times in the results: keep one of them")
    metric = results["study"]["metric"]
    known = sorted({name for run in results["runs"] for name in run["metrics"]})
    if metric not in known:
        names = ", ".join(known) or "none"
        raise ValueError(f"unknown metric {metric!r}; the runs hold: {names}. Set study.metric to one of them")


def summarise(results: Results) -> list[ArmSummary]:
    """Return one row per arm that has a run with the study's metric, in the order of the study.

    Differences to the reference arm are paired by seed; only seeds that both arms finished count.
    """
    check_results(results)
    study = results["study"]
    values = {arm: _metric_by_seed(results, arm) for arm in arm_names(results)}
    values = {arm: by_seed for arm, by_seed in values.items() if by_seed}
    reference = study.get("reference", "one_shot")
    once = {arm: ARMS[arm].once for arm in values if arm in ARMS}
    once = {arm: other for arm, other in once.items() if other in values and other != reference}
    differences = all_differences(values, [*((arm, reference) for arm in values if arm != reference), *once.items()])
    return [
        _arm_summary(results, arm, values[arm], differences.get((arm, reference)), other, differences.get((arm, other)))
        for arm, other in ((arm, once.get(arm)) for arm in values)
    ]


def _metric_by_seed(results: Results, arm: str) -> dict[int, float]:
    metric = results["study"]["metric"]
    return {run["seed"]: run["metrics"][metric] for run in runs_of(results, arm) if metric in run["metrics"]}


def _arm_summary(
    results: Results,
    arm: str,
    by_seed: Mapping[int, float],
    difference: PairedDifference | None,
    once: str | None,
    once_difference: PairedDifference | None,
) -> ArmSummary:
    runs = [run for run in runs_of(results, arm) if run["seed"] in by_seed]
    seconds = [run["seconds"] for run in runs if run.get("seconds") is not None]
    higher = results["study"]["higher_is_better"]
    return ArmSummary(
        arm=arm,
        seeds=tuple(by_seed),
        metric=mean_interval(list(by_seed.values())),
        density=mean_interval([run["density"] for run in runs]),
        difference=difference,
        verdict=verdict(difference, higher) if difference else None,
        seconds=float(np.mean(seconds)) if seconds else None,
        once=once,
        once_difference=once_difference,
        once_verdict=verdict(once_difference, higher) if once_difference else None,
    )
