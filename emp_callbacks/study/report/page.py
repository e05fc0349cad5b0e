"""One page of findings, as one HTML file that opens offline."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure

from emp_callbacks.study.report.statistics import Interval, PairedDifference
from emp_callbacks.study.report.svg import Drawings
from emp_callbacks.study.report.words import words_in

__all__ = [
    "DASH",
    "MINUS",
    "Grid",
    "Page",
    "Section",
    "drawn",
    "grouped",
    "interval",
    "number",
    "rendered",
    "write_files",
    "write_page",
]

MINUS, DASH = "\u2212", "\u2013"


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A table as text.

    Attributes:
        headers: Of the columns.
        rows: Cells.
        texts: Number of leading columns that hold words; the others hold numbers.
    """

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: int = 1


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of a page: a table, or a picture that is drawn when the page is written.

    Attributes:
        heading: Its name.
        text: How to read it.
        grid: The table, if it has one.
        draw: Draws the picture, if it has one; the argument says whether it is for a narrow page.
        seen: Says what is seen in the picture, for those who do not.
        file: Name of the picture's file.
        printed: Whether the table is also shown on a terminal.
    """

    heading: str
    text: str = ""
    grid: Grid | None = None
    draw: Callable[[bool], Figure] | None = None
    seen: Callable[[], str] = str
    file: str = ""
    printed: bool = True


@dataclass(frozen=True, kw_only=True)
class Page:
    """What a study found.

    Attributes:
        title: Of the page.
        summary: What was done, in one sentence.
        headline: The answer, in one sentence.
        findings: What supports it.
        warnings: Failure signatures, each with its remedy.
        sections: Tables and pictures.
    """

    title: str
    summary: str
    headline: str
    findings: Sequence[str]
    warnings: Sequence[str]
    sections: Sequence[Section]


def write_page(page: Page, folder: Path, results: Mapping[str, Any]) -> Path:
    """Write `report.html` and its pictures into a folder and return the path of the HTML file.

    Args:
        page: The findings.
        folder: Made if missing.
        results: Hold the "command" and the "environment" of the study.
    """
    drawings, pictures, sections = Drawings(), {}, []
    for section in page.sections:
        shown: dict[str, Any] = {
            "heading": section.heading,
            "text": section.text,
            "grid": section.grid,
            "picture": None,
        }
        if section.draw is not None:
            shown["picture"], png = drawn(drawings, section.draw, section.seen, section.text, section.file)
            pictures[section.file] = png
        sections.append(shown)
    text = rendered(
        "page.html.j2",
        drawings,
        title=page.title,
        page=page,
        sections=sections,
        warnings=grouped(page.warnings),
        command=results["command"],
        environment=results.get("environment", {}),
    )
    return write_files(folder, text, pictures)


def drawn(
    drawings: Drawings, draw: Callable[[bool], Figure], seen: Callable[[], str], text: str, file: str
) -> tuple[dict[str, Any], bytes]:
    """Return a picture for a template, and its wide form as a PNG."""
    svg, figure = drawings.picture(draw, seen)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return {"svg": Markup(svg), "text": text, "file": file}, png.getvalue()


def grouped(warnings: Sequence[str]) -> list[dict[str, Any]]:
    """Return one box for all warnings "what: remedy" of one remedy: what each is, and the remedy once."""
    boxes: dict[str, list[str]] = {}
    for warning in warnings:
        what, _, remedy = warning.partition(": ")
        boxes.setdefault(f"{remedy[:1].upper()}{remedy[1:]}{'.' if remedy else ''}", []).append(f"{what}.")
    return [{"what": what, "remedy": remedy} for remedy, what in boxes.items()]


def rendered(name: str, drawings: Drawings, **values: Any) -> str:
    """Return a page that explains the words that it uses.

    Args:
        name: Of the template.
        drawings: What it shows; its styles stand in the page's head.
        values: What the template names.
    """
    page = _template(name)
    text = page.render(words=(), css="", **values)
    for hidden in (r"<style.*?</style>", r"<[^>]*>"):
        text = re.sub(hidden, " ", text, flags=re.DOTALL)
    return page.render(words=words_in(html.unescape(text)), css=Markup(drawings.css()), **values)


def number(value: float | None, decimals: int, sign: bool = False) -> str:
    """Return `value` with a fixed number of decimals and a true minus; a dash for None."""
    if value is None:
        return DASH
    text = f"{value:{'+' if sign else ''}.{decimals}f}"
    if float(text) == 0:
        text = text.replace("-", "+" if sign else "")
    return text.replace("-", MINUS)


def interval(found: Interval | PairedDifference, decimals: int = 2) -> str:
    """Return a change as text, "mean [low, high]" with signs; only the mean without an interval."""
    ends = "" if found.low is None else f" [{number(found.low, decimals, True)}, {number(found.high, decimals, True)}]"
    return f"{number(found.mean, decimals, True)}{ends}"


def write_files(folder: Path, text: str, pictures: Mapping[str, bytes]) -> Path:
    """Write `report.html` and its pictures, all of which are drawn by now, and return the path of the HTML file."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, png in pictures.items():
        (folder / name).write_bytes(png)
    path = folder / "report.html"
    path.write_text(text, encoding="utf-8")
    return path


@cache
def _template(name: str) -> jinja2.Template:
    """Return one of the templates beside this file."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(name)
