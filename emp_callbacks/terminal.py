"""What a terminal, a log or a pipe is given: tables that fit, text that steers and crashes nothing."""

from __future__ import annotations

import codecs
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unicodedata import category

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table
    from rich.text import Text

__all__ = ["FittedTable", "any_output", "make_console", "printable"]

_FILE_WIDTH = 160  # a file has no width of its own, and tables there must not be cut at 80
_LEAST_WORDS = 13  # columns to which words are wrapped at most: "no difference" on one line
_PLAIN = str.maketrans(
    {"\u2212": "-", "\u2013": "-", "\u2014": "-", "\u00b1": "+-", "\u2264": "<=", "\u2265": ">=", "\u00d7": "x",
     "\u2026": "...", "\u2192": "->", "\u00a0": " ", "\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"'}
)  # fmt: skip


def make_console() -> Console:
    """Return a console on stdout that shows text as it is: names are no markup, and steer no terminal.

    It is as wide as the terminal, or as COLUMNS says; 160 columns in a file.
    """
    from rich.console import Console

    class PlainConsole(Console):
        """Every text of a message passes `render_str`."""

        def render_str(self, text: str, **settings: Any) -> Any:
            return super().render_str(printable(text), **{**settings, "markup": False, "emoji": False})

    console = PlainConsole(markup=False, emoji=False)
    if not (sys.stdout.isatty() or console.is_jupyter or "COLUMNS" in os.environ):
        console.width = _FILE_WIDTH
    return console


def printable(text: str) -> str:
    r"""Return text with control characters written out, but for the end of a line.

    Examples:
        >>> print(printable("a\x1b[31m b"))
        a\x1b[31m b
    """
    return "".join(c.encode("unicode_escape").decode() if category(c)[0] == "C" and c != "\n" else c for c in text)


@contextmanager
def any_output() -> Iterator[None]:
    """Let stdout and stderr take any text, whatever their encoding: a minus as "-", the unknown as its escape."""
    codecs.register_error("emp-plain", _plain)
    with ExitStack() as undo:
        for stream in (sys.stdout, sys.stderr):
            # Streams that a test or a notebook put there have no encoding to fail at.
            if hasattr(stream, "reconfigure") and not str(stream.encoding).lower().startswith("utf"):
                undo.callback(stream.reconfigure, errors=stream.errors)
                stream.reconfigure(errors="emp-plain")
        yield


def _plain(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end].translate(_PLAIN)
    return text.encode("ascii", "backslashreplace").decode(), error.end


@dataclass(frozen=True)
class _Column:
    """One column: its worth is 0 if it always stays, and the highest goes first where there is no room for all."""

    index: int
    heading: str
    worth: int
    words: bool
    footer: str


class FittedTable:
    """A table that fits the width it is printed at: no name and no number is ever cut.

    Where not everything fits, "value [interval]" goes on two lines, words are wrapped and names folded at their dots;
    then columns are left out, those of the highest worth first, and a line under the table names them.

    Args:
        title: Stands above.
        caption: Stands below.
        more: Where all columns are to be had, such as "report.html has all".
    """

    def __init__(self, title: str = "", *, caption: str = "", more: str = "") -> None:
        self._title, self._caption, self._more = title, caption, more
        self._columns: list[_Column] = []
        self._rows: list[list[Text]] = []
        self._sections: set[int] = set()

    def add_column(self, heading: str, *, worth: int = 0, words: bool = False, footer: str = "") -> None:
        """Add a column; the first one holds names. Of `words` are sentences, which may be wrapped."""
        first = not self._columns
        self._columns.append(_Column(len(self._columns), printable(heading), worth, words or first, printable(footer)))

    def add_row(self, *cells: str, style: str = "") -> None:
        """Add the cells of a row, one for each column; `style` is that of its last column of words."""
        from rich.text import Text

        last = max((column.index for column in self._columns if column.words), default=0)
        shown = [Text(printable(cell), style=style if i == last else "") for i, cell in enumerate(cells)]
        self._rows.append(shown)

    def add_section(self) -> None:
        """Draw a line below the last row."""
        self._sections.add(len(self._rows) - 1)

    @property
    def headings(self) -> list[str]:
        """The columns' headings, with those that may not fit."""
        return [column.heading for column in self._columns]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text

        room = options.max_width
        table, left_out = self._fitted(console, options, room)
        if self._title:
            yield Text(f"\n{printable(self._title)}", style="italic")
        yield table
        for line in filter(None, [printable(self._caption), self._told(left_out, room)]):
            yield Text(line, style="dim")

    def _told(self, left_out: Sequence[_Column], room: int) -> str:
        if not left_out:
            return ""
        names = ", ".join(" ".join(column.heading.split()) for column in sorted(left_out, key=lambda one: one.index))
        return f"not shown in {room} columns: {names}; widen the terminal, or set COLUMNS" + (
            f" ({self._more})" if self._more else ""
        )

    def _fitted(self, console: Console, options: ConsoleOptions, room: int) -> tuple[Table, list[_Column]]:
        """Return the table that fits, and the columns that it lacks."""
        kept, left_out = list(self._columns), list[_Column]()
        anywhere = options.update(max_width=10_000)
        while True:
            wide = [self._width(column, narrow=False) for column in kept]
            if console.measure(table := self._table(kept, wide, narrow=False), options=anywhere).maximum <= room:
                return table, left_out
            share = max(16, room * 2 // 5)  # of names, and of words such as a path, which can be folded
            least = [min(self._width(c, narrow=True), share if c.words else room) for c in kept]
            least[0] = min(wide[0], share)
            spare = room - console.measure(self._table(kept, least, narrow=True), options=anywhere).maximum
            droppable = [column for column in kept if column.worth]
            if spare >= 0 or not droppable:
                return self._table(kept, _spread(kept, least, wide, spare), narrow=True), left_out
            left_out.append(max(droppable, key=lambda column: (column.worth, column.index)))
            kept.remove(left_out[-1])

    def _texts(self, column: _Column) -> list[str]:
        return [column.heading, column.footer, *(row[column.index].plain for row in self._rows)]

    def _width(self, column: _Column, *, narrow: bool) -> int:
        """Return the width that a column needs: as it is, or stacked and wrapped."""
        heading, *cells = self._texts(column)
        if not narrow:
            return max(map(_longest_line, [heading, *cells]))
        if not column.words:
            three_lines = -(-_longest_line(heading) // 3)
            return max(three_lines, *map(_longest_line, [*_apart(heading), *map(_stacked, cells)]))
        words = [word for text in (heading, *cells) for word in text.split()]
        return min(max(map(_longest_line, [*words, "-" * _LEAST_WORDS])), self._width(column, narrow=False))

    def _table(self, kept: Sequence[_Column], widths: Sequence[int], *, narrow: bool) -> Table:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        shown = any(column.heading for column in kept)
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), pad_edge=False, show_header=shown)
        table.show_footer = any(column.footer for column in kept)
        for column, width in zip(kept, widths, strict=True):
            justify: Any = "left" if column.words else "right"
            footer = _stacked(column.footer) if narrow else column.footer
            heading = _stacked(column.heading) if narrow else column.heading
            table.add_column(Text(heading), Text(footer), justify=justify, width=width, overflow="fold")
        for i, row in enumerate(self._rows):
            cells = [row[column.index] for column in kept]
            table.add_row(
                *(_shaped(cell, column, width, narrow) for cell, column, width in zip(cells, kept, widths, strict=True))
            )
            if i in self._sections:
                table.add_section()
        return table


def _shaped(cell: Text, column: _Column, width: int, narrow: bool) -> Text:
    """Return a cell with its own line breaks: rich would break a name in the middle of a word."""
    from rich.text import Text

    if column.index == 0:
        return Text(_folded(cell.plain, width), style=cell.style)
    return Text(_stacked(cell.plain), style=cell.style) if narrow and not column.words else cell


def _spread(kept: Sequence[_Column], least: Sequence[int], wide: Sequence[int], spare: int) -> list[int]:
    """Return the least widths, with what is left over given to names, then to words."""
    widths = list(least)
    for i, column in enumerate(kept):
        if column.words and spare > 0:
            more = min(spare, wide[i] - widths[i])
            widths[i], spare = widths[i] + more, spare - more
    if spare < 0:  # not even what always stays fits: names are folded further
        widths[0] = max(8, widths[0] + spare)
    return widths


def _stacked(text: str) -> str:
    """Return "value [interval]" on two lines."""
    return text.replace(" [", "\n[")


def _apart(heading: str) -> list[str]:
    """Return what of a heading stays on one line: its words, and "[95 %]"."""
    return re.findall(r"\[.*?\]|\S+", heading)


def _folded(name: str, width: int) -> str:
    """Return a name on as many lines as it needs, broken behind a dot or the like, but in no number."""
    from rich.cells import cell_len

    lines = [""]
    for part in re.split(r"(?<=[/_ -])|(?<=\.)(?!\d)", name):
        if lines[-1] and cell_len(lines[-1] + part.rstrip()) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def _longest_line(text: str) -> int:
    from rich.cells import cell_len

    return max(map(cell_len, text.split("\n")))
