"""How the panels of a figure lie: beside each other, or in one column that a telephone shows without shrinking it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase

from emp_callbacks.study.report.arm_results import REFERENCE, arm_of
from emp_callbacks.study.report.styles import DPI, FAMILIES, INK, OTHERS, TEXT, TITLE, family_of, style_axes

__all__ = ["NARROW", "PANELS_FROM", "Panels", "families", "panels"]

NARROW = 4.7  # inches: 338 points, so that text of 9.5 points is 9.5 pixels high on a page of 400 pixels
PANELS_FROM = 10  # lines: more than that are split by family
_LINE = 0.2  # inches of a line of a legend
_HANDLE, _LETTER = 44, 0.62 * TEXT  # points that a line of a legend takes, and each letter of its name


def families(labels: Sequence[str]) -> dict[str, list[str]]:
    """Return panel -> labels: many arms have a panel for each family, and each of several also has the baselines."""
    baselines = [label for label in labels if arm_of(label) in ("dense", REFERENCE)]
    others = [label for label in labels if label not in baselines]
    found = {name: [label for label in others if family_of(arm_of(label)) == name] for name in (*FAMILIES, OTHERS)}
    found = {name: own for name, own in found.items() if own}
    if len(labels) <= PANELS_FROM or len(found) < 2:
        return {"": list(labels)}
    return {name: baselines + own for name, own in found.items()}


@dataclass(frozen=True, kw_only=True)
class Panels:
    """A figure of panels, each in a part of its own, to which its title and legend belong.

    Attributes:
        figure: With all of them.
        axes: One for each panel, the uppermost.
        below: Those below them in the same panels, if any.
        narrow: Whether they lie below each other.
        rows: Of panels.
    """

    figure: Figure
    axes: Sequence[Axes]
    below: Sequence[Axes]
    narrow: bool
    rows: int

    def title(self, text: str) -> None:
        """Put a title over all panels."""
        # A title of a narrow figure is broken where it would be cut off.
        at = text.rfind(" ", 0, 46) if self.narrow and len(text) > 46 else -1
        shown = text if at < 0 else f"{text[:at]}\n{text[at + 1 :]}"
        self.figure.suptitle(shown, **TITLE)

    def broken(self, *parts: str) -> str:
        """Return the parts of a label, each on a line of its own where it is narrow."""
        return ("\n" if self.narrow else ", ").join(parts)

    def legends(self, columns: int = 3, *, beside: bool = False) -> None:
        """Give each panel a legend below it, or beside it where there is room, and the figure the height for it."""
        if beside and not self.narrow:
            self._legend(self.figure, self.axes, "outside right upper", 1)
            return
        lines = max(self._legend(axes.figure, [axes], "outside lower left", columns) for axes in self.axes)
        self._grow(lines * self.rows)

    def legend(self, columns: int = 4) -> None:
        """Give all panels one legend below them."""
        self._grow(self._legend(self.figure, self.axes, "outside lower left", columns))

    def _legend(self, part: FigureBase, axes_of: Sequence[Axes], place: Any, columns: int) -> int:
        """Draw a legend and return its number of lines."""
        entries: dict[str, Any] = {}
        for axes in axes_of:
            entries |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        if not entries:
            return 0
        width = 72 * self.figure.get_figwidth() / (1 if part is self.figure else math.ceil(len(self.axes) / self.rows))
        columns = max(1, min(columns, int(width / (_HANDLE + _LETTER * max(map(len, entries))))))
        part.legend(
            entries.values(), entries.keys(), loc=place, ncols=min(columns, len(entries)), frameon=False, fontsize=TEXT,
            labelcolor=INK, columnspacing=1.4, handlelength=2.6,
        )  # fmt: skip
        return math.ceil(len(entries) / columns)

    def _grow(self, lines: int) -> None:
        self.figure.set_size_inches(self.figure.get_figwidth(), self.figure.get_figheight() + _LINE * lines)


def panels(
    number: int,
    *,
    narrow: bool,
    columns: int = 2,
    size: tuple[float, float] = (6.0, 3.4),
    share: bool = False,
    stack: Sequence[float] = (1.0,),
) -> Panels:
    """Return a figure of empty panels.

    Args:
        number: Of panels.
        narrow: Whether they lie below each other.
        columns: Of panels otherwise.
        size: Width and height of a panel, in inches; a narrow one is `NARROW` wide, and lower.
        share: Whether all have the scales of the first.
        stack: Heights of the axes of a panel, which share the horizontal scale, relative to each other.
    """
    columns = 1 if narrow else min(columns, number)
    rows = math.ceil(number / columns)
    width, height = (NARROW, min(2.2 + len(stack), size[1])) if narrow else (columns * size[0], size[1])
    figure = Figure(figsize=(width, rows * height), layout="constrained", dpi=DPI)
    found: list[list[Axes]] = []
    for part in list(figure.subfigures(rows, columns, squeeze=False).flat)[:number]:
        own = list(part.subplots(len(stack), 1, sharex=True, squeeze=False, height_ratios=stack).flat)
        for place, axes in enumerate(own):
            style_axes(axes)
            if share and found:
                axes.sharey(found[0][place])
                if len(own) == 1:  # those of a stack share theirs already
                    axes.sharex(found[0][place])
        found.append(own)
    upper, lower = [own[0] for own in found], [own[1] for own in found if len(own) > 1]
    return Panels(figure=figure, axes=upper, below=lower, narrow=narrow, rows=rows)
