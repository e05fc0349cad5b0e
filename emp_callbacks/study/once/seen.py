"""What is seen in the figures of the studies on trained models, in words, for those who do not see them."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import numpy as np

from emp_callbacks.study.once.plots import BoundPanel
from emp_callbacks.study.once.results import Case, Curve
from emp_callbacks.study.report.page import number

__all__ = ["bounds_seen", "causes_seen", "criteria_seen", "sweep_seen"]


def sweep_seen(curves: Sequence[Curve]) -> str:
    """Say how the metric and the density of each model follow beta."""
    said = []
    for curve in curves:
        betas = list(curve.rows)
        shown = [f"{number(curve.harm.of(curve.mean_harm(b)), 2, True)} at {b:g}" for b in (betas[0], betas[-1])]
        if 1.0 in betas[1:-1]:
            shown.insert(1, f"{number(curve.harm.of(curve.mean_harm(1.0)), 2, True)} at 1")
        low, high = (f"{curve.mean(beta, 'density'):.2f}" for beta in (betas[0], betas[-1]))
        said.append(f"{curve.model} {', '.join(shown)} ({curve.harm.unit}), density from {low} to {high}")
    return f"Change of the metric by beta: {'; '.join(said)}."


def criteria_seen(cases: Sequence[Case], density: float) -> str:
    """Say which criterion has the smallest and the largest N_eff in each case, and which loses least."""
    said = []
    for case in cases:
        fractions = {name: case.mean(name, "n_eff_fraction") for name in case.rows}
        low, high = min(fractions, key=lambda name: fractions[name]), max(fractions, key=lambda name: fractions[name])
        harms = {name: fmean(map(case.harm.of, case.changes(name, "matched_after"))) for name in case.rows}
        best = min(harms, key=lambda name: harms[name])
        said.append(
            f"{case.model}, {case.target}: N_eff / N from {fractions[low]:.2f} ({low}) to {fractions[high]:.2f} "
            f"({high}); at density {density:g} {best} changes the metric least for the worse "
            f"({number(case.harm.of(harms[best]), 2, True)} {case.harm.unit})"
        )
    return f"{'. '.join(said)}."


def bounds_seen(panels: Sequence[BoundPanel]) -> str:
    """Say how many points lie above the diagonal, and how far the others lie below."""
    said = []
    for panel in panels:
        if panel.points:
            above = sum(y > x for x, y, _ in panel.points)
            ratio = float(np.median([x / y for x, y, _ in panel.points]))
            said.append(
                f"{panel.name} {above} of {len(panel.points)}, the median bound is {ratio:.3g} times the change"
            )
    return f"Points above the diagonal, where the bound is violated: {'; '.join(said) or 'none was measured'}."


def causes_seen(panels: Sequence[BoundPanel]) -> str:
    """Say how many points lie above 1 in the lower and the upper half of each property."""
    said = []
    for panel in panels:
        if panel.points:
            middle = float(np.median([x for x, *_ in panel.points]))
            halves = (
                [y > 1 for x, y, _ in panel.points if x <= middle],
                [y > 1 for x, y, _ in panel.points if x > middle],
            )
            shown = [f"{sum(half)} of {len(half)}" for half in halves]
            said.append(f"{panel.says}, up to its median {middle:.3g} {shown[0]}, above it {shown[1]}")
    return f"Points above 1, where the distance form is violated: {'; '.join(said) or 'none was measured'}."
