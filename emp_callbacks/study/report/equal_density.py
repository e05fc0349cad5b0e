"""The arms of a study against one-shot pruning at equal density, and against the best arm of that density."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from emp_callbacks.study.arms import ARMS
from emp_callbacks.study.report.arm_results import (
    REFERENCE,
    Results,
    Run,
    arm_of,
    is_pair,
    labelled,
    metric_by_label,
    prunes_by_n_eff,
    runs_of,
    value_range,
)
from emp_callbacks.study.report.fairness import MATCHED_TOLERANCE
from emp_callbacks.study.report.statistics import (
    Equivalence,
    Interval,
    PairedDifference,
    Range,
    Verdict,
    adjusted,
    equivalence,
    mean_interval,
    paired_difference,
    verdict,
)

__all__ = ["Against", "EqualDensityRow", "equal_density"]

_BySeed = Mapping[str, Mapping[int, float]]  # label -> seed -> value


@dataclass(frozen=True, slots=True)
class Against:
    """The comparison of an arm with another one of the same density.

    Attributes:
        label: The other.
        metric: Its mean over the common seeds.
        density: The same of its density.
        difference: Arm minus other, paired by seed; p is adjusted for all comparisons of the table.
        equivalence: Whether they differ by less than the study's margin, adjusted alike; None without margin or test.
        verdict: What that shows.
    """

    label: str
    metric: float
    density: float
    difference: PairedDifference
    equivalence: Equivalence | None
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class EqualDensityRow:
    """An arm at a point.

    Attributes:
        label: Of the arm and the point.
        point: Density that was asked for; None where the arm decides it.
        metric: Over seeds.
        density: Kept / all that may be pruned, over seeds.
        one_shot: Against the dense model of the same seed, pruned once to exactly the same count; None without pair.
        best: Against the best arm, by its mean, of those whose density is set in advance and equal within
            MATCHED_TOLERANCE; only for arms in which N_eff decides. It is chosen by the runs that it is compared on,
            which favours it.
        compression: All that may be pruned / kept.
        inference: Forward FLOPs that masks leave / those of the dense net.
        training: Training FLOPs / those of dense training.
        explored: Share of the weights that were ever active during training.

    The last four are means over seeds, None where not recorded.
    """

    label: str
    point: float | None
    metric: Interval
    density: Interval
    one_shot: Against | None
    best: Against | None
    compression: float | None
    inference: float | None
    training: float | None
    explored: float | None


@dataclass(frozen=True, slots=True)
class _Pairing:
    """The values of two arms, by seed, and the other's density."""

    label: str
    values: Mapping[int, float]
    others: Mapping[int, float]
    density: float


def equal_density(results: Results) -> list[EqualDensityRow]:
    """Return the rows of all arms but dense, from the highest density to the lowest.

    One-shot pruning is a run's "matched"; for a run without it, the reference's run of the same seed and point if it
    keeps the same count. Seeds without such a pair, or with one that keeps another count, are left out. Without any
    pair there are no rows.
    """
    values = metric_by_label(results)
    densities = {label: {run["seed"]: run["density"] for run in runs_of(results, label)} for label in values}
    labels = [label for label in values if arm_of(label) != "dense"]
    one_shot = [_with_one_shot(results, label) for label in labels]
    if not any(one_shot):
        return []
    best = [_with_best(results, label, values, densities) for label in labels]
    found = _compared(results, [*one_shot, *best])
    rows = [_row(results, label, *pair) for label, *pair in zip(labels, found, found[len(labels) :], strict=False)]
    return sorted(rows, key=lambda row: -(row.density.mean if row.point is None else row.point))


def _with_one_shot(results: Results, label: str) -> _Pairing | None:
    metric = results["study"]["metric"]
    if arm_of(label) == REFERENCE:
        return None
    values, others, densities = {}, {}, []
    for run in runs_of(results, label):
        other = _one_shot_of(results, run)
        if other and metric in run["metrics"] and metric in other["metrics"]:
            values[run["seed"]], others[run["seed"]] = run["metrics"][metric], other["metrics"][metric]
            densities.append(other["density"])
    return _Pairing(REFERENCE, values, others, fmean(densities)) if values else None


