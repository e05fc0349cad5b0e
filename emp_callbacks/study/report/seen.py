"""What is seen in the figures of a study and of a run, in words, for those who do not see them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from emp_callbacks.study.report.arm_results import ArmSummary, Results, arm_of, points_of, summarise
from emp_callbacks.study.report.convergence import convergence
from emp_callbacks.study.report.metric_format import MetricFormat
from emp_callbacks.study.report.plots import (
    Series,
    density_curves,
    group_series,
    layer_density,
    learning_curves,
    n_eff_curves,
)

__all__ = ["SEEN", "trajectory_seen"]


def metric_density_seen(results: Results) -> str:
    """Say which arm is best and which is worst at each density, beside dense."""
    metric, rows = MetricFormat.of(results), summarise(results)
    said = [f"dense has {metric.value(row.metric.mean)}" for row in rows if row.arm == "dense"]
    if not points_of(results):
        shown = [f"{row.arm} {metric.value(row.metric.mean)} at density {row.density.mean:.3f}" for row in rows]
        return f"{results['study']['metric']} of each arm: {'; '.join(shown)}."
    for point in points_of(results):
        at = [row for row in rows if row.arm.endswith(f" @ {point:g}")]
        if at:
            best, worst = (_extreme(at, results, end) for end in (True, False))
            said.append(
                f"at density {point:g} {arm_of(best.arm)} is best ({metric.value(best.metric.mean)}) and "
                f"{arm_of(worst.arm)} worst ({metric.value(worst.metric.mean)})"
            )
    return f"{results['study']['metric']}: {'; '.join(said)}."


def _extreme(rows: Sequence[ArmSummary], results: Results, best: bool) -> ArmSummary:
    pick = max if best == bool(results["study"]["higher_is_better"]) else min
    return pick(rows, key=lambda row: row.metric.mean)


def n_eff_seen(results: Results) -> str:
    """Say how N_eff / N of each arm moves."""
    return f"N_eff / N over the training: {_moves(n_eff_curves(results), '{:.2f}'.format)}."


def density_seen(results: Results) -> str:
    """Say how the density of each arm moves."""
    return f"Density over the training: {_moves(density_curves(results), '{:.2f}'.format)}."


def learning_seen(results: Results) -> str:
    """Say where the validation metric of each arm begins and ends."""
    found, percent = convergence(results), MetricFormat.of(results).percent
    if found is None:
        return "Empty: no validation metric was recorded."
    shown = "{:.1f} %".format if percent else "{:.3g}".format
    return f"{found.metric} over the training: {_moves(learning_curves(results), shown)}."


def _moves(curves: Mapping[str, Sequence[Series]], shown: Callable[[float], str]) -> str:
    """Return "arm from first to last value, lowest or highest between", the means over seeds."""
    said = []
    for arm, seeds in curves.items():
        steps = sorted({step for series in seeds for step in series})
        if steps:
            mean = [fmean(series[step] for series in seeds if step in series) for step in steps]
            said.append(f"{arm} {_move(mean, shown)}")
    return "; ".join(said) or "nothing was recorded"


def _move(values: Sequence[float], shown: Callable[[float], str]) -> str:
    if len(values) == 1:
        return f"has {shown(values[0])} once"
    text = f"goes from {shown(values[0])} to {shown(values[-1])}"
    low, high = min(values), max(values)
    if low < min(values[0], values[-1]) and shown(low) not in text:
        text += f", with a low of {shown(low)}"
    if high > max(values[0], values[-1]) and shown(high) not in text:
        text += f", with a peak of {shown(high)}"
    return text


def trajectory_seen(records: Sequence[Mapping[str, Any]]) -> str:
    """Say how one run went, and which layers end densest and sparsest."""
    shown = "{:.3f}".format
    names = {"n_eff_fraction": "N_eff / N", "density": "density", "preserved_mass": "preserved mass", "churn": "churn"}
    said = []
    for key, name in names.items():
        if series := group_series(records, key):
            said.append(f"{name} {_move(list(series.values()), shown)}")
    ends = {name: list(series.values())[-1] for name, series in layer_density(records).items()}
    if ends:
        low, high = min(ends, key=lambda name: ends[name]), max(ends, key=lambda name: ends[name])
        said.append(f"of the layers, {low} ends at density {shown(ends[low])} and {high} at {shown(ends[high])}")
    return f"From step {records[0]['step']} to {records[-1]['step']}: {'; '.join(said)}."


SEEN: dict[str, Callable[[Results], str]] = {
    "metric_density.png": metric_density_seen,
    "n_eff.png": n_eff_seen,
    "density.png": density_seen,
    "learning_curves.png": learning_seen,
}
