"""Figures as SVG within a page: its font, its colours by day and by night, and no file beside it."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable

import matplotlib
from matplotlib.figure import Figure

from emp_callbacks.study.report.styles import for_dark

__all__ = ["Drawings", "color_class"]

_COLOR = re.compile(r"#[0-9a-f]{6}\b")


class Drawings:
    """The figures of one page, and what they share: styles and colours stand once, in the page's style sheet."""

    def __init__(self) -> None:
        self._styles: dict[str, str] = {}
        self._colors: dict[str, None] = {}
        self._ids = 0

    def picture(self, draw: Callable[[bool], Figure], seen: Callable[[], str]) -> tuple[str, Figure]:
        """Return a figure as two drawings, of which a page shows the one that fits, and its wide form.

        Args:
            draw: Draws it; the argument says whether it is for a narrow page.
            seen: Says what is seen in it, for those who do not.
        """
        wide = draw(False)
        said = seen()
        drawn = [self._svg(wide, said, "wide"), self._svg(draw(True), said, "narrow")]
        wide.set_layout_engine("none")  # its panels lie where they belong by now
        # As wide as the text of the wide form stays readable.
        limit = round(0.94 * 72 * wide.get_figwidth())
        self._ids += 1
        name = f"picture{self._ids}"
        rule = f"@container (max-width:{limit}px){{#{name} .wide{{display:none}}#{name} .narrow{{display:block}}}}"
        return f'<div class="view" id="{name}"><style>{rule}</style>{"".join(drawn)}</div>', wide

    def use(self, color: str) -> None:
        """Have a colour that no figure has."""
        self._colors[color.lower()] = None

    def css(self) -> str:
        """Return the style sheet of what was drawn so far."""
        light = "".join(f"--k{color[1:]}:{color};" for color in self._colors)
        dark = "".join(f"--k{color[1:]}:{for_dark(color)};" for color in self._colors)
        dots = "".join(f".k{color[1:]}{{background:var(--k{color[1:]})}}" for color in self._colors)
        styles = "".join(f".{name}{{{style}}}" for style, name in self._styles.items())
        return f":root{{{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}{dots}{styles}"

    def _svg(self, figure: Figure, seen: str, form: str) -> str:
        drawn = io.StringIO()
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "report"}):
            figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
        text = drawn.getvalue()
        text = text[text.index("<svg") :]
        for waste in (r"<metadata>.*?</metadata>", r"<!--.*?-->", r"<style.*?</style>", r' id="[a-zA-Z]+_[\w.]+"'):
            text = re.sub(waste, "", text, flags=re.DOTALL)
        # Places, not what is written: a tenth of a pixel is nobody's loss.
        text = re.sub(r"<[^>]+>", lambda tag: re.sub(r"(\d+\.\d)\d+", r"\1", tag[0]), text)
        text = re.sub(r'style="([^"]*)"', lambda found: f'class="{self._style(found[1])}"', text)
        text = self._own_ids(text)
        text = re.sub(r"\s+", " ", text).replace("> <", "><").replace("xlink:href", "href")
        width, height = (f"{72 * inches:.1f}" for inches in figure.get_size_inches())
        head = (
            f'<svg class="drawn {form}" role="img" aria-label="{html.escape(seen)}" viewBox="0 0 {width} {height}" '
            f'style="max-width:{round(1.3 * float(width))}px">'
        )
        return re.sub(r"^<svg[^>]*>", lambda _: head, text)

    def _style(self, style: str) -> str:
        """Return the class of a style; fonts are the page's, colours have a twin for dark pages."""
        found = (declaration.strip().split(": ", 1) for declaration in style.split(";") if declaration.strip())
        kept = [(name, value) for name, value in found if name != "font-family"]
        style = ";".join(_font(value) if name == "font" else f"{name}:{value}" for name, value in kept)
        for color in _COLOR.findall(style):
            self._colors[color] = None
        style = _COLOR.sub(lambda found: f"var(--k{found[0][1:]})", style)
        return self._styles.setdefault(style, f"s{len(self._styles)}")

    def _own_ids(self, text: str) -> str:
        """Give what is referred to within a drawing short names that no other drawing of the page has."""
        for name in dict.fromkeys(re.findall(r' id="(\w+)"', text)):
            self._ids += 1
            text = text.replace(f'"{name}"', f'"i{self._ids}"').replace(f"#{name}", f"#i{self._ids}")
        return text


def color_class(color: str) -> str:
    """Return the class that paints a dot in a colour of the page's drawings."""
    return f"k{color[1:].lower()}"


def _font(value: str) -> str:
    """Return the size and weight that matplotlib before 3.10 writes as one, without the family."""
    size, bold = re.findall(r"[\d.]+px", value), re.findall(r"\b(?:bold|[6-9]00)\b", value)
    return ";".join([f"font-size:{found}" for found in size] + ["font-weight:bold"] * bool(bold))
