"""Under which conditions the arms of a study may be compared, and whether they held."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from emp_callbacks.study.report.arm_results import Results, first_training_arm, runs_of

MATCHED_ARMS = ("fixed_magnitude", "random")
MATCHED_TOLERANCE = 0.005  # absolute difference of two densities, a fraction


@dataclass(frozen=True, slots=True)
class Check:
    """One fairness condition of a study and what was found."""

    name: str
    passed: bool
    detail: str


def fairness_checks(results: Results) -> list[Check]:
    """Return the conditions under which the arms may be compared; what was not recorded counts as failed."""
    checks = [
        _same_within_seed(results, "init_digest", "Same initial weights"),
        _same_within_seed(results, "batches_digest", "Same batches in the same order"),
        _same_within_seed(results, "steps", "Same number of optimizer steps"),
    ]
    if any(run["arm"] in MATCHED_ARMS for run in results["runs"]):
        checks.append(_matched_density(results))
    return checks


def _same_within_seed(results: Results, key: str, name: str) -> Check:
    faults = []
    seeds = sorted({run["seed"] for run in results["runs"]})
    for seed in seeds:
        runs = [run for run in results["runs"] if run["seed"] == seed]
        unrecorded = [run["arm"] for run in runs if run.get(key) is None]
        if unrecorded:
            faults.append(f"seed {seed}: {key} not recorded for {', '.join(unrecorded)}")
        by_value: dict[Any, list[str]] = {}
        for run in runs:
            if run.get(key) is not None:
                by_value.setdefault(run[key], []).append(run["arm"])
        if len(by_value) > 1:
            found = " | ".join(f"{_short(value)} ({', '.join(arms)})" for value, arms in by_value.items())
            faults.append(f"seed {seed}: {found}")
    agreed = f"{key} agrees over all arms within each seed ({len(seeds)} checked)"
    return Check(name, not faults, "; ".join(faults) or agreed)


def _matched_density(results: Results) -> Check:
    leader = first_training_arm(results)
    target = {run["seed"]: run["density"] for run in runs_of(results, leader)} if leader else {}
    faults, largest = [], 0.0
    for run in results["runs"]:
        arm, seed, density = run["arm"], run["seed"], run["density"]
        if arm not in MATCHED_ARMS:
            continue
        if seed not in target:
            faults.append(f"{arm}, seed {seed}: no training arm to match")
            continue
        largest = max(largest, abs(density - target[seed]))
        if not abs(density - target[seed]) <= MATCHED_TOLERANCE + 1e-12:
            faults.append(f"{arm}, seed {seed}: density {density:.4f}, {leader} has {target[seed]:.4f}")
    agreed = f"within {largest:.4f} of {leader} (allowed {MATCHED_TOLERANCE})"
    return Check("Same density as the training arm where matched", not faults, "; ".join(faults) or agreed)


def _short(value: object) -> str:
    return value[:12] if isinstance(value, str) else str(value)
