"""Figures of a study and of a single run.

Every function returns a `matplotlib.figure.Figure` and leaves pyplot and the global backend alone. One arm
has one colour and marker in all figures (Okabe-Ito palette, readable with colour blindness).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import AutoLocator, MaxNLocator

from emp_callbacks.study.report.arm_results import ArmSummary, arm_names, runs_of, summarise
from emp_callbacks.study.report.convergence import convergence, curve_of
from emp_callbacks.study.report.statistics import Interval

Record = Mapping[str, Any]
Results = Mapping[str, Any]
Series = dict[int, float]  # step -> value

SIZE = (8.0, 4.5)  # inches
DPI = 150
INK = "#333333"


@dataclass(frozen=True, slots=True)
class ArmStyle:
    """How one arm is drawn, in every figure."""

    color: str
    marker: str
    line: str | tuple[int, tuple[int, ...]]
    width: float = 1.8


STYLES: dict[str, ArmStyle] = {
    "dense": ArmStyle("#000000", "s", "-"),
    "one_shot": ArmStyle("#E69F00", "D", "-"),
    "one_shot_dynamic": ArmStyle("#8A8A2A", "d", "-"),
    "training_feedback": ArmStyle("#0072B2", "o", "-"),
    "training_project": ArmStyle("#009E73", "^", "-"),
    "training_freeze": ArmStyle("#D55E00", "v", "-"),
    "training_dynamic": ArmStyle("#882255", "p", "-"),
    # These two often lie on one line: a wide one below a narrow one keeps both visible.
    "fixed_magnitude": ArmStyle("#CC79A7", "P", "-", 4.0),
    "random": ArmStyle("#56B4E9", "X", (0, (3, 2)), 1.6),
}
OTHER_STYLES = (
    ArmStyle("#888888", "h", "-"),
    ArmStyle("#B8A800", "*", "-"),  # the palette's yellow, darkened: #F0E442 is hard to see on white
    ArmStyle("#6B4C9A", "<", "-"),
)


def arm_style(arm: str) -> ArmStyle:
    """Return the style of `arm`; an arm of your own gets one that depends on its name only."""
    return STYLES.get(arm) or OTHER_STYLES[sum(arm.encode()) % len(OTHER_STYLES)]


def plot_n_eff(results: Results) -> Figure:
    """Draw N_eff / N over steps: mean over seeds as a line, min to max as a band."""
    figure, axes = _study_figure("Effective number during training", "N_eff / N")
    for arm in arm_names(results):
        seeds = [group_series(run.get("trajectory") or [], "n_eff_fraction") for run in runs_of(results, arm)]
        _draw_seeds(axes, arm, seeds)
    _from_zero(axes)
    return _finish(figure, axes, "no refresh was recorded")


def plot_density(results: Results) -> Figure:
    """Draw the density over steps: it is 1 before the first refresh and constant between two refreshes."""
    figure, axes = _study_figure("Density during training", "density (kept / all)")
    for arm in arm_names(results):
        seeds = [_density_series(run) for run in runs_of(results, arm)]
        _draw_seeds(axes, arm, seeds, drawstyle="steps-post")
    _from_zero(axes)
    return _finish(figure, axes, "no refresh was recorded")


def plot_learning_curves(results: Results) -> Figure:
    """Draw the validation metric over steps: mean over seeds as a line, min to max as a band.

    Arms that are pruned after another arm's training have its curve and are left out. The dotted line is the last
    value of dense training.
    """
    found = convergence(results)
    if found is None:
        return _finish(*_study_figure("Learning curves", ""), "no validation metric was recorded")
    figure, axes = _study_figure("Learning curves", f"{found.metric} ({_direction(results)})")
    for row in found.arms:
        _draw_seeds(axes, row.arm, [curve_of(run, found.metric) for run in runs_of(results, row.arm)])
    if found.target is not None:
        axes.axhline(found.target, color=INK, linewidth=1, linestyle=":", label=f"last of {found.baseline} (mean)")
    return _finish(figure, axes, "")


def plot_metric_against_density(results: Results) -> Figure:
    """Draw a small marker per run and the mean per arm with its 95 % interval; dense is a horizontal line."""
    metric = results["study"]["metric"]
    figure, axes = _study_figure(f"{metric} against density", f"{metric} ({_direction(results)})")
    axes.set_xlabel("density (kept / all)")
    axes.xaxis.set_major_locator(AutoLocator())
    for row in summarise(results):
        if row.arm == "dense":
            _draw_dense(axes, row)
        else:
            _draw_arm(axes, row, runs_of(results, row.arm), metric)
    values = [run["metrics"][metric] for run in results["runs"] if metric in run["metrics"]]
    _limit_to_runs(axes, values)
    return _finish(figure, axes, "")


def plot_trajectory(records: Sequence[Record]) -> Figure:
    """Draw one run: N_eff / N and density, churn below, and a map layer x refresh of density where recorded.

    Raises:
        ValueError: If `records` is empty.
    """
    if not records:
        raise ValueError("the trajectory holds no refresh: nothing to draw. Was a refresh due within the run?")
    layers = layer_density(records)
    map_height = min(7.0, 1.0 + 0.22 * len(layers)) if layers else 0.0
    heights = [3.0, 1.5] + ([map_height] if layers else [])
    figure = Figure(figsize=(SIZE[0], 1.0 + sum(heights)), layout="constrained", dpi=DPI)
    panels = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0]
    for axes in panels:
        style_axes(axes)
    marker = "o" if len(records) <= 60 else None
    _draw_fractions(panels[0], records, marker)
    churn = group_series(records, "churn")
    panels[1].plot(list(churn), list(churn.values()), color="#CC79A7", marker=marker, markersize=4)
    panels[1].set_ylabel("churn\n(changed / all)")
    _from_zero(panels[1])
    if layers:
        _draw_layer_map(figure, panels[2], layers)
    panels[-1].set_xlabel("optimizer step")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def group_series(records: Sequence[Record], key: str) -> Series:
    """Return step -> `key`, over the groups of each refresh weighted by their number of components."""
    sums: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for record in records:
        value, n = record.get(key), record.get("n", 1)
        if value is not None and n > 0:
            sums[record["step"]][0] += value * n
            sums[record["step"]][1] += n
    return {step: total / n for step, (total, n) in sorted(sums.items())}


def layer_density(records: Sequence[Record]) -> dict[str, Series]:
    """Return layer name -> step -> density, in the order in which the layers appear."""
    layers: dict[str, Series] = {}
    for record in records:
        for layer in record.get("layers") or []:
            layers.setdefault(layer["name"], {})[record["step"]] = layer["density"]
    return layers


def _density_series(run: Record) -> Series:
    # An "observe" row holds the density that EMP would choose; nothing was pruned.
    pruned = [record for record in run.get("trajectory") or [] if record.get("mode") != "observe"]
    refreshes = group_series(pruned, "density")
    if not refreshes:
        return {}
    series = {0: 1.0, **refreshes}
    # The last mask holds to the end of the run.
    series.setdefault(max(run.get("steps") or 0, *refreshes), list(refreshes.values())[-1])
    return series


def _study_figure(title: str, ylabel: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE, layout="constrained", dpi=DPI)
    axes = figure.subplots()
    style_axes(axes)
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color=INK, pad=10)
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel(ylabel)
    return figure, axes


def style_axes(axes: Axes) -> None:
    """Give axes the look of all figures here."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")
    axes.tick_params(colors=INK, labelsize=9)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    axes.grid(color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)


