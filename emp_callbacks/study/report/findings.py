"""What a study found at equal density, in sentences: what speaks against EMP during training stands first."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from emp_callbacks.study.report.arm_results import REFERENCE, Results, arm_of, prunes_by_n_eff
from emp_callbacks.study.report.equal_density import Against, EqualDensityRow
from emp_callbacks.study.report.metric_format import MetricFormat
from emp_callbacks.study.report.statistics import SIGNIFICANCE

__all__ = ["findings"]

UNADJUSTED = "worse before adjustment"
_Pick = Callable[[EqualDensityRow], Against | None]


def findings(rows: Sequence[EqualDensityRow], results: Results) -> list[str]:
    """Return what the rows show of the arms in which N_eff decides during training: worse, better, equivalent, open.

    A loss that only the adjustment for the many other comparisons hides is told apart, before what is better.
    Empty if no such arm has a pair.
    """
    own = [row for row in rows if prunes_by_n_eff(arm_of(row.label)) and (row.one_shot or row.best)]
    if not own:
        return []
    metric = MetricFormat.of(results)
    others: list[tuple[str, _Pick]] = [
        (REFERENCE, lambda row: row.one_shot),  # also of a study that has no such arm: the pairs are with it
        ("the best fixed-density arm", lambda row: row.best),
    ]
    others = [(name, pick) for name, pick in others if any(map(pick, own))]
    higher = results["study"]["higher_is_better"]
    said = []
    for verdict in ("worse", UNADJUSTED, "better", "equivalent", "no difference shown", "undecided"):
        for name, pick in others:
            found = [(row, against) for row in own if (against := pick(row)) and _kind(against, higher) == verdict]
            if found:
                said.append(f"{_opening(verdict, name, results, metric)}: {_listed(found, name, metric)}.")
            elif verdict in ("worse", "better"):
                said.append(f"No EMP arm is shown to be {verdict} than {name} at equal density.")
    return said


def _kind(against: Against, higher_is_better: bool) -> str:
    """Return the verdict; UNADJUSTED for a loss that is one by its own p only."""
    p, lost = against.difference.p_value, (against.difference.mean < 0) == higher_is_better
    if against.verdict == "no difference shown" and lost and p is not None and p < SIGNIFICANCE:
        return UNADJUSTED
    return against.verdict


def _opening(verdict: str, name: str, results: Results, metric: MetricFormat) -> str:
    if verdict == "equivalent":
        return f"Equivalent to {name} at equal density, within {metric.margin(results['study']['margin'])}"
    if verdict == UNADJUSTED:
        return f"Worse than {name} at equal density before the adjustment for all comparisons, not after it"
    if verdict in ("worse", "better"):
        return f"{verdict.capitalize()} than {name} at equal density"
    return f"{verdict.capitalize()} against {name} at equal density"


def _listed(found: Sequence[tuple[EqualDensityRow, Against]], name: str, metric: MetricFormat) -> str:
    """Return "arm at 0.2 (+1.0 points), 0.1 (+2.0 points); other arm at ..."."""
    by_arm: dict[str, list[str]] = {}
    for row, against in found:
        place = f"{row.point:g} " if row.point is not None else ""
        to = f" to {arm_of(against.label)}" if name != arm_of(against.label) else ""
        shown = f"{place}({metric.difference(against.difference.mean)}{to})"
        by_arm.setdefault(arm_of(row.label), []).append(shown)
    return "; ".join(
        f"{arm}{' ' if places[0].startswith('(') else ' at '}{', '.join(places)}" for arm, places in by_arm.items()
    )
