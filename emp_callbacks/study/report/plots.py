"""Figures of a study and of a single run.

Every function returns a `matplotlib.figure.Figure` and leaves pyplot and the global backend alone. One arm
has one colour, line and marker in all figures. Curves over steps of a study at several points are those of the middle.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from emp_callbacks.study.report.arm_results import Results, arm_names, arm_of, at_middle_point, middle_point, runs_of
from emp_callbacks.study.report.convergence import convergence, curve_of
from emp_callbacks.study.report.layout import NARROW, Panels, families, panels
from emp_callbacks.study.report.metric_density import plot_metric_against_density, scale_values
from emp_callbacks.study.report.metric_format import MetricFormat
from emp_callbacks.study.report.styles import (
    CARD,
    DPI,
    HEADING,
    INK,
    SIZE,
    TEXT,
    arm_style,
    direction,
    name_in_plot,
    style_axes,
)

Record = Mapping[str, Any]
Series = dict[int, float]  # step -> value


def plot_n_eff(results: Results, narrow: bool = False) -> Figure:
    """Draw N_eff / N over steps: mean over seeds as a line, min to max as a band."""
    return _curves(results, n_eff_curves(results), "Effective number during training", "N_eff / N", narrow)


def plot_density(results: Results, narrow: bool = False) -> Figure:
    """Draw the density over steps: it is 1 before the first refresh and constant between two refreshes."""
    return _curves(
        results, density_curves(results), "Density during training", "density (kept / all)", narrow, "steps-post"
    )


def plot_learning_curves(results: Results, narrow: bool = False) -> Figure:
    """Draw the validation metric over steps: mean over seeds as a line, min to max as a band.

    Arms that are pruned after another arm's training have its curve and are left out. The dotted line is the last
    value of dense training. The frame holds the second half of the training.
    """
    found = convergence(results)
    if found is None:
        return _empty("Learning curves", "no validation metric was recorded", narrow)
    curves, factor = learning_curves(results), 100.0 if MetricFormat.of(results).percent else 1.0
    unit = " (%)" if factor > 1 else ""
    target = [] if found.target is None else [factor * found.target]
    drawn = _curve_panels(results, curves, "Learning curves", [f"{found.metric}{unit}", direction(results)], narrow)
    scaled = _frame_second_half(drawn.axes[0], curves, target, percent=factor > 1)
    for axes in drawn.axes:
        axes.set_ylabel(axes.get_ylabel() + f"\n({scaled})" * bool(scaled))
        for value in target:
            axes.axhline(value, color=INK, linewidth=1.2, linestyle=":", label=f"last of {found.baseline} (mean)")
    drawn.legends(beside=len(drawn.axes) == 1)
    return drawn.figure


def n_eff_curves(results: Results) -> dict[str, list[Series]]:
    """Return arm -> N_eff / N over steps of each seed."""
    results = at_middle_point(results)
    return {
        arm: [group_series(run.get("trajectory") or [], "n_eff_fraction") for run in runs_of(results, arm)]
        for arm in arm_names(results)
    }


def density_curves(results: Results) -> dict[str, list[Series]]:
    """Return arm -> the density over steps of each seed."""
    results = at_middle_point(results)
    return {arm: [_density_series(run) for run in runs_of(results, arm)] for arm in arm_names(results)}


def learning_curves(results: Results) -> dict[str, list[Series]]:
    """Return arm -> the validation metric over steps of each seed, in percent where tables are."""
    found, factor = convergence(results), 100.0 if MetricFormat.of(results).percent else 1.0
    if found is None:
        return {}
    return {
        row.arm: [
            {step: factor * value for step, value in curve_of(run, found.metric).items()}
            for run in runs_of(at_middle_point(results), row.arm)
        ]
        for row in found.arms
    }


def _curves(
    results: Results,
    curves: Mapping[str, Sequence[Series]],
    title: str,
    ylabel: str,
    narrow: bool,
    form: str = "default",
) -> Figure:
    if not any(any(seeds) for seeds in curves.values()):
        return _empty(title, "no refresh was recorded", narrow)
    drawn = _curve_panels(results, curves, title, [ylabel], narrow, form)
    _from_zero(drawn.axes)
    drawn.legends(beside=len(drawn.axes) == 1)
    return drawn.figure


def _curve_panels(
    results: Results,
    curves: Mapping[str, Sequence[Series]],
    title: str,
    ylabel: Sequence[str],
    narrow: bool,
    form: str = "default",
) -> Panels:
    """Draw curves over steps, those of many arms in a panel for each family."""
    groups = families([arm for arm, seeds in curves.items() if any(seeds)])
    drawn = panels(len(groups), narrow=narrow, size=SIZE if len(groups) == 1 else (6.0, 3.2), share=True)
    for axes, (family, arms) in zip(drawn.axes, groups.items(), strict=True):
        for arm in arms:
            # Of a study at points: N_eff's own count beside the same arm at the point that all curves are of.
            own_count = middle_point(results) is not None and arm == arm_of(arm) and any(
                other != arm and arm_of(other) == arm for other in curves
            )  # fmt: skip
            _draw_seeds(axes, arm, curves[arm], form, faint=own_count)
        axes.set(xlabel="optimizer step", ylabel=drawn.broken(*ylabel))
        axes.xaxis.set_major_locator(MaxNLocator(5 if narrow else 9, integer=True))
        if family:
            axes.set_title(family, **HEADING)
    drawn.title(_titled(title, results))
    return drawn


def _empty(title: str, said: str, narrow: bool) -> Figure:
    drawn = panels(1, narrow=narrow, size=SIZE)
    drawn.axes[0].text(0.5, 0.5, said, transform=drawn.axes[0].transAxes, ha="center", color=INK)
    drawn.title(title)
    return drawn.figure


def _frame_second_half(
    axes: Axes, curves: Mapping[str, Sequence[Series]], target: Sequence[float], *, percent: bool
) -> str:
    """Let the second half of the training, in which arms differ, fill the frame; say how the axis is scaled."""
    last = max(step for seeds in curves.values() for series in seeds for step in series)
    late = [v for seeds in curves.values() for series in seeds for step, v in series.items() if 2 * step >= last]
    shown = [value for value in (*late, *target) if np.isfinite(value)]
    if not shown:
        return ""
    margin = 0.08 * (max(shown) - min(shown)) or 0.01 * abs(max(shown)) or 0.01
    return scale_values(axes, "y", shown, (min(shown) - margin, max(shown) + margin), percent=percent)


def _titled(title: str, results: Results) -> str:
    """Return a title that says which of the study's points the curves are of: that in the middle."""
    middle = middle_point(results)
    return title if middle is None else f"{title}, at density {middle:g}"