def _finish(figure: Figure, axes: Axes, empty: str) -> Figure:
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside right upper", frameon=False, fontsize=9, labelcolor=INK)
    else:
        axes.text(0.5, 0.5, empty, transform=axes.transAxes, ha="center", color=INK)
    return figure


def _draw_seeds(axes: Axes, arm: str, seeds: Sequence[Series], drawstyle: str = "default") -> None:
    steps = sorted({step for series in seeds for step in series})
    if not steps:
        return
    style = arm_style(arm)
    at_step = [[series[step] for series in seeds if step in series] for step in steps]
    mean = [float(np.mean(values)) for values in at_step]
    low, high = [min(values) for values in at_step], [max(values) for values in at_step]
    marker = style.marker if len(steps) <= 40 else None
    axes.plot(
        steps, mean, color=style.color, linestyle=style.line, drawstyle=drawstyle, marker=marker,
        markersize=4.5, markeredgewidth=0, linewidth=style.width, zorder=2 + 1 / style.width,
        label=_label(arm),
    )  # fmt: skip
    step = "post" if drawstyle == "steps-post" else None
    axes.fill_between(steps, low, high, color=style.color, alpha=0.15, linewidth=0, step=step)  # type: ignore[arg-type]


def _draw_dense(axes: Axes, row: ArmSummary) -> None:
    style = arm_style(row.arm)
    axes.axhline(row.metric.mean, color=style.color, linewidth=1.2, label="dense (mean, 95 %)")
    if row.metric.low is not None and row.metric.high is not None:
        axes.axhspan(row.metric.low, row.metric.high, color=style.color, alpha=0.07, linewidth=0)


