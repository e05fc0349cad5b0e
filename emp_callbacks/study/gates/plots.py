"""The picture of `emp gates`."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from emp_callbacks.study.gates.arms import ARMS
from emp_callbacks.study.gates.comparisons import Arms, by_token
from emp_callbacks.study.gates.token_counts import VARIANTS
from emp_callbacks.study.report.page import MINUS
from emp_callbacks.study.report.statistics import mean_interval
from emp_callbacks.study.report.styles import DPI, INK, style_axes

__all__ = ["plot_gates"]

_COLORS = {
    "Z": "#000000", "A": "#888888", "B": "#E69F00", "C": "#CC79A7", "D": "#0072B2", "E": "#D55E00", "E'": "#56B4E9",
    "F": "#009E73", "G": "#882255", "R": "#8A8A2A",
}  # fmt: skip
_TOKEN_COLORS = {"B1": "#D55E00", "B2": "#0072B2", "B3": "#56B4E9", "B4": "#009E73", "B4'": "#CC79A7", "B5": "#888888"}


def plot_gates(arms: Arms) -> Figure:
    """Draw the loss of every arm at both budgets, the curve through the number of heads, and the loss by token."""
    figure = Figure(figsize=(12.0, 8.0), layout="constrained", dpi=DPI)
    panels = figure.subplots(2, 2)
    for axes in panels.flat:
        style_axes(axes)
    _draw_arms(panels[0, 0], arms, "K1", "EMP's own count of heads (K1)")
    _draw_arms(panels[0, 1], arms, "K2", f"a quarter of the heads (K2 = {max(1, arms.n // 4)})")
    _draw_curve(panels[1, 0], arms)
    _draw_by_token(panels[1, 1], arms)
    legend = [
        Line2D([], [], color=_COLORS[arm], marker="o", linewidth=0, label=f"{arm}: {says}")
        for arm, says in ARMS.items()
    ]
    figure.legend(handles=legend, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=11, fontweight="bold", color=INK)


def _draw_arms(axes: Axes, arms: Arms, budget: str, title: str) -> None:
    """Draw each arm's loss less that of arm B, which takes out what seeds differ in; A's, far away, is told."""
    reference = arms.values("B", budget)
    names = [arm for arm in ARMS if arm != "A" and arms.values(arm, budget)]
    seeds = [seed for seed in arms.seeds if all(seed in arms.values(arm, budget) for arm in names)]
    away = {arm: [arms.values(arm, budget)[seed] - reference[seed] for seed in seeds] for arm in names}
    for place in range(len(seeds)):
        axes.plot([away[arm][place] for arm in names], color="#cccccc", linewidth=0.7, zorder=1)
    for at, arm in enumerate(names):
        axes.scatter([at] * len(seeds), away[arm], s=18, color=_COLORS[arm], linewidth=0, zorder=3)
        _bar(axes, at, away[arm], _COLORS[arm])
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel(f"test loss {MINUS} that of B (nats)", fontsize=9)
    untrained = [arms.values("A", budget)[seed] - reference[seed] for seed in seeds if seed in arms.values("A", budget)]
    beside = f"; A: {fmean(untrained):+.3f}" if untrained else ""
    _title(axes, title + beside.replace("-", MINUS))


def _bar(axes: Axes, at: float, values: Sequence[float], color: str) -> None:
    found = mean_interval(values)
    axes.plot([at - 0.25, at + 0.25], [found.mean] * 2, color=color, linewidth=2.2, zorder=4)
    if found.low is not None and found.high is not None:
        axes.fill_between([at - 0.25, at + 0.25], found.low, found.high, color=color, alpha=0.2, linewidth=0, zorder=2)


def _draw_curve(axes: Axes, arms: Arms) -> None:
    for seed in arms.seeds:
        curve = arms.curve(seed)
        axes.plot([*curve], [*curve.values()], color=_COLORS["F"], linewidth=0.9, alpha=0.5, marker="o", markersize=3)
        own = arms.budget("K1", seed)
        if own in curve:
            axes.scatter([own], [curve[own]], s=45, marker="D", color=_COLORS["E"], zorder=3)
    axes.scatter([], [], s=45, marker="D", color=_COLORS["E"], label="EMP's own count")
    axes.legend(frameon=False, fontsize=9)
    axes.set(xlabel="heads kept", ylabel="test loss (nats)")
    _title(axes, "arm F through the number of heads; a line a seed")


def _draw_by_token(axes: Axes, arms: Arms) -> None:
    """Draw the loss less that of the dense model."""
    betas = sorted({row["beta"] for row in arms.by_token})
    dense = {row["seed"]: row["dense_loss"] for row in arms.by_token if row["variant"] == "B1"}
    for variant, says in VARIANTS.items():
        at = [fmean(by_token(arms, beta, variant, "heads").values()) for beta in betas]
        losses = [by_token(arms, beta, variant) for beta in betas]
        found = [mean_interval([loss - dense[seed] for seed, loss in own.items()]) for own in losses]
        color = _TOKEN_COLORS[variant]
        axes.plot(at, [one.mean for one in found], color=color, marker="o", markersize=4, label=f"{variant}: {says}")
        if all(one.low is not None for one in found):
            low, high = (np.array([getattr(one, end) for one in found]) for end in ("low", "high"))
            axes.fill_between(at, low, high, color=color, alpha=0.12, linewidth=0)
    if axes.dataLim.y0 > 0:
        axes.set_yscale("log")
        axes.set_ylim(top=30 * axes.dataLim.y1)  # room for the names
    axes.legend(frameon=False, fontsize=8, loc="upper right")
    axes.set(xlabel="heads per token and layer", ylabel=f"test loss {MINUS} that of all heads (nats)")
    _title(axes, "heads by token, nothing trained")
