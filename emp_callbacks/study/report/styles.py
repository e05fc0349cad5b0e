"""The look of all figures: one style per arm, axes, legends."""

from __future__ import annotations

import colorsys
from dataclasses import dataclass
from itertools import chain
from typing import Any

from matplotlib.axes import Axes

from emp_callbacks.study.report.arm_results import Results, arm_of

SIZE = (8.0, 4.5)  # inches
DPI = 150
TEXT = 9.5  # points: no text of a figure is smaller
# Of lines that are read, of axes, of grids; and what lies on coloured cells, the same by day and by night.
INK, SPINE, GRID, CARD = "#1d2530", "#5b6675", "#e1e5ea", "#ffffff"
ON_DARK, ON_LIGHT = "#fefefe", "#010101"


DASHED, DOTTED, DASH_DOTTED = (0, (5, 2)), (0, (1, 1)), (0, (5, 1, 1, 1))


@dataclass(frozen=True, slots=True)
class ArmStyle:
    """How one arm is drawn, in every figure."""

    color: str
    marker: str
    line: str | tuple[int, tuple[int, ...]] = "-"
    width: float = 1.8

    @property
    def filled(self) -> bool:
        """Whether markers are filled: those of arms that are pruned after dense training are open."""
        return self.line != DASH_DOTTED


FAMILIES: dict[str, dict[str, ArmStyle]] = {
    "Baselines": {
        "dense": ArmStyle(INK, "s"),
        "one_shot": ArmStyle("#B87700", "D"),
    },
    "EMP during training": {
        "training_feedback": ArmStyle("#0072B2", "o"),
        "training_project": ArmStyle("#009E73", "^"),
        "training_freeze": ArmStyle("#D55E00", "v"),
        "training_dynamic": ArmStyle("#882255", "p"),
        "training_dynamic_ste": ArmStyle("#B5477A", "h"),
        "emp_dropout": ArmStyle("#2A9485", "<"),
        "emp_dropout_gumbel": ArmStyle("#117733", ">"),
    },
    "Pruned after dense training": {
        "one_shot_dynamic": ArmStyle("#8A8A2A", "d", DASH_DOTTED),
        "one_shot_tensor": ArmStyle("#B35900", "s", DASH_DOTTED),
        "one_shot_row": ArmStyle("#5A8FC7", "o", DASH_DOTTED),
        "one_shot_erk": ArmStyle("#7A5C50", "^", DASH_DOTTED),
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
        "fixed_magnitude": ArmStyle("#C2699B", "P", "-", 4.0),
        "random": ArmStyle("#2A90C8", "X", (0, (3, 2)), 1.6),
        "fixed_uniform": ArmStyle("#6A3D9A", "o", DOTTED),
        "fixed_erk": ArmStyle("#B15928", "^", DOTTED),
        "fixed_emp_shares": ArmStyle("#1F6FB4", "v", DOTTED),
        "random_emp_shares": ArmStyle("#2F8F8F", "d", DOTTED),
        "random_uniform": ArmStyle("#748699", "s", DOTTED),
    },
}
OTHERS = "Other arms"
STYLES: dict[str, ArmStyle] = dict(chain.from_iterable(family.items() for family in FAMILIES.values()))
OTHER_STYLES = (
    ArmStyle("#7D7D7D", "h"),
    ArmStyle("#968900", "*"),  # the palette's yellow, darkened: #F0E442 is hard to see on white
    ArmStyle("#6B4C9A", "<"),
)


def arm_style(label: str) -> ArmStyle:
    """Return the style of an arm, at any point; an arm of your own gets one that depends on its name only."""
    arm = arm_of(label)
    return STYLES.get(arm) or OTHER_STYLES[sum(arm.encode()) % len(OTHER_STYLES)]


def family_of(arm: str) -> str:
    """Return the family of an arm; OTHERS for one of your own."""
    return next((name for name, arms in FAMILIES.items() if arm in arms), OTHERS)


TITLE: dict[str, Any] = {"x": 0.01, "ha": "left", "fontsize": 11.5, "fontweight": "bold", "color": INK}
"""Of a figure, over all its panels."""
HEADING: dict[str, Any] = {"loc": "left", "fontsize": 10.5, "fontweight": "bold", "color": INK}
"""Of one panel."""


def style_axes(axes: Axes) -> None:
    """Give axes the look of all figures here."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(SPINE)
    axes.tick_params(colors=INK, labelsize=TEXT)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=INK, fontsize=10)
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)


def contrast(one: str, other: str) -> float:
    """Return the contrast of two colours as WCAG 2 defines it, from 1 to 21.

    Args:
        one: "#rrggbb".
        other: The same.

    Examples:
        >>> contrast("#000000", "#ffffff")
        21.0
    """
    light, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return round((light + 0.05) / (dark + 0.05), 6)


def _luminance(color: str) -> float:
    channels = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


DARK_CARD = "#1b2128"
_DARK = {
    "#000000": "#e6eaef",
    INK: "#e6eaef",
    SPINE: "#9aa6b4",
    GRID: "#303944",
    CARD: DARK_CARD,
    ON_DARK: ON_DARK,
    ON_LIGHT: ON_LIGHT,
}


def for_dark(color: str) -> str:
    """Return the twin of a figure's colour on a dark page: the same hue, light enough to be seen.

    Examples:
        >>> for_dark("#e1e5ea"), contrast(for_dark("#332288"), DARK_CARD) > 4
        ('#303944', True)
    """
    color = color.lower()
    if color in _DARK:
        return _DARK[color]
    hue, lightness, saturation = colorsys.rgb_to_hls(*(int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)))
    twin = color
    while contrast(twin, DARK_CARD) < 4.2 and lightness < 1:
        lightness += 0.02
        rgb = colorsys.hls_to_rgb(hue, min(lightness, 1.0), saturation)
        twin = "#" + "".join(f"{round(255 * channel):02x}" for channel in rgb)
    return twin


def name_in_plot(label: str) -> str:
    """Return a name that matplotlib does not read as a formula."""
    return label.replace("$", r"\$")


def direction(results: Results) -> str:
    """Return which values of the study's metric are good."""
    return "higher is better" if results["study"]["higher_is_better"] else "lower is better"