def _draw_arm(axes: Axes, row: ArmSummary, runs: Sequence[Record], metric: str) -> None:
    style = arm_style(row.arm)
    points = [(run["density"], run["metrics"][metric]) for run in runs if metric in run["metrics"]]
    axes.errorbar(
        row.density.mean, row.metric.mean, xerr=_error(row.density), yerr=_error(row.metric),
        fmt="none", ecolor=style.color, elinewidth=1.2, capsize=3, alpha=0.8,
    )  # fmt: skip
    x, y = zip(*points, strict=True)
    axes.scatter(x, y, s=22, color=style.color, marker=style.marker, alpha=0.55, linewidth=0)
    axes.scatter(
        row.density.mean, row.metric.mean, s=95, color=style.color, marker=style.marker,
        edgecolor="white", linewidth=0.9, zorder=3, label=_label(row.arm),
    )  # fmt: skip


def _label(arm: str) -> str:
    return arm.replace("$", r"\$")  # matplotlib would read a formula


def _error(interval: Interval) -> float | None:
    return None if interval.high is None else interval.high - interval.mean


def _limit_to_runs(axes: Axes, values: Sequence[float]) -> None:
    """Let the runs set the axis: with two seeds a t interval is so wide that it would flatten the rest."""
    finite = [value for value in values if np.isfinite(value)]
    if finite:
        margin = 0.6 * (max(finite) - min(finite)) or 0.01 * abs(finite[0]) or 0.01
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, min(finite) - margin), min(high, max(finite) + margin))
    _, high = axes.get_xlim()
    axes.set_xlim(0, min(high + 0.02, 1.02))


def _draw_fractions(axes: Axes, records: Sequence[Record], marker: str | None) -> None:
    density, n_eff = group_series(records, "density"), group_series(records, "n_eff_fraction")
    observed = all(record.get("mode") == "observe" for record in records)
    kept = "density that EMP would keep" if observed else "density (kept / all)"
    # With beta = 1 the two coincide: the dashed line lies on top of the wide one.
    axes.plot(list(density), list(density.values()), color="#56B4E9", linewidth=4, label=kept)
    axes.plot(
        list(n_eff), list(n_eff.values()), color="#D55E00", linestyle=(0, (4, 2)), marker=marker,
        markersize=4, label="N_eff / N",
    )  # fmt: skip
    for key, label, line in (("preserved_mass", "preserved mass", "-"), ("tight_mass_bound", "its bound", ":")):
        if series := group_series(records, key):
            axes.plot(list(series), list(series.values()), color="#009E73", linewidth=1.4, linestyle=line, label=label)
    axes.set_ylabel("fraction of N, of the score mass")
    _from_zero(axes)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, borderaxespad=0.2)


def _draw_layer_map(figure: Figure, axes: Axes, layers: Mapping[str, Series]) -> None:
    steps = sorted({step for series in layers.values() for step in series})
    grid = np.array([[series.get(step, np.nan) for step in steps] for series in layers.values()])
    gaps = np.diff(steps) / 2 if len(steps) > 1 else np.array([0.5])
    edges = [steps[0] - gaps[0], *(steps[:-1] + gaps[: len(steps) - 1]), steps[-1] + gaps[-1]]
    image = axes.pcolormesh(edges, np.arange(len(layers) + 1), grid, cmap="cividis", vmin=0.0, vmax=1.0)
    axes.invert_yaxis()
    axes.grid(visible=False)
    every = -(-len(layers) // 40)
    rows = range(0, len(layers), every)
    names = list(layers)
    axes.set_yticks([row + 0.5 for row in rows], [_shorten(names[row]) for row in rows], fontsize=7)
    figure.colorbar(image, ax=axes, label="density (kept / all)", pad=0.01)


def _shorten(name: str, length: int = 34) -> str:
    return name if len(name) <= length else "\u2026" + name[1 - length :]


def _from_zero(axes: Axes) -> None:
    axes.set_ylim(0, max(1.08 * axes.dataLim.y1, 1e-3) if np.isfinite(axes.dataLim.y1) else 1.0)


def _direction(results: Results) -> str:
    return "higher is better" if results["study"]["higher_is_better"] else "lower is better"


STUDY_PLOTS: dict[str, Callable[[Results], Figure]] = {
    "n_eff.png": plot_n_eff,
    "metric_density.png": plot_metric_against_density,
    "density.png": plot_density,
    "learning_curves.png": plot_learning_curves,
}
