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

from emp_callbacks.study.report.arm_results import Results, arm_names, at_middle_point, middle_point, runs_of
from emp_callbacks.study.report.convergence import convergence, curve_of
from emp_callbacks.study.report.metric_density import plot_metric_against_density
from emp_callbacks.study.report.styles import (
    DPI,
    INK,
    SIZE,
    arm_style,
    direction,
    finish,
    name_in_plot,
    study_figure,
    style_axes,
)

Record = Mapping[str, Any]
Series = dict[int, float]  # step -> value


def plot_n_eff(results: Results) -> Figure:
    """Draw N_eff / N over steps: mean over seeds as a line, min to max as a band."""
    figure, axes = study_figure(_titled("Effective number during training", results), "N_eff / N")
    results = at_middle_point(results)
    for arm in arm_names(results):
        seeds = [group_series(run.get("trajectory") or [], "n_eff_fraction") for run in runs_of(results, arm)]
        _draw_seeds(axes, arm, seeds)
    _from_zero(axes)
    return finish(figure, axes, "no refresh was recorded")


def plot_density(results: Results) -> Figure:
    """Draw the density over steps: it is 1 before the first refresh and constant between two refreshes."""
    figure, axes = study_figure(_titled("Density during training", results), "density (kept / all)")
    results = at_middle_point(results)
    for arm in arm_names(results):
        seeds = [_density_series(run) for run in runs_of(results, arm)]
        _draw_seeds(axes, arm, seeds, drawstyle="steps-post")
    _from_zero(axes)
    return finish(figure, axes, "no refresh was recorded")


def plot_learning_curves(results: Results) -> Figure:
    """Draw the validation metric over steps: mean over seeds as a line, min to max as a band.

    Arms that are pruned after another arm's training have its curve and are left out. The dotted line is the last
    value of dense training.
    """
    found = convergence(results)
    if found is None:
        return finish(*study_figure("Learning curves", ""), "no validation metric was recorded")
    figure, axes = study_figure(_titled("Learning curves", results), f"{found.metric} ({direction(results)})")
    for row in found.arms:
        _draw_seeds(axes, row.arm, [curve_of(run, found.metric) for run in runs_of(results, row.arm)])
    if found.target is not None:
        axes.axhline(found.target, color=INK, linewidth=1, linestyle=":", label=f"last of {found.baseline} (mean)")
    return finish(figure, axes, "")


def _titled(title: str, results: Results) -> str:
    """Return a title that says which of the study's points the curves are of: that in the middle."""
    middle = middle_point(results)
    return title if middle is None else f"{title}, at density {middle:g}"


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
        label=name_in_plot(arm),
    )  # fmt: skip
    step = "post" if drawstyle == "steps-post" else None
    axes.fill_between(steps, low, high, color=style.color, alpha=0.15, linewidth=0, step=step)  # type: ignore[arg-type]


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


STUDY_PLOTS: dict[str, Callable[[Results], Figure]] = {
    "metric_density.png": plot_metric_against_density,
    "n_eff.png": plot_n_eff,
    "density.png": plot_density,
    "learning_curves.png": plot_learning_curves,
}
