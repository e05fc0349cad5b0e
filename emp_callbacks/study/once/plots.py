"""Figures of the studies that prune trained models once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator, StrMethodFormatter

from emp_callbacks.study.once.results import Case, Curve, Harm
from emp_callbacks.study.report.layout import NARROW, panels
from emp_callbacks.study.report.metric_density import PLAIN, Which, axis_of
from emp_callbacks.study.report.page import MINUS
from emp_callbacks.study.report.styles import CARD, DPI, HEADING, INK, ON_DARK, ON_LIGHT, SPINE, TEXT, TITLE, style_axes

__all__ = ["BoundPanel", "plot_beta_sweep", "plot_causes", "plot_criteria", "plot_violations"]

# Okabe-Ito; a criterion has one colour in all figures.
COLORS: Mapping[str, str] = {
    "magnitude": "#0072B2",
    "weight_norm": "#0072B2",
    "spline": "#0072B2",
    "wanda": "#009E73",
    "taylor": "#D55E00",
    "saliency": "#B5477A",
    "activation": "#B87700",
    "bn_scale": "#8A8A2A",
    "random": "#7D7D7D",
}
OTHER = ("#2A90C8", "#882255", "#6B4C9A", "#968900")
MARKERS = "osD^vP*X<>"


def color_of(criterion: str) -> str:
    """Return the colour of a criterion; one of a user's has one that depends on its name only."""
    return COLORS.get(criterion) or OTHER[sum(criterion.encode()) % len(OTHER)]


def marker_of(criterion: str) -> str:
    """Return the marker of a criterion, in all figures."""
    known = list(COLORS)
    return MARKERS[(known.index(criterion) if criterion in known else sum(criterion.encode())) % len(MARKERS)]


def plot_beta_sweep(curves: Sequence[Curve], narrow: bool = False) -> Figure:
    """Draw the change of the metric and, below it, the density against beta: a panel for each model.

    All changes have one axis, on which worse is lower.
    """
    models = list(dict.fromkeys(curve.model for curve in curves))
    drawn = panels(len(models), narrow=narrow, columns=4, size=(3.3, 4.4), share=False, stack=(3, 2))
    worst, best = _ends([harm for curve in curves for beta in curve.rows for harm in curve.harms(beta).values()])
    for above, below, model in zip(drawn.axes, drawn.below, models, strict=True):
        own = [curve for curve in curves if curve.model == model]
        for curve in own:
            _draw_curve(above, curve, [[*curve.harms(beta).values()] for beta in curve.rows], own[0].harm)
            _draw_curve(below, curve, [[row["density"] for row in rows] for rows in curve.rows.values()], None)
        harm = own[0].harm
        above.axhline(0, color=INK, linewidth=1, label="dense")
        _change_axis(above, "y", harm, worst, best)
        above.set_title(model, **HEADING)
        above.set_ylabel(f"change of\n{harm.metric}, {harm.unit}")
        below.set(ylim=(0, 1.05), xlabel="beta (dashed: 1)", ylabel="density")
        below.set_xticks([beta for beta in own[0].rows if beta not in (0.75, 1.25)])
        below.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        for axes in (above, below):
            axes.axvline(1.0, color=SPINE, linestyle=(0, (4, 3)), linewidth=1, zorder=0)
    drawn.legend(columns=3)
    return drawn.figure


def _draw_curve(axes: Axes, curve: Curve, values: Sequence[Sequence[float]], harm: Harm | None) -> None:
    """Draw means and the range over seeds; harm with the metric's own sign."""
    if harm is not None:
        values = [[harm.of(value) for value in own] for own in values]
    color, betas = color_of(curve.criterion), list(curve.rows)
    axes.plot(betas, [fmean(v) for v in values], color=color, marker="o", markersize=4, label=curve.way)
    axes.fill_between(betas, [min(v) for v in values], [max(v) for v in values], color=color, alpha=0.2, linewidth=0)


_CHANGES = (1000, 300, 100, 30, 10, 3, 1, 0.5, 0)