def plot_trajectory(records: Sequence[Record], narrow: bool = False) -> Figure:
    """Draw one run: N_eff / N and density, churn below, and a map layer x refresh of density where recorded.

    Raises:
        ValueError: If `records` is empty.
    """
    if not records:
        raise ValueError("the trajectory holds no refresh: nothing to draw. Was a refresh due within the run?")
    layers = layer_density(records)
    if len({step for series in layers.values() for step in series}) < 2:
        layers = {}  # one refresh is no course: the table of layers shows it
    heights = [3.0, 1.5] + ([min(7.0, 1.0 + 0.2 * len(layers))] if layers else [])
    figure = Figure(figsize=(NARROW if narrow else SIZE[0], 1.0 + sum(heights)), layout="constrained", dpi=DPI)
    parts = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0]
    for axes in parts:
        style_axes(axes)
    marker = "o" if len(records) <= 60 else None
    _draw_fractions(parts[0], records, marker)
    figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=TEXT, labelcolor=INK)
    churn = group_series(records, "churn")
    parts[1].plot(list(churn), list(churn.values()), color="#B5477A", marker=marker, markersize=4)
    parts[1].set_ylabel("churn\n(changed / all)")
    _from_zero([parts[1]])
    if layers:
        _draw_layer_map(figure, parts[2], layers, 18 if narrow else 34)
    parts[-1].set_xlabel("optimizer step")
    parts[-1].xaxis.set_major_locator(MaxNLocator(4 if narrow else 9, integer=True))
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


