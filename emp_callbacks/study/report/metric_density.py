"""The figure that answers the study's question: metric against density."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from emp_callbacks.study.report.arm_results import REFERENCE, ArmSummary, Results, arm_of, points_of, runs_of, summarise
from emp_callbacks.study.report.layout import NARROW, families, panels
from emp_callbacks.study.report.metric_format import MetricFormat
from emp_callbacks.study.report.statistics import Interval
from emp_callbacks.study.report.styles import (
    CARD,
    DPI,
    HEADING,
    INK,
    SIZE,
    TITLE,
    arm_style,
    direction,
    name_in_plot,
    style_axes,
)

__all__ = ["PLAIN", "Which", "axis_of", "error_scale", "plot_metric_against_density", "scale_values", "spread_out"]

_TICKS = (1.0, 0.8, 0.6, 0.4, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001)
_PERCENTS = (99.8, 99.5, 99, 98, 97, 96, 95, 94, 92, 90, 85, 80, 70, 60, 50, 40, 20, 0)
_LEAST_ERROR = 0.1  # percent: where the axis of errors ends
PLAIN = FuncFormatter(lambda value, _: f"{value:g}")
_Lines = Mapping[str, Sequence[ArmSummary]]  # arm -> its points, from high to low density


def plot_metric_against_density(results: Results, narrow: bool = False) -> Figure:
    """Draw the mean metric of each arm with its 95 % interval beside its density.

    With points: one line per arm over the density (log scale). One-shot pruning is a thick line, dense a horizontal
    one with its interval as a band; arms are moved sideways by 2 % each, and many have one panel per family, each with
    both of these. Without points many arms have one density, where they would hide each other: each has a line of its
    own, with its density on the left, and its runs as small open markers.
    """
    lines: dict[str, list[ArmSummary]] = {}
    for row in summarise(results):
        lines.setdefault(arm_of(row.arm), []).append(row)
    return _over_density(results, lines, narrow) if points_of(results) else _by_arm(results, lines, narrow)


# ---- one line of the figure for each arm ----------------------------------------------------------------------------


def _by_arm(results: Results, lines: _Lines, narrow: bool) -> Figure:
    arms, factor = list(lines), _factor(results)
    height = max(3.0 if narrow else SIZE[1], 1.4 + 0.34 * len(arms))
    figure = Figure(figsize=(NARROW if narrow else SIZE[0], height), layout="constrained", dpi=DPI)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[1, 2 if narrow else 3])
    for axes in (left, right):
        style_axes(axes)
    dense = next((rows[0].metric for arm, rows in lines.items() if arm == "dense"), None)
    if dense is not None:
        right.axvline(factor * dense.mean, color=INK, linewidth=1.2)
        if dense.low is not None and dense.high is not None:
            right.axvspan(factor * dense.low, factor * dense.high, color=INK, alpha=0.08, linewidth=0)
    for at, arm in enumerate(arms):
        row, style = lines[arm][0], arm_style(arm)
        for axes, found, scale in ((left, row.density, 1.0), (right, row.metric, factor)):
            axes.errorbar(
                [scale * found.mean], [at], xerr=scale * _errors([found]), color=style.color, marker=style.marker,
                markersize=8, markeredgecolor=CARD, markeredgewidth=0.5, elinewidth=1.6, capsize=4, linestyle="",
                label=name_in_plot(arm), zorder=4,
            )  # fmt: skip
        values = _runs(results, arm, factor)
        below = [at + 0.28] * len(values)
        right.scatter(values, below, s=18, facecolor="none", edgecolor=style.color, linewidth=1.0, zorder=3)
    left.set_yticks(range(len(arms)), [name_in_plot(arm) for arm in arms])
    left.set_ylim(len(arms) - 0.4, -0.6)
    left.set(xlim=(0, 1.05), xlabel="density")
    left.xaxis.set_major_locator(FixedLocator([0.0, 0.5, 1.0]))
    left.xaxis.set_major_formatter(PLAIN)
    right.tick_params(left=False)
    right.set_xlabel(f"{_named(results)}{chr(10) if narrow else ', '}{direction(results)}")
    right.xaxis.set_major_locator(MaxNLocator(4 if narrow else 7))
    values = [value for arm in arms for value in _runs(results, arm, factor)]
    scaled = _scale_metric(right, "x", values, [row.metric for rows in lines.values() for row in rows], factor)
    if scaled:
        right.set_xlabel(f"{right.get_xlabel()}\n({scaled})")
    figure.suptitle(f"{results['study']['metric']} and density of each arm", **TITLE)
    return figure


# ---- over the density -----------------------------------------------------------------------------------------------


def _over_density(results: Results, lines: _Lines, narrow: bool) -> Figure:
    groups = families(list(lines))
    drawn = panels(len(groups), narrow=narrow, size=SIZE if len(groups) == 1 else (6.0, 3.6), share=True)
    factor = _factor(results)
    rows = [row for own in lines.values() for row in own]
    values = [value for row in rows for value in _runs(results, row.arm, factor)]
    scaled = _scale_metric(drawn.axes[0], "y", values, [row.metric for row in rows], factor)
    for axes, (family, arms) in zip(drawn.axes, groups.items(), strict=True):
        aside = spread_out([arm for arm in arms if arm != "dense"])
        for arm in arms:
            if arm == "dense":
                _draw_dense(axes, lines[arm][0].metric, factor)
            else:
                _draw_arm(axes, arm, lines[arm], factor, aside[arm])
        axes.set_title(family, **HEADING)
        axes.set_xlabel("density (kept / all, log scale)")
        axes.set_ylabel(drawn.broken(_named(results), direction(results)) + f"\n({scaled})" * bool(scaled))
    _scale_density(drawn.axes[0], [row.density.mean for row in rows if row.arm != "dense"], points_of(results))
    drawn.title(f"{results['study']['metric']} against density")
    drawn.legends(beside=len(groups) == 1)
    return drawn.figure


def spread_out(arms: Sequence[str]) -> dict[str, float]:
    """Return the factor by which each arm is moved along the axis of densities, so that none hides another.

    Examples:
        >>> {arm: round(factor, 2) for arm, factor in spread_out(["a", "b", "c"]).items()}
        {'a': 0.98, 'b': 1.0, 'c': 1.02}
    """
    return {arm: 10 ** (0.009 * (place - (len(arms) - 1) / 2)) for place, arm in enumerate(arms)}


def _draw_dense(axes: Axes, metric: Interval, factor: float) -> None:
    axes.axhline(factor * metric.mean, color=INK, linewidth=1.2, label="dense (mean, 95 %)")
    if metric.low is not None and metric.high is not None:
        axes.axhspan(factor * metric.low, factor * metric.high, color=INK, alpha=0.08, linewidth=0)


def _draw_arm(axes: Axes, arm: str, rows: Sequence[ArmSummary], factor: float, aside: float) -> None:
    style, thick = arm_style(arm), arm == REFERENCE
    rows = sorted(rows, key=lambda row: row.density.mean)
    x, y = [aside * row.density.mean for row in rows], [factor * row.metric.mean for row in rows]
    layer = 2 if thick else 3
    axes.errorbar(
        x, y, xerr=aside * _errors([row.density for row in rows]), yerr=factor * _errors([row.metric for row in rows]),
        fmt="none", ecolor=style.color, elinewidth=1.1, capsize=2.5, zorder=layer,
    )  # fmt: skip
    axes.plot(
        x, y, label=name_in_plot(arm), color=style.color, linestyle=style.line if len(rows) > 1 else "",
        linewidth=5 if thick else 1.6, marker=style.marker, markersize=9 if thick else 7,
        markeredgecolor=CARD if style.filled else style.color, markerfacecolor=style.color if style.filled else CARD,
        markeredgewidth=0.5 if style.filled else 1.4, zorder=layer,
    )  # fmt: skip


# ---- both -----------------------------------------------------------------------------------------------------------


def _factor(results: Results) -> float:
    return 100.0 if MetricFormat.of(results).percent else 1.0


def _named(results: Results) -> str:
    return f"{results['study']['metric']}{' (%)' if MetricFormat.of(results).percent else ''}"


def _runs(results: Results, label: str, factor: float) -> list[float]:
    metric = results["study"]["metric"]
    values = [factor * run["metrics"][metric] for run in runs_of(results, label) if metric in run["metrics"]]
    return [value for value in values if math.isfinite(value)]


def _errors(intervals: Sequence[Interval]) -> np.ndarray:
    """Return the lengths of error bars below and above, NaN without interval: shape (2, len(intervals))."""
    lengths = np.full((2, len(intervals)), np.nan)
    for index, found in enumerate(intervals):
        if found.low is not None and found.high is not None:
            # The mean of equal densities is off by a rounding.
            lengths[:, index] = max(found.mean - found.low, 0.0), max(found.high - found.mean, 0.0)
    return lengths


def _scale_metric(
    axes: Axes, which: Which, values: Sequence[float], intervals: Sequence[Interval], factor: float
) -> str:
    """Let the runs set the axis, and say how it is scaled where it is not even.

    With two seeds a t interval is so wide that it would flatten the rest: it may leave the frame.
    """
    if not values:
        return ""
    ends = [factor * end for found in intervals for end in (found.low, found.high) if end is not None]
    lowest, highest = min(values), max(values)
    margin = 0.15 * (highest - lowest) or 0.01 * abs(lowest) or 0.01
    low = max(min([lowest, *ends]) - 0.3 * margin, lowest - margin)
    high = min(max([highest, *ends]) + 0.3 * margin, highest + margin)
    return scale_values(axes, which, values, (low, high), percent=factor > 1)


Which = Literal["x", "y"]


def scale_values(
    axes: Axes, which: Which, values: Sequence[float], limits: tuple[float, float], *, percent: bool
) -> str:
    """Choose the scale of an axis of the metric, and say which it is where it is not even.

    Args:
        axes: With the axis.
        which: Of its axes.
        values: What has to be told apart.
        limits: Of an even axis.
        percent: Whether they are accuracies in percent.
    """
    axis, limit, scale = axis_of(axes, which)
    lowest, highest = min(values), max(values)
    if lowest > 0 and highest > 20 * lowest:  # a perplexity that explodes at low density
        scale("log")
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(PLAIN)
        return "log scale"
    if percent and highest - lowest > 30:
        error_scale(axes, which, limits[0], 100 - (100 - highest) / 2)
        return "the error on a log scale"
    limit(*limits)
    return ""


def axis_of(axes: Axes, which: Which) -> tuple[Axis, Callable[..., Any], Callable[..., Any]]:
    """Return one of two axes, and what sets its limits and its scale."""
    if which == "x":
        return axes.xaxis, axes.set_xlim, axes.set_xscale
    return axes.yaxis, axes.set_ylim, axes.set_yscale


def error_scale(axes: Axes, which: Which, low: float, high: float) -> None:
    """Give an axis of accuracies in percent the log scale of the error, 100 less it, on which small errors differ.

    Args:
        axes: With the axis.
        which: "x" or "y".
        low: Where the axis begins, in percent.
        high: Where it ends; errors below 0.1 % are drawn there.
    """
    axis, limit, scale = axis_of(axes, which)

    def forward(accuracy: np.ndarray) -> np.ndarray:
        return -np.log10(np.maximum(100.0 - np.asarray(accuracy, dtype=float), _LEAST_ERROR))

    scale("function", functions=(forward, lambda place: 100.0 - 10.0 ** -np.asarray(place, dtype=float)))
    low, high = max(low, 0.0), min(high, 100.0 - _LEAST_ERROR)
    limit(low, high)
    room = 0.06 * float(forward(np.array(high)) - forward(np.array(low)))
    ticks: list[float] = []
    for tick in _PERCENTS:
        apart = (abs(float(forward(np.array(tick)) - forward(np.array(other)))) >= room for other in ticks)
        if low <= tick <= high and all(apart):
            ticks.append(tick)
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(PLAIN)


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
    axes.xaxis.set_major_formatter(PLAIN)