def _ends(harms: Sequence[float]) -> tuple[float, float]:
    """Return the greatest harm and the greatest gain that an axis has to show, each at least 1."""
    return max([1.0, *harms]), max([1.0, *(-harm for harm in harms)])


def _change_axis(axes: Axes, which: Which, harm: Harm, worst: float, best: float) -> None:
    """Give an axis of changes one scale in all panels: even up to 1, logarithmic beyond; worse is lower, or left."""
    axis, limit, scale = axis_of(axes, which)
    scale("symlog", linthresh=1.0, linscale=0.8)
    sign = 1.0 if harm.higher_is_better else -1.0
    limit(-1.4 * sign * worst, 1.4 * sign * best)
    shown = [change for change in _CHANGES if change <= 1.4 * worst] + [-c for c in _CHANGES if 0 < c <= 1.4 * best]
    if which == "x":
        shown = [change for change in shown if abs(change) not in (0.5, 3, 30, 300)]
    axis.set_major_locator(FixedLocator([-sign * change for change in shown]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+g}".replace("-", MINUS) if value else "0"))


def plot_criteria(cases: Sequence[Case], density: float, narrow: bool = False) -> Figure:
    """Draw N_eff / N, the change of the metric and the overlap of the masks, one row per model and target."""
    heights = [0.9 + 0.3 * len(case.rows) for case in cases]
    heights = [2.3 * height if narrow else max(2.5, height) for height in heights]
    figure = Figure(figsize=(NARROW if narrow else 12.0, 0.5 + sum(heights)), layout="constrained", dpi=DPI)
    parts = figure.subfigures(len(cases), 1, squeeze=False, height_ratios=heights)[:, 0]
    worst, best = _ends([harm for case in cases for key in _AFTER for harm in _harms(case, key)])
    for case, part in zip(cases, parts, strict=True):
        names = [["left", "middle"], ["right", "right"]] if narrow else [["left", "middle", "right"]]
        ratios = {"height_ratios": [4, 5], "width_ratios": [2, 3]} if narrow else {"width_ratios": [3, 5, 4]}
        axes_of = part.subplot_mosaic(names, **ratios)
        _draw_fractions(axes_of["left"], case)
        _draw_changes(axes_of["middle"], case, worst, best)
        _draw_overlap(axes_of["right"], case)
        part.suptitle(f"{case.model}, {case.target}", **{**TITLE, "fontsize": HEADING["fontsize"]})
    handles = [
        Line2D([], [], linestyle="", marker="o", markeredgecolor=INK, markerfacecolor=face, label=label)
        for face, label in ((INK, "change at its own N_eff"), (CARD, f"change at density {density:g}"))
    ]
    figure.legend(
        handles=handles,
        loc="outside lower left",
        ncols=1 if narrow else 2,
        frameon=False,
        fontsize=TEXT,
        labelcolor=INK,
    )
    return figure


_AFTER = ("after", "matched_after")


def _harms(case: Case, key: str) -> list[float]:
    return [case.harm.of(change) for name in case.rows for change in case.changes(name, key)]


def _rows_of(axes: Axes, case: Case, named: bool) -> np.ndarray:
    style_axes(axes)
    at = np.arange(len(case.rows))
    axes.set_yticks(at, list(case.rows) if named else [""] * len(at))
    axes.set_ylim(len(at) - 0.4, -0.6)
    return at


def _draw_fractions(axes: Axes, case: Case) -> None:
    at, names = _rows_of(axes, case, named=True), list(case.rows)
    fractions = [case.mean(name, "n_eff_fraction") for name in names]
    axes.barh(at, fractions, color=[color_of(name) for name in names], height=0.6)
    axes.set(xlim=(0, 1), xlabel="N_eff / N")
    axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])


def _draw_changes(axes: Axes, case: Case, worst: float, best: float) -> None:
    at = _rows_of(axes, case, named=False)
    for shift, key, filled in ((-0.15, "after", True), (0.15, "matched_after", False)):
        for row, name in zip(at, case.rows, strict=True):
            changes, color = case.changes(name, key), color_of(name)
            axes.scatter(
                changes, [row + shift] * len(changes), s=26, linewidth=1.3, edgecolor=color,
                facecolor=color if filled else CARD, zorder=3,
            )  # fmt: skip
    axes.axvline(0, color=INK, linewidth=1)
    axes.set_xlabel(f"change of {case.harm.metric},\n{case.harm.unit}; worse is left")
    _change_axis(axes, "x", case.harm, worst, best)


