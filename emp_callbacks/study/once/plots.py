"""Figures of the studies that prune trained models once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from emp_callbacks.study.once.results import Case, Curve
from emp_callbacks.study.report.styles import DPI, INK, style_axes

__all__ = ["BoundPanel", "plot_beta_sweep", "plot_causes", "plot_criteria", "plot_violations"]

# Okabe-Ito; a criterion has one colour in all figures.
COLORS: Mapping[str, str] = {
    "magnitude": "#0072B2",
    "weight_norm": "#0072B2",
    "spline": "#0072B2",
    "wanda": "#009E73",
    "taylor": "#D55E00",
    "saliency": "#CC79A7",
    "activation": "#E69F00",
    "bn_scale": "#8A8A2A",
    "random": "#888888",
}
OTHER = ("#56B4E9", "#882255", "#6B4C9A", "#B8A800")


def color_of(criterion: str) -> str:
    """Return the colour of a criterion; one of a user's has one that depends on its name only."""
    return COLORS.get(criterion) or OTHER[sum(criterion.encode()) % len(OTHER)]


def plot_beta_sweep(curves: Sequence[Curve]) -> Figure:
    """Draw the metric (above) and the density (below) against beta, one column per model."""
    models = list(dict.fromkeys(curve.model for curve in curves))
    per_row = min(len(models), 4)
    blocks = -(-len(models) // per_row)
    figure = Figure(figsize=(1.0 + 3.3 * per_row, 5.6 * blocks), layout="constrained", dpi=DPI)
    panels = figure.subplots(2 * blocks, per_row, squeeze=False, height_ratios=[3, 2] * blocks)
    for axes in panels.flat[:]:
        axes.set_visible(False)
    for index, model in enumerate(models):
        row, column = divmod(index, per_row)
        above, below = panels[2 * row, column], panels[2 * row + 1, column]
        own = [curve for curve in curves if curve.model == model]
        _draw_beta_panel(above, own, "after")
        _draw_beta_panel(below, own, "density")
        above.set_title(model, loc="left", fontsize=11, fontweight="bold", color=INK)
        better = "higher" if own[0].harm.higher_is_better else "lower"
        above.set_ylabel(f"{own[0].harm.metric}\n({better} is better)", fontsize=9)
        below.set(ylim=(0, 1.05), xlabel="beta (dashed: 1)")
        below.set_ylabel("density", fontsize=9)
    handles = {
        label: handle for axes in panels.flat for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def _draw_beta_panel(axes: Axes, curves: Sequence[Curve], key: str) -> None:
    axes.set_visible(True)
    style_axes(axes)
    axes.axvline(1.0, color="#888888", linestyle=(0, (4, 3)), linewidth=1, zorder=0)
    if key == "after":
        dense = fmean(row["before"] for rows in curves[0].rows.values() for row in rows)
        axes.axhline(dense, color="black", linewidth=1, label="dense")
    for curve in curves:
        values = [[row[key] for row in rows] for rows in curve.rows.values()]
        color = color_of(curve.rows[next(iter(curve.rows))][0]["criterion"])
        betas = list(curve.rows)
        axes.plot(betas, [fmean(v) for v in values], color=color, marker="o", markersize=4, label=curve.way)
        axes.fill_between(
            betas, [min(v) for v in values], [max(v) for v in values], color=color, alpha=0.2, linewidth=0
        )
        axes.set_xticks(betas)
        if key == "after" and max(map(max, values)) > 20 * min(map(min, values)) > 0:
            axes.set_yscale("log")
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.tick_params(labelsize=8)


def plot_criteria(cases: Sequence[Case], density: float) -> Figure:
    """Draw N_eff / N, the change of the metric and the overlap of the masks, one row per model and target."""
    figure = Figure(figsize=(12.0, 0.6 + 2.7 * len(cases)), layout="constrained", dpi=DPI)
    panels = figure.subplots(len(cases), 3, squeeze=False, width_ratios=[3, 4, 3])
    for case, (left, middle, right) in zip(cases, panels, strict=True):
        names = list(case.rows)
        at = np.arange(len(names))
        for axes in (left, middle):
            style_axes(axes)
            axes.set_yticks(at, names, fontsize=9)
            axes.invert_yaxis()
        colors = [color_of(name) for name in names]
        left.barh(at, [case.mean(name, "n_eff_fraction") for name in names], color=colors, height=0.6)
        left.set(xlim=(0, 1), xlabel="N_eff / N")
        left.set_title(f"{case.model}, {case.target}", loc="left", fontsize=11, fontweight="bold", color=INK)
        _draw_changes(middle, case, at, density)
        _draw_overlap(figure, right, case)
    return figure


def _draw_changes(axes: Axes, case: Case, at: np.ndarray, density: float) -> None:
    for place, (shift, key, filled) in enumerate(((-0.13, "after", True), (0.13, "matched_after", False))):
        for row, name in zip(at, case.rows, strict=True):
            changes = case.changes(name, key)
            color = color_of(name)
            axes.scatter(
                changes, [row + shift] * len(changes), s=26, linewidth=1.2, edgecolor=color,
                facecolor=color if filled else "white", zorder=3,
                label=("at N_eff", f"at density {density:g}")[place] if row == 0 else None,
            )  # fmt: skip
    axes.axvline(0, color="black", linewidth=1)
    axes.set_xlabel(f"change of {case.harm.metric}, {case.harm.unit} (a point a seed)")
    values = [value for name in case.rows for key in ("after", "matched_after") for value in case.changes(name, key)]
    if max(map(abs, values)) > 20:
        axes.set_xscale("symlog", linthresh=1.0)
    axes.legend(fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2)


def _draw_overlap(figure: Figure, axes: Axes, case: Case) -> None:
    names = list(case.rows)
    grid = np.array([[case.jaccard(one, other) for other in names] for one in names])
    image = axes.imshow(grid, vmin=0, vmax=1, cmap="cividis")
    for i in range(len(names)):
        for j in range(len(names)):
            axes.text(j, i, f"{grid[i, j]:.2f}", ha="center", va="center", fontsize=7.5,
                color="white" if grid[i, j] < 0.55 else "black")  # fmt: skip
    axes.set_xticks(range(len(names)), names, rotation=35, ha="right", fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    figure.colorbar(image, ax=axes, label="Jaccard of kept", pad=0.02)


class BoundPanel(NamedTuple):
    """One panel: its name, what it shows, and points (x, y, criterion)."""

    name: str
    says: str
    points: Sequence[tuple[float, float, str]]


def plot_violations(panels: Sequence[BoundPanel]) -> Figure:
    """Draw |measured| against bound, logarithmic, one panel per bound; above the diagonal it is violated."""
    figure, axes_of = _panels(len(panels))
    for axes, panel in zip(axes_of, panels, strict=False):
        _scatter(axes, panel)
        axes.set(xscale="log", yscale="log", xlabel="bound", ylabel="|change of the loss|")
        if panel.points:
            values = [value for x, y, _ in panel.points for value in (x, y)]
            low, high = min(values) / 2, max(values) * 2
            axes.plot([low, high], [low, high], color="black", linewidth=1)
            axes.set(xlim=(low, high), ylim=(min(y for _, y, _ in panel.points) / 2, max(values) * 2))
            ceiling = max(y for _, y, _ in panel.points) * 4
            axes.set_ylim(top=ceiling)
        axes.text(0.03, 0.95, "violated", transform=axes.transAxes, va="top", fontsize=9, color="#b3261e")
        axes.set_title(panel.name, loc="left", fontsize=11, fontweight="bold", color=INK)
    return _with_legend(figure, axes_of)


def plot_causes(panels: Sequence[BoundPanel]) -> Figure:
    """Draw measured / bound, logarithmic, against one property of a case per panel; above 1 the bound is violated."""
    figure, axes_of = _panels(len(panels))
    for axes, panel in zip(axes_of, panels, strict=False):
        _scatter(axes, panel)
        positive = all(x > 0 for x, *_ in panel.points)
        wide = panel.points and positive and max(x for x, *_ in panel.points) > 30 * min(x for x, *_ in panel.points)
        axes.set(yscale="log", xscale="log" if wide else "linear", xlabel=panel.says, ylabel="|change| / bound")
        axes.axhline(1, color="black", linewidth=1)
    return _with_legend(figure, axes_of)


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    columns = min(count, 3) if count != 4 else 2
    rows = -(-count // columns)
    figure = Figure(figsize=(0.6 + 4.0 * columns, 0.5 + 3.6 * rows), layout="constrained", dpi=DPI)
    axes_of = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in axes_of[count:]:
        axes.set_visible(False)
    return figure, axes_of[:count]


def _scatter(axes: Axes, panel: BoundPanel) -> None:
    style_axes(axes)
    for criterion in dict.fromkeys(criterion for *_, criterion in panel.points):
        own = [(x, y) for x, y, name in panel.points if name == criterion]
        x, y = zip(*own, strict=True)
        axes.scatter(x, y, s=16, color=color_of(criterion), alpha=0.7, linewidth=0, label=criterion)


def _with_legend(figure: Figure, axes_of: Sequence[Axes]) -> Figure:
    handles = {
        label: handle for axes in axes_of for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles) or 1, frameon=False)
    return figure
