"""Statistics of a study: intervals over seeds, differences paired by seed, fairness checks.

Intervals are per comparison (95 %, Student t). The verdicts better / worse rest on Holm-adjusted p-values of
all comparisons with the reference, so an interval may exclude 0 where the verdict is "no difference shown".
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from scipy import stats

from emp_callbacks.study.arms import ARMS

SCHEMA = 1
SIGNIFICANCE = 0.05
MATCHED_ARMS = ("fixed_magnitude", "random")
MATCHED_TOLERANCE = 0.005  # absolute difference of two densities, a fraction

Results = Mapping[str, Any]
Run = Mapping[str, Any]
Pair = tuple[str, str | None]  # an arm and the one that it is compared with
Verdict = Literal["better", "worse", "no difference shown", "undecided"]


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over `n` seeds; `low` and `high` are None without an interval (n < 2, or a value not finite)."""

    mean: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """Mean of value - reference over `n` seeds; `p_value` is None where the t-test is undefined.

    `p_holm` is `p_value` adjusted for all comparisons of the study.
    """

    mean: float
    low: float | None
    high: float | None
    n: int
    p_value: float | None
    p_holm: float | None = None


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


@dataclass(frozen=True, slots=True)
class Check:
    """One fairness condition of a study and what was found."""

    name: str
    passed: bool
    detail: str


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Return the mean of `values` with its two-sided Student t interval.

    One value has a mean but no interval: `low` and `high` are None. Equal values give an interval of width 0.

    Raises:
        ValueError: If `values` is empty or `confidence` is not in (0, 1).

    Example:
        >>> mean_interval([0.5])
        Interval(mean=0.5, low=None, high=None, n=1)
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie in (0, 1), got {confidence}; use 0.95 for a 95 % interval")
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        raise ValueError("mean_interval needs at least one value, got none")
    mean = float(array.mean()) if np.isfinite(array).all() else math.nan
    if array.size == 1 or not math.isfinite(mean):
        return Interval(mean, None, None, int(array.size))
    spread = float(array.std(ddof=1)) / math.sqrt(array.size)
    half = float(stats.t.ppf(0.5 + confidence / 2, array.size - 1)) * spread
    return Interval(mean, mean - half, mean + half, int(array.size))


def paired_difference(
    values: Mapping[int, float], reference: Mapping[int, float], confidence: float = 0.95
) -> PairedDifference | None:
    """Return the mean of `values` - `reference` over the seeds that both hold, or None if they share no seed.

    Both map seed -> metric. The p-value is that of the two-sided paired t-test; it is None for one pair, for
    identical differences (no variance) and where a value is not finite.

    Example:
        >>> paired_difference({0: 0.75}, {0: 0.5, 1: 0.5})
        PairedDifference(mean=0.25, low=None, high=None, n=1, p_value=None, p_holm=None)
    """
    seeds = sorted(set(values) & set(reference))
    if not seeds:
        return None
    pairs = np.array([(values[seed], reference[seed]) for seed in seeds], dtype=np.float64)
    if not np.isfinite(pairs).all():
        return PairedDifference(math.nan, None, None, len(seeds), None)
    differences = pairs[:, 0] - pairs[:, 1]
    # 0.3 - 0.2 and 0.2 - 0.1 differ in the last bit: rounding must not pass for a "significant" variance.
    if float(np.ptp(differences)) <= 1e-12 * float(np.abs(pairs).max()):
        differences = np.full_like(differences, np.median(differences))
    interval = mean_interval(differences.tolist(), confidence)
    p_value = None
    if len(seeds) > 1 and np.ptp(differences) > 0:
        p_value = float(stats.ttest_1samp(differences, 0.0).pvalue)
    return PairedDifference(interval.mean, interval.low, interval.high, interval.n, p_value)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Return Holm's step-down adjusted p-values in the given order; None (no test) stays None, uncounted.

    Source: Holm, "A simple sequentially rejective multiple test procedure", Scand. J. Statist. 6 (1979).

    Example:
        >>> holm([0.25, None, 0.125])
        [0.25, None, 0.25]
    """
    order = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p))
        adjusted[index] = largest
    return adjusted


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
    differences = _differences(values, [*((arm, reference) for arm in values if arm != reference), *once.items()])
    return [
        _arm_summary(results, arm, values[arm], differences.get((arm, reference)), other, differences.get((arm, other)))
        for arm, other in ((arm, once.get(arm)) for arm in values)
    ]


def _differences(
    values: Mapping[str, Mapping[int, float]], pairs: Sequence[Pair]
) -> dict[Pair, PairedDifference | None]:
    """Return the difference of each pair of arms, the first minus the second, with p adjusted for all of them.

    Args:
        values: Arm -> seed -> value.
        pairs: The second need not have values.
    """
    found = [paired_difference(values[arm], values.get(other or "", {})) for arm, other in pairs]
    adjusted = holm([difference.p_value if difference else None for difference in found])
    return {
        pair: replace(difference, p_holm=p) if difference else None
        for pair, difference, p in zip(pairs, found, adjusted, strict=True)
    }


def validation_metric(results: Results) -> str | None:
    """Return the validation twin of the study's metric (test/accuracy -> val/accuracy), None if absent."""
    wanted = "val/" + results["study"]["metric"].rpartition("/")[2]
    recorded = {name for run in results["runs"] for row in run.get("curve") or [] for name in row}
    return wanted if wanted in recorded else None


def trained_arms(results: Results) -> list[str]:
    """Return the arms with a training of their own; what is pruned after another arm's training has its curve."""
    arms = arm_names(results)
    return [arm for arm in arms if _trained_as(arm) == arm or _trained_as(arm) not in arms]


def curve_of(run: Run, metric: str) -> dict[int, float]:
    """Return step -> value of a validation metric, in the order of the steps."""
    return {row["step"]: row[metric] for row in run.get("curve") or [] if row.get(metric) is not None}


def convergence(results: Results) -> Convergence | None:
    """Compare the validation curves of the trainings with that of dense training; None where no curve was recorded.

    Differences are paired by seed. First steps are not tested: seeds that never get there would be left out.
    """
    metric = validation_metric(results)
    if metric is None:
        return None
    curves = {arm: _curves(results, arm, metric) for arm in trained_arms(results)}
    curves = {arm: by_seed for arm, by_seed in curves.items() if by_seed}
    areas = {arm: {seed: _area(curve) for seed, curve in by_seed.items()} for arm, by_seed in curves.items()}
    baseline = next((arm for arm in curves if _trained_as(arm) == "dense"), None)
    differences = _differences(areas, [(arm, baseline) for arm in areas if arm != baseline])
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
            area=mean_interval(list(areas[arm].values())),
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


def _trained_as(arm: str) -> str:
    """Return the arm whose training an arm is measured on."""
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


def verdict(difference: PairedDifference, higher_is_better: bool) -> Verdict:
    """Say what `difference` shows at Holm-adjusted p < 0.05; "undecided" where no test was possible."""
    p = difference.p_holm if difference.p_holm is not None else difference.p_value
    if p is None:
        return "undecided"
    if p >= SIGNIFICANCE:
        return "no difference shown"
    return "better" if (difference.mean > 0) == higher_is_better else "worse"


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