def _draw_overlap(axes: Axes, case: Case) -> None:
    names = list(case.rows)
    grid = np.array([[case.jaccard(one, other) for other in names] for one in names])
    axes.imshow(grid, vmin=0, vmax=1, cmap="cividis", aspect="auto")
    for i in range(len(names)):
        for j in range(len(names)):
            color = ON_DARK if grid[i, j] < 0.55 else ON_LIGHT
            axes.text(j, i, f"{grid[i, j]:.2f}", ha="center", va="center", fontsize=TEXT, color=color)
    axes.tick_params(colors=INK, labelsize=TEXT)
    axes.set_xticks(range(len(names)), names, rotation=35, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_title("Jaccard of what is kept", loc="left", fontsize=TEXT, color=INK)


class BoundPanel(NamedTuple):
    """One panel: its name, what it shows, and points (x, y, criterion)."""

    name: str
    says: str
    points: Sequence[tuple[float, float, str]]


def plot_violations(bounds: Sequence[BoundPanel], narrow: bool = False) -> Figure:
    """Draw |measured| against bound, logarithmic, one panel per bound; above the diagonal it is violated."""
    drawn = panels(len(bounds), narrow=narrow, columns=3, size=(4.0, 3.5))
    for axes, panel in zip(drawn.axes, bounds, strict=True):
        _scatter(axes, panel)
        axes.set(xscale="log", yscale="log", xlabel=f"bound: {panel.name}", ylabel="|change of the loss|")
        for axis in (axes.xaxis, axes.yaxis):
            _plain_decades(axis)
        if panel.points:
            values = [value for x, y, _ in panel.points for value in (x, y)]
            low, high = min(values) / 2, max(values) * 2
            axes.plot([low, high], [low, high], color=INK, linewidth=1)
            ceiling = max(y for _, y, _ in panel.points) * 4
            axes.set(xlim=(low, high), ylim=(min(y for _, y, _ in panel.points) / 2, ceiling))
        axes.text(0.03, 0.95, "violated", transform=axes.transAxes, va="top", fontsize=TEXT, color="#b3261e")
        axes.set_title(panel.name, **HEADING)
    drawn.legend(columns=6)
    return drawn.figure


def plot_causes(causes: Sequence[BoundPanel], narrow: bool = False) -> Figure:
    """Draw measured / bound, logarithmic, against one property of a case per panel; above 1 the bound is violated."""
    drawn = panels(len(causes), narrow=narrow, columns=2, size=(6.0, 3.5))
    for axes, panel in zip(drawn.axes, causes, strict=True):
        _scatter(axes, panel)
        positive = all(x > 0 for x, *_ in panel.points)
        wide = panel.points and positive and max(x for x, *_ in panel.points) > 30 * min(x for x, *_ in panel.points)
        axes.set(yscale="log", xscale="log" if wide else "linear", xlabel=panel.says, ylabel="|change| / bound")
        for axis in (axes.xaxis, axes.yaxis)[0 if wide else 1 :]:
            _plain_decades(axis)
        axes.axhline(1, color=INK, linewidth=1)
    drawn.legend(columns=6)
    return drawn.figure


def _scatter(axes: Axes, panel: BoundPanel) -> None:
    for criterion in dict.fromkeys(criterion for *_, criterion in panel.points):
        own = [(x, y) for x, y, name in panel.points if name == criterion]
        x, y = zip(*own, strict=True)
        # Open markers: those that lie on each other are all seen.
        axes.scatter(
            x, y, s=18, facecolor="none", edgecolor=color_of(criterion), marker=marker_of(criterion), linewidth=0.9,
            label=criterion,
        )  # fmt: skip


def _plain_decades(axis: Axis) -> None:
    axis.set_major_locator(LogLocator(numticks=6))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(PLAIN)