def _draw_seeds(axes: Axes, arm: str, seeds: Sequence[Series], form: str, *, faint: bool = False) -> None:
    steps = sorted({step for series in seeds for step in series})
    style = arm_style(arm)
    at_step = [[series[step] for series in seeds if step in series] for step in steps]
    mean = [float(np.mean(values)) for values in at_step]
    low, high = [min(values) for values in at_step], [max(values) for values in at_step]
    marker = style.marker if len(steps) <= 40 else None
    axes.plot(
        steps, mean, color=style.color, linestyle=style.line, drawstyle=form, marker=marker, markersize=5,
        markerfacecolor=CARD if faint else style.color, markeredgewidth=1.0, linewidth=1.0 if faint else style.width,
        zorder=2 + 1 / style.width, label=name_in_plot(arm) + (" (own count)" if faint else ""),
    )  # fmt: skip
    step = "post" if form == "steps-post" else None
    axes.fill_between(steps, low, high, color=style.color, alpha=0.15, linewidth=0, step=step)  # type: ignore[arg-type]


def _draw_fractions(axes: Axes, records: Sequence[Record], marker: str | None) -> None:
    density, n_eff = group_series(records, "density"), group_series(records, "n_eff_fraction")
    observed = all(record.get("mode") == "observe" for record in records)
    kept = "density that EMP would keep" if observed else "density (kept / all)"
    # With beta = 1 the two coincide: the dashed line lies on top of the wide one.
    axes.plot(list(density), list(density.values()), color="#2A90C8", linewidth=4.5, label=kept)
    axes.plot(
        list(n_eff), list(n_eff.values()), color="#D55E00", linestyle=(0, (4, 2)), marker=marker,
        markersize=4, label="N_eff / N",
    )  # fmt: skip
    for key, label, line in (("preserved_mass", "preserved mass", "-"), ("tight_mass_bound", "its bound", ":")):
        if series := group_series(records, key):
            axes.plot(list(series), list(series.values()), color="#009E73", linewidth=1.4, linestyle=line, label=label)
    axes.set_ylabel("fraction")
    _from_zero([axes])


def _draw_layer_map(figure: Figure, axes: Axes, layers: Mapping[str, Series], length: int) -> None:
    steps = sorted({step for series in layers.values() for step in series})
    grid = np.array([[series.get(step, np.nan) for step in steps] for series in layers.values()])
    gaps = np.diff(steps) / 2
    edges = [steps[0] - gaps[0], *(steps[:-1] + gaps[: len(steps) - 1]), steps[-1] + gaps[-1]]
    image = axes.pcolormesh(
        edges, np.arange(len(layers) + 1), grid, cmap="cividis", vmin=0.0, vmax=1.0, rasterized=True
    )
    axes.invert_yaxis()
    axes.grid(visible=False)
    every = -(-len(layers) // 32)
    rows = range(0, len(layers), every)
    names = _told_apart(list(layers), length)
    axes.set_yticks([row + 0.5 for row in rows], [names[row] for row in rows], fontsize=TEXT)
    bar = figure.colorbar(image, ax=axes, location="bottom", aspect=40, pad=0.02)
    if bar.solids is not None:
        bar.solids.set_rasterized(True)
    bar.set_label("density (kept / all)", color=INK, fontsize=TEXT)
    bar.ax.tick_params(colors=INK, labelsize=TEXT)


def _told_apart(names: Sequence[str], length: int) -> list[str]:
    """Return the last letters of names, without an ending that all have."""
    endings = {name.rpartition(".")[2] for name in names}
    if len(endings) == 1 and all("." in name for name in names):
        names = [name.rpartition(".")[0] for name in names]
    return [name if len(name) <= length else "\u2026" + name[1 - length :] for name in names]


def _from_zero(axes_of: Sequence[Axes]) -> None:
    highest = max(axes.dataLim.y1 for axes in axes_of)
    for axes in axes_of:
        axes.set_ylim(0, max(1.08 * highest, 1e-3) if np.isfinite(highest) else 1.0)


STUDY_PLOTS: dict[str, Callable[[Results, bool], Figure]] = {
    "metric_density.png": plot_metric_against_density,
    "n_eff.png": plot_n_eff,
    "density.png": plot_density,
    "learning_curves.png": plot_learning_curves,
}