def _one_shot_of(results: Results, run: Run) -> Run | None:
    """Return what the dense model of a run's seed gives at exactly the run's count, None if that is not known."""
    other: Run | None = run.get("matched")
    if not other and run.get("point") is not None:
        there = runs_of(results, labelled(REFERENCE, run["point"]))
        other = next((found for found in there if found["seed"] == run["seed"]), None)
    return other if other and is_pair(run, other) else None


def _with_best(results: Results, label: str, values: _BySeed, densities: _BySeed) -> _Pairing | None:
    if not prunes_by_n_eff(arm_of(label)):
        return None
    own = values[label]
    rivals = []
    for rival, others in values.items():
        common = sorted(own.keys() & others.keys())
        if common and _is_set_in_advance(results, rival) and _equal(densities[label], densities[rival], common):
            density = fmean(densities[rival][seed] for seed in common)
            rivals.append(_Pairing(rival, {s: own[s] for s in common}, {s: others[s] for s in common}, density))

    def rank(pair: _Pairing) -> tuple[int, float]:
        # Of arms with fewer seeds none is taken while another has all of them, and none that diverged.
        mean = fmean(pair.others.values()) * (1 if results["study"]["higher_is_better"] else -1)
        return len(pair.others), mean if math.isfinite(mean) else -math.inf

    return max(rivals, key=rank, default=None)


def _is_set_in_advance(results: Results, label: str) -> bool:
    arm = arm_of(label)
    if arm in ("dense", results["study"].get("reference", REFERENCE)) or prunes_by_n_eff(arm):
        return False
    return arm != label or (arm in ARMS and ARMS[arm].density == "given")


def _equal(densities: Mapping[int, float], others: Mapping[int, float], seeds: Sequence[int]) -> bool:
    return all(abs(densities[seed] - others[seed]) <= MATCHED_TOLERANCE + 1e-12 for seed in seeds)


def _compared(results: Results, pairings: Sequence[_Pairing | None]) -> list[Against | None]:
    """Test all comparisons of the table as one family, and all equivalences as another."""
    within: Range = value_range(results)
    margin, higher = results["study"].get("margin"), results["study"]["higher_is_better"]
    differences = adjusted(
        [paired_difference(pair.values, pair.others, within=within) if pair else None for pair in pairings]
    )
    tests = adjusted([equivalence(found, margin) if found and margin is not None else None for found in differences])
    return [
        Against(pair.label, fmean(pair.others.values()), pair.density, found, tost, verdict(found, higher, tost))
        if pair and found
        else None
        for pair, found, tost in zip(pairings, differences, tests, strict=True)
    ]


def _row(results: Results, label: str, one_shot: Against | None, best: Against | None) -> EqualDensityRow:
    metric = results["study"]["metric"]
    runs = [run for run in runs_of(results, label) if metric in run["metrics"]]
    return EqualDensityRow(
        label=label,
        point=runs[0].get("point"),
        metric=mean_interval([run["metrics"][metric] for run in runs], within=value_range(results)),
        density=mean_interval([run["density"] for run in runs], within=(0.0, 1.0)),
        one_shot=one_shot,
        best=best,
        compression=_mean(runs, lambda run: _ratio(run.get("n"), run.get("keep"))),
        inference=_mean(runs, lambda run: _ratio(*_flops(run, "inference", "dense"))),
        training=_mean(runs, lambda run: _ratio(*_flops(run, "training", "dense_training"))),
        explored=_mean(runs, lambda run: run.get("explored")),
    )


def _mean(runs: Sequence[Run], value: Callable[[Run], float | None]) -> float | None:
    """Return the mean over the runs; None unless all of them have a value."""
    values = [value(run) for run in runs]
    known = [found for found in values if found is not None]
    return fmean(known) if len(known) == len(values) else None


def _flops(run: Run, *names: str) -> list[float | None]:
    return [(run.get("flops") or {}).get(name) for name in names]


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None
