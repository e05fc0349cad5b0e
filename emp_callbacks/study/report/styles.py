"""The look of all figures: one style per arm, axes, legends."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from emp_callbacks.study.report.arm_results import Results, arm_of

SIZE = (8.0, 4.5)  # inches
DPI = 150
INK = "#333333"


@dataclass(frozen=True, slots=True)
class ArmStyle:
    """How one arm is drawn, in every figure."""

    color: str
    marker: str
    line: str | tuple[int, tuple[int, ...]] = "-"
    width: float = 1.8


DASHED, DOTTED, DASH_DOTTED = (0, (5, 2)), (0, (1, 1)), (0, (5, 1, 1, 1))

FAMILIES: dict[str, dict[str, ArmStyle]] = {
    "Baselines": {
        "dense": ArmStyle("#000000", "s"),
        "one_shot": ArmStyle("#E69F00", "D"),
    },
    "EMP during training": {
        "training_feedback": ArmStyle("#0072B2", "o"),
        "training_project": ArmStyle("#009E73", "^"),
        "training_freeze": ArmStyle("#D55E00", "v"),
        "training_dynamic": ArmStyle("#882255", "p"),
        "training_dynamic_ste": ArmStyle("#C2588A", "h"),
        "emp_dropout": ArmStyle("#44AA99", "<"),
        "emp_dropout_gumbel": ArmStyle("#117733", ">"),
    },
    "Pruned after dense training": {
        "one_shot_dynamic": ArmStyle("#8A8A2A", "d", DASH_DOTTED),
        "one_shot_tensor": ArmStyle("#B35900", "s", DASH_DOTTED),
        "one_shot_row": ArmStyle("#6699CC", "o", DASH_DOTTED),
        "one_shot_erk": ArmStyle("#7A4A00", "^", DASH_DOTTED),
        "one_shot_finetune": ArmStyle("#E34A33", "v", DASH_DOTTED),
        "one_shot_finetune_lr": ArmStyle("#99000D", "P", DASH_DOTTED),
    },
    "Other sparse training": {
        "gmp": ArmStyle("#332288", "o", DASHED),
        "sap": ArmStyle("#AA4499", "^", DASHED),
        "rigl": ArmStyle("#1B9E3E", "v", DASHED),
        "set": ArmStyle("#8C6D31", "s", DASHED),
        "small_dense": ArmStyle("#666666", "*", DASHED),
    },
    "Fixed density and random": {
        # These two often lie on one line: a wide one below a narrow one keeps both visible.
        "fixed_magnitude": ArmStyle("#CC79A7", "P", "-", 4.0),
        "random": ArmStyle("#56B4E9", "X", (0, (3, 2)), 1.6),
        "fixed_uniform": ArmStyle("#6A3D9A", "o", DOTTED),
        "fixed_erk": ArmStyle("#B15928", "^", DOTTED),
        "fixed_emp_shares": ArmStyle("#1F6FB4", "v", DOTTED),
        "random_emp_shares": ArmStyle("#2F8F8F", "d", DOTTED),
        "random_uniform": ArmStyle("#8899AA", "s", DOTTED),
    },
}
OTHERS = "Other arms"
STYLES: dict[str, ArmStyle] = dict(chain.from_iterable(family.items() for family in FAMILIES.values()))
OTHER_STYLES = (
    ArmStyle("#888888", "h"),
    ArmStyle("#B8A800", "*"),  # the palette's yellow, darkened: #F0E442 is hard to see on white
    ArmStyle("#6B4C9A", "<"),
)


def arm_style(label: str) -> ArmStyle:
    """Return the style of an arm, at any point; an arm of your own gets one that depends on its name only."""
    arm = arm_of(label)
    return STYLES.get(arm) or OTHER_STYLES[sum(arm.encode()) % len(OTHER_STYLES)]


def family_of(arm: str) -> str:
    """Return the family of an arm; OTHERS for one of your own."""
    return next((name for name, arms in FAMILIES.items() if arm in arms), OTHERS)


def study_figure(title: str, ylabel: str) -> tuple[Figure, Axes]:
    """Return a figure of a study with empty axes over optimizer steps."""
    figure = Figure(figsize=SIZE, layout="constrained", dpi=DPI)
    axes = figure.subplots()
    style_axes(axes)
    axes.set_title(title, **TITLE)
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel(ylabel)
    return figure, axes


TITLE: dict[str, Any] = {"loc": "left", "fontsize": 12, "fontweight": "bold", "color": INK, "pad": 10}


def style_axes(axes: Axes) -> None:
    """Give axes the look of all figures here."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")
    axes.tick_params(colors=INK, labelsize=9)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    axes.grid(color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)


def finish(figure: Figure, axes: Axes, empty: str) -> Figure:
    """Return the figure with a legend beside it, or with the text `empty` where nothing was drawn."""
    if entries := len(axes.get_legend_handles_labels()[0]):
        # Twenty entries fill the height of the figure.
        size = min(9.0, 180 / entries)
        figure.legend(loc="outside right upper", frameon=False, fontsize=size, labelcolor=INK)
    else:
        axes.text(0.5, 0.5, empty, transform=axes.transAxes, ha="center", color=INK)
    return figure


def name_in_plot(label: str) -> str:
    """Return a name that matplotlib does not read as a formula."""
    return label.replace("$", r"\$")


def direction(results: Results) -> str:
    """Return which values of the study's metric are good."""
    return "higher is better" if results["study"]["higher_is_better"] else "lower is better"
