"""The figure that answers the study's question: metric against density."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from emp_callbacks.study.report.arm_results import REFERENCE, ArmSummary, Results, arm_of, points_of, runs_of, summarise
from emp_callbacks.study.report.metric_format import MetricFormat
from emp_callbacks.study.report.statistics import Interval
from emp_callbacks.study.report.styles import (
    DPI,
    FAMILIES,
    INK,
    OTHERS,
    SIZE,
    TITLE,
    arm_style,
    direction,
    family_of,
    finish,
    name_in_plot,
    style_axes,
)

__all__ = ["plot_metric_against_density"]

PANELS_FROM = 10  # arms: more lines than that are split by family
_TICKS = (1.0, 0.8, 0.6, 0.4, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001)
_PLAIN = FuncFormatter(lambda value, _: f"{value:g}")
_Lines = Mapping[str, Sequence[ArmSummary]]  # arm -> its points, from high to low density


def plot_metric_against_density(results: Results) -> Figure:
    """Draw the mean metric with its 95 % interval over the density (log scale), one line per arm.

    One-shot pruning is a thick line, dense a horizontal one with its interval as a band. Many arms are drawn in one
    panel per family, each with both of these. Without points each run has a small marker, and arms are moved sideways
    by 2 % each, because many of them have one density.
    """
    lines: dict[str, list[ArmSummary]] = {}
    for row in summarise(results):
        lines.setdefault(arm_of(row.arm), []).append(row)
    groups = _groups(lines)
    figure, panels = _panels(len(groups))
    title = f"{results['study']['metric']} against density"
    for axes, (family, arms) in zip(panels, groups.items(), strict=False):
        _draw_panel(axes, results, {arm: lines[arm] for arm in arms})
        axes.set_title(title if len(groups) == 1 else family, **{**TITLE, "fontsize": 12 if len(groups) == 1 else 10})
    _scale(panels, results, [row for rows in lines.values() for row in rows])
    if len(groups) == 1:
        return finish(figure, panels[0], "")
    for axes in panels[: len(groups)]:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8, labelcolor=INK)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK)
    return figure


def _groups(lines: _Lines) -> dict[str, list[str]]:
    """Return panel -> arms; each of several panels also has the baselines."""
    baselines = [arm for arm in lines if arm in ("dense", REFERENCE)]
    others = [arm for arm in lines if arm not in baselines]
    families = {family: [arm for arm in others if family_of(arm) == family] for family in (*FAMILIES, OTHERS)}
    families = {family: arms for family, arms in families.items() if arms}
    if len(lines) <= PANELS_FROM or len(families) < 2:
        return {"": list(lines)}
    return {family: baselines + arms for family, arms in families.items()}


def _panels(number: int) -> tuple[Figure, list[Axes]]:
    columns = 1 if number == 1 else 2
    rows = math.ceil(number / columns)
    size = SIZE if number == 1 else (12.0, 0.5 + 3.6 * rows)
    figure = Figure(figsize=size, layout="constrained", dpi=DPI)
    panels = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    for axes in panels:
        style_axes(axes)
        axes.tick_params(labelbottom=True)
    for axes in panels[number:]:
        axes.set_visible(False)
    return figure, panels


def _draw_panel(axes: Axes, results: Results, lines: _Lines) -> None:
    factor = 100.0 if MetricFormat.of(results).percent else 1.0
    drawn = [arm for arm in lines if arm != "dense"]
    for arm, rows in lines.items():
        if arm == "dense":
            _draw_dense(axes, rows[0].metric, factor)
        elif points_of(results):
            _draw_arm(axes, arm, rows, factor)
        else:
            aside = 10 ** (0.008 * (drawn.index(arm) - (len(drawn) - 1) / 2))
            _draw_arm(axes, arm, rows, factor, aside)
            _draw_runs(axes, arm, results, factor, aside)


def _draw_dense(axes: Axes, metric: Interval, factor: float) -> None:
    color = arm_style("dense").color
    axes.axhline(factor * metric.mean, color=color, linewidth=1.2, label="dense (mean, 95 %)")
    if metric.low is not None and metric.high is not None:
        axes.axhspan(factor * metric.low, factor * metric.high, color=color, alpha=0.07, linewidth=0)


def _draw_arm(axes: Axes, arm: str, rows: Sequence[ArmSummary], factor: float, aside: float = 1.0) -> None:
    style, thick = arm_style(arm), arm == REFERENCE
    rows = sorted(rows, key=lambda row: row.density.mean)
    x, y = [aside * row.density.mean for row in rows], [factor * row.metric.mean for row in rows]
    layer = 2 if thick else 3
    axes.errorbar(
        x, y, xerr=aside * _errors([row.density for row in rows]), yerr=factor * _errors([row.metric for row in rows]),
        fmt="none", ecolor=style.color, elinewidth=1.1, capsize=3, zorder=layer,
    )  # fmt: skip
    axes.plot(
        x, y, label=name_in_plot(arm), color=style.color, linestyle=style.line if len(rows) > 1 else "",
        linewidth=5 if thick else 1.6, marker=style.marker, markersize=9 if thick else 7.5, markeredgecolor="white",
        markeredgewidth=0.4, zorder=layer,
    )  # fmt: skip


def _draw_runs(axes: Axes, arm: str, results: Results, factor: float, aside: float) -> None:
    metric, style = results["study"]["metric"], arm_style(arm)
    runs = [run for run in runs_of(results, arm) if metric in run["metrics"]]
    x, y = [aside * run["density"] for run in runs], [factor * run["metrics"][metric] for run in runs]
    axes.scatter(x, y, s=20, color=style.color, marker=style.marker, alpha=0.45, linewidth=0)


def _errors(intervals: Sequence[Interval]) -> np.ndarray:
    """Return the lengths of error bars below and above, NaN without interval: shape (2, len(intervals))."""
    lengths = np.full((2, len(intervals)), np.nan)
    for index, found in enumerate(intervals):
        if found.low is not None and found.high is not None:
            # The mean of equal densities is off by a rounding.
            lengths[:, index] = max(found.mean - found.low, 0.0), max(found.high - found.mean, 0.0)
    return lengths


def _scale(panels: Sequence[Axes], results: Results, rows: Sequence[ArmSummary]) -> None:
    percent = MetricFormat.of(results).percent
    axes = panels[0]  # the others share its scales
    unit = " (%)" if percent else ""
    for panel in panels:
        if panel.get_subplotspec().is_first_col():  # type: ignore[union-attr]
            panel.set_ylabel(f"{results['study']['metric']}{unit}, {direction(results)}")
        panel.set_xlabel("density (kept / all, log scale)")
    metric = results["study"]["metric"]
    values = [run["metrics"][metric] * (100 if percent else 1) for run in results["runs"] if metric in run["metrics"]]
    _scale_metric(axes, [value for value in values if math.isfinite(value)])
    _scale_density(axes, [row.density.mean for row in rows if row.arm != "dense"], points_of(results))


def _scale_metric(axes: Axes, values: Sequence[float]) -> None:
    """Let the runs set the axis: with two seeds a t interval is so wide that it would flatten the rest."""
    if not values:
        return
    lowest, highest = min(values), max(values)
    if lowest > 0 and highest > 20 * lowest:  # a perplexity that explodes at low density
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(_PLAIN)
        return
    margin = 0.15 * (highest - lowest) or 0.01 * abs(lowest) or 0.01
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, lowest - margin), min(high, highest + margin))


def _scale_density(axes: Axes, densities: Iterable[float], points: Sequence[float]) -> None:
    kept = [density for density in densities if density > 0] or [1.0]
    middle = math.sqrt(min(kept) * max(kept))
    half = max(1.2 * math.sqrt(max(kept) / min(kept)), 1.8)
    low, high = middle / half, min(middle * half, 1.06)
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    ticks: list[float] = []
    for tick in (*points, *_TICKS):
        if low <= tick <= high and all(max(tick, other) > 1.25 * min(tick, other) for other in ticks):
            ticks.append(tick)
    axes.xaxis.set_major_locator(FixedLocator(sorted(ticks)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(_PLAIN)
