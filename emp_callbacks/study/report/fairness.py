"""Under which conditions the arms of a study may be compared, and whether they held."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from emp_callbacks.study.arms import ARMS
from emp_callbacks.study.report.arm_results import (
    Results,
    Run,
    first_training_arm,
    is_pair,
    label_of,
    prunes_by_n_eff,
)

MATCHED_TOLERANCE = 0.005  # absolute difference of two densities, a fraction


@dataclass(frozen=True, slots=True)
class Check:
    """One fairness condition of a study and what was found."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True, slots=True)
class _Shared:
    """What all runs of a seed have in common, unless an arm differs by its nature and its runs say so."""

    key: str
    name: str
    differs: str  # in run["differs"]
    words: str


_SHARED = (
    _Shared("init_digest", "Same initial weights", "init", "other initial weights"),
    _Shared("batches_digest", "Same batches in the same order", "batches", "other batches"),
    _Shared("steps", "Same number of optimizer steps", "steps", "another number of steps"),
)


def fairness_checks(results: Results) -> list[Check]:
    """Return the conditions under which the arms may be compared; what was not recorded counts as failed.

    A run whose "differs" names a condition is not held to it; the check says so.
    """
    checks = [_same_within_seed(results, shared) for shared in _SHARED]
    runs = results["runs"]
    if any(_follows(run) and run.get("point") is None for run in runs):
        checks.append(_density_of_leader(results))
    if any(run.get("point") is not None for run in runs):
        checks.append(_density_of_point(results))
    if any(run.get("matched") for run in runs):
        checks.append(_matched_exactly(results))
    return checks


def _same_within_seed(results: Results, shared: _Shared) -> Check:
    key, faults = shared.key, []
    by_design = [run for run in results["runs"] if shared.differs in (run.get("differs") or ())]
    held = [run for run in results["runs"] if run not in by_design]
    seeds = sorted({run["seed"] for run in held})
    for seed in seeds:
        runs = [run for run in held if run["seed"] == seed]
        unrecorded = [label_of(run) for run in runs if run.get(key) is None]
        if unrecorded:
            faults.append(f"seed {seed}: {key} not recorded for {', '.join(unrecorded)}")
        by_value: dict[Any, list[str]] = {}
        for run in runs:
            if run.get(key) is not None:
                by_value.setdefault(run[key], []).append(label_of(run))
        if len(by_value) > 1:
            found = " | ".join(f"{_short(value)} ({', '.join(arms)})" for value, arms in by_value.items())
            faults.append(f"seed {seed}: {found}")
    said = "; ".join(faults) or f"{key} agrees over all arms within each seed ({len(seeds)} checked)"
    excused = "".join(f"; by design: {arm} has {shared.words}" for arm in _arms(by_design))
    return Check(shared.name, not faults, said + excused)


def _density_of_leader(results: Results) -> Check:
    """Check the arms of a study without points that take their density from a training arm."""
    leader = first_training_arm(results)
    target = _density_by_seed(results, leader)
    faults, largest = [], 0.0
    for run in results["runs"]:
        arm, seed, density = run["arm"], run["seed"], run["density"]
        if not _follows(run) or run.get("point") is not None:
            continue
        if seed not in target:
            faults.append(f"{arm}, seed {seed}: no training arm to match")
            continue
        largest = max(largest, abs(density - target[seed]))
        if not _near(density, target[seed]):
            faults.append(f"{arm}, seed {seed}: density {density:.4f}, {leader} has {target[seed]:.4f}")
    agreed = f"within {largest:.4f} of {leader} (allowed {MATCHED_TOLERANCE})"
    return Check("Same density as the training arm where matched", not faults, "; ".join(faults) or agreed)


def _density_of_point(results: Results) -> Check:
    """Check that arms have the density of their point; those whose count N_eff decides may end elsewhere: named."""
    faults, elsewhere, checked = [], [], 0
    for run in results["runs"]:
        point, seed, density = run.get("point"), run["seed"], run["density"]
        if point is None or _only_near(run):
            continue
        if _near(density, point):
            checked += 1
        elif prunes_by_n_eff(run["arm"]):
            elsewhere.append(run)
        else:
            faults.append(f"{label_of(run)}, seed {seed}: density {density:.4f}")
    said = "; ".join(faults) or f"{checked} runs within {MATCHED_TOLERANCE} of their point"
    named = ", ".join(dict.fromkeys(f"{label_of(run)} ({_mean_density(elsewhere, run):.3f})" for run in elsewhere))
    return Check("Density of the point", not faults, said + (f"; N_eff decides elsewhere: {named}" if named else ""))


def _matched_exactly(results: Results) -> Check:
    faults, pairs = [], 0
    unmatched = []
    for run in results["runs"]:
        matched = run.get("matched")
        if matched:
            pairs += 1
            if not is_pair(run, matched):
                faults.append(
                    f"{label_of(run)}, seed {run['seed']}: keeps {run.get('keep')}, {matched.get('arm')} there keeps "
                    f"{matched.get('keep')}"
                )
        elif prunes_by_n_eff(run["arm"]):
            unmatched.append(run)
    said = "; ".join(faults) or f"{pairs} runs, each beside the dense model of its seed pruned to the same count"
    named = "".join(f"; none recorded for {label}" for label in dict.fromkeys(map(label_of, unmatched)))
    return Check("One-shot pruned at exactly the same density", not faults, said + named)


def _only_near(run: Run) -> bool:
    """Whether an arm cannot meet a density exactly: it changes widths, or floors in many rows."""
    return run["arm"] in ARMS and "density" in ARMS[run["arm"]].differs


def _follows(run: Run) -> bool:
    """Whether a run's arm takes its density from the training arm."""
    return run.get("point") is None and run["arm"] in ARMS and ARMS[run["arm"]].density == "given"


def _near(density: float, target: float) -> bool:
    return abs(density - target) <= MATCHED_TOLERANCE + 1e-12


def _density_by_seed(results: Results, label: str | None) -> Mapping[int, float]:
    return {run["seed"]: run["density"] for run in results["runs"] if label_of(run) == label}


def _mean_density(runs: Iterable[Run], like: Run) -> float:
    return fmean(run["density"] for run in runs if label_of(run) == label_of(like))


def _arms(runs: Iterable[Run]) -> list[str]:
    return list(dict.fromkeys(run["arm"] for run in runs))


def _short(value: object) -> str:
    return value[:12] if isinstance(value, str) else str(value)
