"""The picture of `emp gates`."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from statistics import fmean

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from emp_callbacks.study.gates.arms import ARMS
from emp_callbacks.study.gates.comparisons import Arms, by_token
from emp_callbacks.study.gates.token_counts import VARIANTS
from emp_callbacks.study.report.layout import panels
from emp_callbacks.study.report.metric_density import PLAIN
from emp_callbacks.study.report.page import MINUS, number
from emp_callbacks.study.report.statistics import mean_interval
from emp_callbacks.study.report.styles import CARD, HEADING, INK, SPINE, TITLE

__all__ = ["gates_seen", "plot_gates"]

_COLORS = {
    "Z": INK, "A": "#7D7D7D", "B": "#B87700", "C": "#B5477A", "D": "#0072B2", "E": "#D55E00", "E'": "#2A90C8",
    "F": "#009E73", "G": "#882255", "R": "#8A8A2A",
}  # fmt: skip
_TOKEN_STYLES = {
    "B1": ("#D55E00", "o"), "B2": ("#0072B2", "s"), "B3": ("#2A90C8", "^"), "B4": ("#009E73", "D"),
    "B4'": ("#B5477A", "v"), "B5": ("#7D7D7D", "P"),
}  # fmt: skip


def plot_gates(arms: Arms, narrow: bool = False) -> Figure:
    """Draw the loss of every arm at both budgets, the curve through the number of heads, and the loss by token."""
    drawn = panels(4, narrow=narrow, columns=2, size=(6.0, 4.4))
    first, second, curve, token = drawn.axes
    _draw_arms(first, arms, "K1", "EMP's own count of heads (K1)")
    _draw_arms(second, arms, "K2", f"a quarter of the heads (K2 = {max(1, arms.n // 4)})")
    _draw_curve(curve, arms)
    _draw_by_token(token, arms)
    drawn.legends(columns=2)
    return drawn.figure


def _draw_arms(axes: Axes, arms: Arms, budget: str, title: str) -> None:
    """Draw each arm's loss less that of arm B, which takes out what seeds differ in; A's, far away, is told."""
    reference = arms.values("B", budget)
    names = [arm for arm in ARMS if arm != "A" and arms.values(arm, budget)]
    seeds = [seed for seed in arms.seeds if all(seed in arms.values(arm, budget) for arm in names)]
    away = {arm: [arms.values(arm, budget)[seed] - reference[seed] for seed in seeds] for arm in names}
    for place in range(len(seeds)):
        line = [away[arm][place] for arm in names]
        axes.plot(line, range(len(names)), color=SPINE, alpha=0.35, linewidth=0.7, zorder=1)
    for at, arm in enumerate(names):
        axes.scatter(
            away[arm], [at] * len(seeds), s=20, facecolor=CARD, edgecolor=_COLORS[arm], linewidth=1.1, zorder=3
        )
        _bar(axes, at, away[arm], _COLORS[arm])
    axes.axvline(0, color=INK, linewidth=0.9)
    axes.set_yticks(range(len(names)), [textwrap.fill(f"{arm}: {ARMS[arm]}", 24) for arm in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.set_xlabel(f"test loss {MINUS} that of B (nats)")
    untrained = [arms.values("A", budget)[seed] - reference[seed] for seed in seeds if seed in arms.values("A", budget)]
    beside = f"; A: {fmean(untrained):+.3f}" if untrained else ""
    _title(axes, title + beside.replace("-", MINUS))


def _title(axes: Axes, text: str) -> None:
    # At the edge of the panel, not of the axes: names of arms take up to half of it.
    axes.figure.suptitle(text, **{**TITLE, "fontsize": HEADING["fontsize"]})


def _bar(axes: Axes, at: float, values: Sequence[float], color: str) -> None:
    found = mean_interval(values)
    axes.plot([found.mean] * 2, [at - 0.28, at + 0.28], color=color, linewidth=2.4, zorder=4)
    if found.low is not None and found.high is not None:
        axes.fill_betweenx([at - 0.28, at + 0.28], found.low, found.high, color=color, alpha=0.2, linewidth=0, zorder=2)


def _draw_curve(axes: Axes, arms: Arms) -> None:
    for seed in arms.seeds:
        curve = arms.curve(seed)
        label = "arm F, a line is a seed" if seed == arms.seeds[0] else None
        axes.plot([*curve], [*curve.values()], color=_COLORS["F"], linewidth=0.9, marker="o", markersize=3, label=label)
        own = arms.budget("K1", seed)
        if own in curve:
            axes.scatter([own], [curve[own]], s=45, marker="D", color=_COLORS["E"], zorder=3)
    axes.scatter([], [], s=45, marker="D", color=_COLORS["E"], label="EMP's own count")
    axes.set(xlabel="heads kept", ylabel="test loss (nats)")
    _title(axes, "arm F through the number of heads")


def _draw_by_token(axes: Axes, arms: Arms) -> None:
    """Draw the loss less that of the dense model."""
    betas = sorted({row["beta"] for row in arms.by_token})
    dense = {row["seed"]: row["dense_loss"] for row in arms.by_token if row["variant"] == "B1"}
    for variant, says in VARIANTS.items():
        at = [fmean(by_token(arms, beta, variant, "heads").values()) for beta in betas]
        losses = [by_token(arms, beta, variant) for beta in betas]
        found = [mean_interval([loss - dense[seed] for seed, loss in own.items()]) for own in losses]
        color, marker = _TOKEN_STYLES[variant]
        axes.plot(
            at, [one.mean for one in found], color=color, marker=marker, markersize=4.5, label=f"{variant}: {says}"
        )
        if all(one.low is not None for one in found):
            low, high = (np.array([getattr(one, end) for one in found]) for end in ("low", "high"))
            axes.fill_between(at, low, high, color=color, alpha=0.12, linewidth=0)
    if axes.dataLim.y0 > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(PLAIN)
        axes.yaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="heads per token and layer", ylabel=f"test loss {MINUS} that\nof all heads (nats)")
    _title(axes, "heads by token, nothing trained")


def gates_seen(arms: Arms) -> str:
    """Say what is seen in the picture, for those who do not."""
    said = []
    for budget, name in (("K1", "EMP's own count of heads"), ("K2", "a quarter of the heads")):
        reference = arms.values("B", budget)
        away = {
            arm: fmean(values[seed] - reference[seed] for seed in values if seed in reference)
            for arm in ARMS
            if arm not in "ABZ" and (values := arms.values(arm, budget)).keys() & reference.keys()
        }
        if away:
            low, high = min(away, key=lambda arm: away[arm]), max(away, key=lambda arm: away[arm])
            said.append(
                f"at {name}, arm {low} is nearest to B or below it ({number(away[low], 4, True)} nats), arm {high} "
                f"furthest above ({number(away[high], 4, True)})"
            )
    ends = [curve for seed in arms.seeds if (curve := arms.curve(seed))]
    if ends:
        few, many = (fmean(curve[pick(curve)] for curve in ends) for pick in (min, max))
        said.append(f"arm F's loss falls from {few:.3f} with the fewest heads to {many:.3f} with all of those drawn")
    betas = sorted({row["beta"] for row in arms.by_token})
    if betas:
        losses = {variant: fmean(by_token(arms, betas[0], variant).values()) for variant in VARIANTS}
        low, high = min(losses, key=lambda name: losses[name]), max(losses, key=lambda name: losses[name])
        said.append(f"by token, {low} has the lowest loss at the lowest count and {high} the highest")
    text = "; ".join(said) or "nothing was measured"
    return f"{text[0].upper()}{text[1:]}."
